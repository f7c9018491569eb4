// Hugging Face folder to checkpoint and back without a model in memory: regions are copied from file to file, each rank its own.
// Memory does not grow with the model. The layout decides who writes which piece, never what is written.
import { stringify } from 'yaml'
import { type DType, dtypes } from '../base/dtype.js'
import { stopIfAborted, ViaductError } from '../base/errors.js'
import { type OpenCheckpoint, openCheckpoint } from '../checkpoint/checkpointIndex.js'
import { HfParcel } from '../checkpoint/hfParcel.js'
import { checkPiece, pieceRegion, readCheckpointFile } from '../checkpoint/loadCheckpoint.js'
import { onFirst, type Ranks, solo } from '../checkpoint/ranks.js'
import { type SavedTensor, saveCheckpoint } from '../checkpoint/saveCheckpoint.js'
import { checkTarget } from '../io/atomic.js'
import { copyRegion, type FileTensor, settleAll } from '../io/blocks.js'
import type { SourceOptions } from '../io/hub/modelSource.js'
import { readHere } from '../io/hub/remoteBytes.js'
import { JsonDocument, type JsonValue } from '../io/jsonDocument.js'
import type { HfConfig } from '../models/family.js'
import { layoutProblems, rankShards } from '../models/layoutShards.js'
import type { Binding, Coverage, CoveragePolicy } from '../models/mapping.js'
import { parameterTable } from '../models/parameterTable.js'
import { defaultParallel, type ParallelConfig, parallelOf, refuseLayout } from '../parallel/config.js'
import { composeRegions, invertRegions } from '../tensor/region.js'
import type { ShardBlock } from '../tensor/shardSpec.js'
import { type PlannedTensor, type PlanOptions, planExport, sourceDtype } from './exportPlan.js'
import { type HfModel, openHfModel, placeOf, readHfConfig, readParcel } from './hfModel.js'
import { writeHfFolder } from './hfWriter.js'
import { sharedSource } from './sharedSource.js'

/** The layout decides who writes what; ranks beyond tp·pp·cp are data-parallel copies. One rank alone writes everything. */
export interface ImportOptions extends CoveragePolicy, SourceOptions, Partial<ParallelConfig> {
  readonly ranks?: Ranks
  /** Casts floating tensors; default: exactly as in the source. */
  readonly dtype?: DType
  readonly overwrite?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: OnProgress
}

/** Told after each tensor that this rank has carried: bytes so far, and in all at most. */
export type OnProgress = (done: number, total: number) => void

/** What a conversion did. */
export interface ConversionReport {
  readonly folder: string
  readonly tensors: number
  readonly bytes: number
  readonly coverage: Coverage
  /** Weight files of other formats in the source that are not carried. */
  readonly leftOut: readonly string[]
}

/** Copies one block of a logical tensor from the HF files into a file tensor of the block's size. */
export async function importBlock(
  model: HfModel,
  binding: Binding,
  block: ShardBlock,
  target: FileTensor,
  signal?: AbortSignal,
): Promise<void> {
  const wanted = [{ from: block.globalStart, to: block.size.map(() => 0), size: block.size }]
  await settleAll(
    binding.parts.flatMap((part) => {
      const source = model.weights.tensors.get(part.name)
      if (source === undefined) return []
      const regions = composeRegions(part.regions, wanted)
      return [
        readHere(model.weights.remote, placeOf(source, part), regions, (here, region) =>
          copyRegion(here, target, region, signal),
        ),
      ]
    }),
  )
}

/**
 * Imports a folder as `dir/iter_0000000`. Collective: every rank calls it.
 * @throws what openHfModel and saveCheckpoint throw; ERR_TARGET_EXISTS; ERR_LAYOUT_INVALID.
 */
