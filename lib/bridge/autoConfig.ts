// The Hugging Face form of a checkpoint that has none of its own, or one of other sizes: sizes come from the model section of its
// run_config.yaml, everything else (family, spelling, tokenizer, other files) from a reference folder.
import { parse } from 'yaml'
import { ViaductError } from '../base/errors.js'
import { snakeCase } from '../base/sealed.js'
import { type OpenCheckpoint, openCheckpoint } from '../checkpoint/checkpointIndex.js'
import { HfParcel } from '../checkpoint/hfParcel.js'
import { readCheckpointFile } from '../checkpoint/loadCheckpoint.js'
import { modelFolder, type SourceOptions } from '../io/hub/modelSource.js'
import type { JsonValue } from '../io/jsonDocument.js'
import { tensorBytes } from '../io/safetensorsHeader.js'
import type { HfConfig } from '../models/family.js'
import { type TransformerConfig, transformerKeys } from '../models/transformerConfig.js'
import { readHfConfig } from './hfModel.js'
import { cutLayerLists } from './layerLists.js'

const fileName = 'run_config.yaml'

/**
 * The parcel of a checkpoint's model after a reference. Fields that run_config.yaml leaves out are the reference's.
 * @throws ERR_CHECKPOINT without a sound model section; ERR_CONFIG where the reference's family cannot express the model;
 *   ERR_ARCHITECTURE, ERR_HF_CONFIG for the reference
 */
export async function rebuildParcel(
  ckpt: string,
  reference: string,
  options: SourceOptions = {},
): Promise<{ readonly checkpoint: OpenCheckpoint; readonly parcel: HfParcel }> {
  const checkpoint = await openCheckpoint(ckpt)
  const parcel = await HfParcel.fromFolder(await modelFolder(reference, options), null)
  const { family, config: before } = readHfConfig(parcel.config.value as HfConfig)
  const given = await modelSection(checkpoint, before)
  const config = { ...before, ...given, paramsDtype: mainDtype(checkpoint) ?? before.paramsDtype }
  const hf = parcel.config.value as HfConfig
  // Where layers went away, lists of layers go with them; what the family reads of them is written below in any case.
  const cut = config.numLayers < before.numLayers ? cutLayerLists(hf, before.numLayers, config.numLayers) : hf
  return { checkpoint, parcel: parcel.with({ config: parcel.config.with(family.toHf(config, cut) as JsonValue) }) }
}

/** Fields of the model section, in camelCase or snake_case. */
async function modelSection(checkpoint: OpenCheckpoint, like: TransformerConfig): Promise<Partial<TransformerConfig>> {
  const broken = (what: string): never => {
    throw new ViaductError(
      'ERR_CHECKPOINT',
      'autoConfig',
      `expected ${fileName} with a model section in ${checkpoint.folder}, got ${what}`,
      { folder: checkpoint.folder, file: fileName },
    )
  }
  const text = (await readCheckpointFile(checkpoint, fileName)) ?? broken('no such file')
  let document: unknown
  try {
    document = parse(text)
  } catch (cause) {
    return broken((cause as Error).message)
  }
  const section = (document as { model?: unknown } | null)?.model
  if (typeof section !== 'object' || section === null || Array.isArray(section)) return broken('none')
  const fields = section as Record<string, unknown>
  const found: Record<string, unknown> = {}
  for (const key of transformerKeys) {
    const name = [key, snakeCase(key)].find((spelling) => Object.hasOwn(fields, spelling))
    if (name === undefined) continue
    const [value, reference] = [fields[name], like[key]]
    const fits = value === null || reference === null || typeof value === typeof reference || key === 'moeLayerFreq'
    found[key] = fits ? value : broken(`${key}=${JSON.stringify(value)}`)
  }
  return found as Partial<TransformerConfig>
}

/** Dtype of most bytes of the weights. */
function mainDtype({ tensors }: OpenCheckpoint): TransformerConfig['paramsDtype'] | null {
  const bytes = new Map<TransformerConfig['paramsDtype'], number>()
  for (const [name, { dtype, shape }] of tensors)
    if (!name.startsWith('optimizer.')) bytes.set(dtype, (bytes.get(dtype) ?? 0) + tensorBytes(dtype, shape))
  return [...bytes].sort(([, a], [, b]) => b - a)[0]?.[0] ?? null
}
