// A toy of a model: its first layers, every tensor byte for byte, and the rest of the folder as it is. config.json changes in the number
// of layers and in lists that speak of layers, nowhere else.
import { ViaductError } from '../base/errors.js'
import { solo } from '../checkpoint/ranks.js'
import { copyRegion, settleAll } from '../io/blocks.js'
import type { SourceOptions } from '../io/hub/modelSource.js'
import type { JsonDocument, JsonValue } from '../io/jsonDocument.js'
import type { HfConfig } from '../models/family.js'
import { hasExperts } from '../models/transformerConfig.js'
import { identityRegion } from '../tensor/region.js'
import { planExport } from './exportPlan.js'
import { type HfModel, mappingOf, openHfModel, placeOf } from './hfModel.js'
import { writeHfFolder } from './hfWriter.js'
import { cutLayerLists } from './layerLists.js'

export interface ToyOptions extends SourceOptions {
  /** How many layers to keep, from the first. */
  readonly layers: number
  readonly overwrite?: boolean
  /** Largest file. Default 5 GB. */
  readonly maxShardBytes?: number
}

export interface ToyReport {
  readonly folder: string
  readonly layers: number
  readonly tensors: number
  readonly bytes: number
  readonly files: readonly string[]
}

/**
 * Writes a toy of a model into a new folder.
 * @throws what openHfModel throws; ERR_USAGE for more layers than there are; ERR_CONFIG where the config cannot be cut;
 *   ERR_TARGET_EXISTS, ERR_NO_SPACE
 */
export async function makeToy(source: string, target: string, options: ToyOptions): Promise<ToyReport> {
  const model = await openHfModel(source, options)
  const { layers } = options
  if (!Number.isInteger(layers) || layers < 1 || layers > model.config.numLayers) {
    throw new ViaductError(
      'ERR_USAGE',
      'toy',
      `expected 1 to ${model.config.numLayers} layers, as many as ${model.folder} has, got ${layers}`,
    )
  }
  const document = toyConfig(model, layers)
  const config = model.family.fromHf(document.value as HfConfig)
  const mapping = mappingOf(model.family, config, model.weights.tensors)
  const held = (ours: string) => {
    const [part] = mapping.bindings.get(ours)?.parts ?? []
    return model.weights.tensors.get(part?.name ?? '')?.entry.dtype ?? null
  }
  // Files are cut anew: those of the source would have gaps in their numbers.
  const maxShardBytes = options.maxShardBytes ?? 5e9
  const plan = planExport(mapping, model.parcel, held, { maxShardBytes })
  await writeHfFolder(
    target,
    plan,
    model.parcel.with({ config: document }),
    { ranks: solo, overwrite: options.overwrite ?? false },
    async (tensors) => {
      for (const { origin, place, shape } of tensors) {
        if (!('part' in origin)) continue
        const from = model.weights.tensors.get(origin.part.name)
        if (from) await settleAll([copyRegion(placeOf(from, origin.part), place, identityRegion(shape))])
      }
    },
  )
  return {
    folder: target,
    layers,
    tensors: new Set(plan.tensors.map(({ name }) => name)).size,
    bytes: plan.tensors.reduce((n, { bytes }) => n + bytes, 0),
    files: plan.files.map(({ name }) => name),
  }
}

/** The config of the first layers; all other text as it is. */
function toyConfig({ parcel, family, config }: HfModel, layers: number): JsonDocument {
  const hf = cutLayerLists(parcel.config.value as HfConfig, config.numLayers, layers)
  const document = parcel.config.with(hf as JsonValue)
  // The cut config must mean the first layers of the whole one, whatever lists a family has.
  const toy = family.fromHf(document.value as HfConfig)
  const whole = { ...config, numLayers: layers, moeLayerFreq: toy.moeLayerFreq }
  const changed = (Object.keys(whole) as (keyof typeof whole)[]).filter(
    (key) => JSON.stringify(whole[key]) !== JSON.stringify(toy[key]),
  )
  const moved = Array.from({ length: layers }, (_, i) => i).filter((i) => hasExperts(toy, i) !== hasExperts(config, i))
  if (changed.length + moved.length > 0) {
    throw new ViaductError(
      'ERR_CONFIG',
      'toy',
      `expected the first ${layers} layers to keep their config, got changes in ${[...changed, ...moved.map((i) => `layer ${i}`)].join(', ')}`,
    )
  }
  return document
}