export async function importCkpt(hf: string, dir: string, options: ImportOptions = {}): Promise<ConversionReport> {
  const ranks = options.ranks ?? solo
  const model = await openHfModel(await sharedSource(ranks, hf, options), options)
  const { config, mapping, coverage, parcel } = model
  const wanted = parallelOf(options)
  refuseLayout(layoutProblems(config, wanted, ranks.size === 1 ? 0 : ranks.size))
  const parallel = ranks.size === 1 ? defaultParallel : wanted
  await onFirst(ranks, () => checkTarget(dir, options.overwrite ?? false))

  const shards = new Map(
    rankShards(config, parallel, ranks.size, ranks.rank).map(({ row, shard }) => [row.name, shard]),
  )
  const tensors: SavedTensor[] = []
  let count = 0
  let bytes = 0
  let own = 0
  let carried = 0
  for (const row of parameterTable(config)) {
    const binding = mapping.bindings.get(row.name) as Binding
    const stored = binding.parts
      .map((part) => model.weights.tensors.get(part.name)?.entry.dtype)
      .find((d) => d !== undefined)
    if (stored === undefined) continue // permitted to be missing
    const dtype = options.dtype && dtypes[stored].isFloat ? options.dtype : stored
    count++
    bytes += row.shape.reduce((n, d) => n * d, dtypes[dtype].bits / 8)
    const shard = shards.get(row.name)
    if (shard === undefined) continue // another rank's
    const size = (block: ShardBlock) => block.size.reduce((n, d) => n * d, dtypes[dtype].bits / 8)
    for (const block of shard.blocks) if (block.replica === 0) own += size(block)
    tensors.push({
      name: row.name,
      dtype,
      shard,
      data: async (block, target) => {
        await importBlock(model, binding, block, target, options.signal)
        carried += size(block)
        options.onProgress?.(carried, own)
      },
    })
  }
  const conversion = {
    source: 'huggingface',
    hub: model.hub,
    address: model.address,
    partial: coverage.partial,
    ignored: coverage.ignored,
    missing: coverage.missing,
    leftOut: parcel.leftOut,
    dtype: options.dtype ?? null,
  }
  const folder = await saveCheckpoint(dir, 0, tensors, {
    ranks,
    files: {
      'run_config.yaml': stringify({ model: config }),
      'train_state.json': `${JSON.stringify({ iteration: 0, consumedSamples: 0 }, null, 2)}\n`,
      'conversion.json': `${JSON.stringify(conversion, null, 2)}\n`,
    },
    extras: (temporary) => parcel.writeTo(temporary),
    ...(options.signal ? { signal: options.signal } : {}),
  })
  return { folder, tensors: count, bytes, coverage, leftOut: parcel.leftOut }
}

export interface ExportOptions extends PlanOptions {
  readonly ranks?: Ranks
  readonly overwrite?: boolean
  /** Checks the XXH3 of every piece. Default true. */
  readonly verify?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: OnProgress
}

/** A checkpoint with the HF folder's description that it keeps. @throws ERR_CHECKPOINT when it keeps none. */
export async function openConverted(dir: string): Promise<{ checkpoint: OpenCheckpoint; parcel: HfParcel }> {
  const checkpoint = await openCheckpoint(dir)
  const parcel = await HfParcel.fromCheckpoint(checkpoint.folder)
  if (parcel === null) {
    throw new ViaductError(
      'ERR_CHECKPOINT',
      'export',
      `expected hf/config.json in ${checkpoint.folder}, found none: export needs the config of a Hugging Face model, save the checkpoint with one`,
      { folder: checkpoint.folder },
    )
  }
  return { checkpoint, parcel }
}

/** The config of an export: the source's text, with the dtype changed where the weights' dtype was. */
export function exportedConfig(parcel: HfParcel, mainDtype: DType): JsonDocument {
  const before = sourceDtype(parcel)
  if (before === null || before === mainDtype) return parcel.config
  const { family, config } = readHfConfig(parcel.config.value as HfConfig)
  return parcel.config.with(
    family.toHf({ ...config, paramsDtype: mainDtype }, parcel.config.value as HfConfig) as JsonValue,
  )
}

/** Copies the pieces of one logical tensor to where a part of it lies in an exported file. */
export async function exportPart(
  checkpoint: OpenCheckpoint,
  binding: Binding,
  part: Binding['parts'][number],
  place: FileTensor,
  signal?: AbortSignal,
): Promise<void> {
  const tensor = checkpoint.tensors.get(binding.ours)
  if (tensor === undefined) return
  const toTheirs = invertRegions(part.regions)
  await settleAll(
    tensor.pieces.flatMap((piece) =>
      composeRegions([pieceRegion(piece)], toTheirs).map((region) =>
        copyRegion(checkpoint.locate(piece, tensor), place, region, signal),
      ),
    ),
  )
}

/**
 * Exports a checkpoint as a Hugging Face folder: the source's files, names and headers where nothing changed. Collective.
 * @throws ERR_CHECKPOINT, ERR_CHECKPOINT_HASH, ERR_COVERAGE when a tensor of the model is not in the checkpoint,
 *   ERR_TARGET_EXISTS, ERR_NO_SPACE
 */
export async function exportCkpt(dir: string, hf: string, options: ExportOptions = {}): Promise<ConversionReport> {
  const ranks = options.ranks ?? solo
  const { signal } = options
  stopIfAborted(signal, 'export')
  const { checkpoint, parcel } = await openConverted(dir)
  const { mapping } = readParcel(parcel)
  const coverage = await coverageOf(checkpoint, mapping)
  const plan = planExport(mapping, parcel, (ours) => checkpoint.tensors.get(ours)?.dtype ?? null, options)
  const described = parcel.with({ config: exportedConfig(parcel, plan.mainDtype) })
  await writeHfFolder(hf, plan, described, { ranks, overwrite: options.overwrite ?? false }, async (tensors) => {
    const names = [...new Set(tensors.map(({ origin }) => ('binding' in origin ? origin.binding.ours : '')))]
    const mine = new Set(names.filter((_, i) => i % ranks.size === ranks.rank))
    const isMine = ({ origin }: PlannedTensor) => 'binding' in origin && mine.has(origin.binding.ours)
    const total = tensors.filter(isMine).reduce((n, tensor) => n + tensor.bytes, 0)
    let done = 0
    if (options.verify !== false) {
      await settleAll(
        [...mine].flatMap((name) => {
          const tensor = checkpoint.tensors.get(name)
          return tensor ? tensor.pieces.map((piece) => checkPiece(checkpoint, name, tensor, piece, signal)) : []
        }),
      )
    }
    await settleAll(
      tensors.map(async ({ origin, place, bytes }) => {
        if (!('binding' in origin) || !mine.has(origin.binding.ours)) return
        await exportPart(checkpoint, origin.binding, origin.part, place, signal)
        done += bytes
        options.onProgress?.(done, total)
      }),
    )
  })
  return {
    folder: hf,
    tensors: plan.tensors.length,
    bytes: plan.tensors.reduce((n, t) => n + t.bytes, 0),
    coverage,
    leftOut: [],
  }
}

/** Which of the model's tensors the checkpoint has; those that its conversion allowed to be missing may be absent. */
async function coverageOf(checkpoint: OpenCheckpoint, mapping: HfModel['mapping']): Promise<Coverage> {
  const text = await readCheckpointFile(checkpoint, 'conversion.json')
  const record =
    text === null
      ? {}
      : (JsonDocument.parse(text, 'conversion.json', 'ERR_CHECKPOINT').value as {
          readonly missing?: readonly string[]
          readonly ignored?: readonly string[]
        })
  const permitted = new Set(record.missing ?? [])
  const absent: string[] = []
  const wrong: string[] = []
  for (const { ours, shape, parts } of mapping.bindings.values()) {
    const tensor = checkpoint.tensors.get(ours)
    if (tensor === undefined) absent.push(...parts.filter((part) => !permitted.has(part.name)).map(() => ours))
    else if (tensor.shape.join() !== shape.join())
      wrong.push(`${ours}: expected [${shape}] from hf/config.json, got [${tensor.shape}]`)
  }
  const missing = [...new Set(absent)]
  if (missing.length + wrong.length > 0) {
    throw new ViaductError(
      missing.length > 0 ? 'ERR_COVERAGE' : 'ERR_TENSOR_SHAPE',
      'export',
      [...missing.map((name) => `${name} is missing from the checkpoint`), ...wrong].slice(0, 50).join('; '),
      { missing, shapes: wrong },
    )
  }
  const mapped = [...mapping.byTheirs.keys()].filter((name) => !permitted.has(name))
  const ignored = record.ignored ?? []
  return {
    mapped,
    tied: [],
    derived: [],
    ignored,
    missing: [...permitted],
    partial: ignored.length + permitted.size > 0,
  }
}
