// The plan of an online export: which Hugging Face tensors there are, and which box of which rank's shard goes where in each. Pure:
// from mapping and layout alone, equal on all ranks, no model and no byte needed. exportWeights.ts runs it.
import { type DType, dtypes } from '../../base/dtype.js'
import { tensorBytes } from '../../io/safetensorsHeader.js'
import { type RowCutter, rowCutter } from '../../models/layoutShards.js'
import { type BoundPart, type Mapping, tensorShape } from '../../models/mapping.js'
import { type ParameterRow, parameterTable } from '../../models/parameterTable.js'
import type { ParallelConfig } from '../../parallel/config.js'
import { rankCoordinates } from '../../parallel/rankCoordinates.js'
import { composeRegions, invertRegions, type Region } from '../../tensor/region.js'
import { ownedRegions } from '../../tensor/shardSpec.js'

/** Axes of the mesh over which parts of one tensor can be spread. */
export type GatherAxis = 'tp' | 'etp' | 'ep' | 'pp'

/** What one rank gives to a HF tensor. */
export interface TaskPiece {
  /** The rank's place among those that the task's axes span, in rank order; 0 where there are no axes. */
  readonly at: number
  /** Megatron's name of the parameter whose local shard it is. */
  readonly ours: string
  readonly localShape: readonly number[]
  /** Local shard -> HF tensor, or its slice. */
  readonly regions: readonly Region[]
  /** Shape that the regions' targets speak of, and which slice of the HF tensor it is (0 where it is all of it). */
  readonly shape: readonly number[]
  readonly slice: number
}

/** One HF tensor of an export. Tasks are data: keep them, filter them, give them to `exportHfWeights` again. */
export interface ConversionTask {
  /** Hugging Face's name. */
  readonly name: string
  readonly shape: readonly number[]
  /** What the yielded tensor will have. */
  readonly dtype: DType
  /** Of the yielded tensor. */
  readonly bytes: number
  /** Megatron's name; all of them where the tensor stacks experts. */
  readonly ours: readonly string[]
  /** The ranks along these axes gather it in one collective; none: each rank holds all of it. */
  readonly axes: readonly GatherAxis[]
  readonly what: 'weights' | 'gradients'
  /** Dtype of the ranks' shards. */
  readonly held: DType
  readonly pieces: readonly TaskPiece[]
}

/** How a model is spread over ranks. */
export interface ModelLayout {
  readonly parallel: ParallelConfig
  readonly worldSize: number
  /** Rows of the vocabulary in memory; default: the least multiple of tp. */
  readonly paddedVocab?: number
}

/** What a plan is for. */
export interface TaskOptions {
  /** Casts floating tensors. Default: the parameter's dtype. */
  readonly weightDtype?: DType
  /** What of each parameter; `gradients`: its main gradient, float32, zeros where it has none. Default weights. */
  readonly what?: 'weights' | 'gradients'
  /** Only names for which this is true; the same on every rank. */
  readonly filter?: (name: string) => boolean
}

/**
 * All HF tensors of a model, in its order.
 * @param heldAs - dtype of a parameter's shards, by Megatron's name.
 * @param copies - names of tied tensors to yield as well; none of gradients.
 * @throws ERR_LAYOUT_INVALID when the layout does not fit the model.
 */
export function planTasks(
  mapping: Mapping,
  layout: ModelLayout,
  heldAs: (ours: string) => DType,
  copies: readonly string[] = [],
  options: TaskOptions = {},
): ConversionTask[] {
  const { what = 'weights', weightDtype, filter } = options
  const holders = new Holders(mapping, layout)
  const tasks: ConversionTask[] = []
  const add = (row: ParameterRow, name: string, readers: readonly BoundPart[]) => {
    if (filter?.(name) === false) return
    const [first] = readers as [BoundPart]
    const held = what === 'gradients' ? 'float32' : heldAs(row.name)
    const dtype = weightDtype && dtypes[held].isFloat ? weightDtype : held
    const shape = tensorShape(first.part)
    tasks.push({
      name,
      shape,
      dtype,
      bytes: tensorBytes(dtype, shape),
      ours: readers.map(({ binding }) => binding.ours),
      axes: holders.axesOf(row),
      what,
      held,
      pieces: readers.flatMap((reader) => holders.pieces(reader)),
    })
  }
  const tied = what === 'gradients' ? [] : copies
  for (const row of holders.rows.values()) {
    const parts = mapping.bindings.get(row.name)?.parts ?? []
    for (const { name, slice } of parts)
      if ((slice?.index ?? 0) === 0) add(row, name, mapping.byTheirs.get(name) as readonly BoundPart[])
    for (const copy of tied) {
      const original = mapping.tied.get(copy)
      if (parts.some(({ name }) => name === original))
        add(row, copy, mapping.byTheirs.get(original as string) as readonly BoundPart[])
    }
  }
  return tasks
}

/** Which ranks of one copy of the model hold what. Other copies hold the same at the same places. */
class Holders {
  readonly rows: ReadonlyMap<string, ParameterRow>
  readonly #mapping: Mapping
  readonly #layout: ModelLayout
  readonly #cutters = new Map<string, readonly RowCutter[]>()

  constructor(mapping: Mapping, layout: ModelLayout) {
    this.rows = new Map(parameterTable(mapping.config).map((row) => [row.name, row]))
    this.#mapping = mapping
    this.#layout = layout
  }

  axesOf(row: ParameterRow): readonly GatherAxis[] {
    const { parallel } = this.#layout
    const isWhole = row.cut === 'replicated' || row.cut === 'perHead'
    const axes: [GatherAxis, number][] =
      row.expert === null
        ? [['tp', isWhole ? 1 : parallel.tensorModelParallelSize]]
        : [
            ['etp', isWhole ? 1 : parallel.expertTensorParallelSize],
            ['ep', parallel.expertModelParallelSize],
          ]
    axes.push(['pp', parallel.pipelineModelParallelSize])
    return axes.flatMap(([axis, size]) => (size > 1 ? [axis] : []))
  }

  pieces({ binding, part }: BoundPart): TaskPiece[] {
    const row = this.rows.get(binding.ours) as ParameterRow
    const toTheirs = invertRegions(part.regions)
    return this.#cuttersOf(row).flatMap((cut, at) => {
      const shard = cut(row)
      const regions = shard === null ? [] : composeRegions(ownedRegions(shard), toTheirs)
      if (shard === null || regions.length === 0) return []
      const { localShape } = shard
      return [{ at, ours: row.name, localShape, regions, shape: part.shape, slice: part.slice?.index ?? 0 }]
    })
  }

  /** Those that cut for the ranks along a row's axes, of the ranks that are first on all other axes. */
  #cuttersOf(row: ParameterRow): readonly RowCutter[] {
    const axes: readonly string[] = this.axesOf(row)
    const key = `${row.expert === null} ${axes}`
    const known = this.#cutters.get(key)
    if (known !== undefined) return known
    const { parallel, worldSize, paddedVocab } = this.#layout
    const others = row.expert === null ? (['tp', 'pp', 'cp', 'dp'] as const) : (['etp', 'ep', 'pp', 'edp'] as const)
    const found: RowCutter[] = []
    for (let rank = 0; rank < worldSize; rank++) {
      const place = rankCoordinates(parallel, worldSize, rank)
      if (others.every((axis) => axes.includes(axis) || place[axis] === 0))
        found.push(rowCutter(this.#mapping.config, parallel, worldSize, rank, { paddedVocab }))
    }
    this.#cutters.set(key, found)
    return found
  }
}

/** Consecutive tasks of together at most `bucketBytes`; a larger tensor stands alone. */
export function* bucketsOf(tasks: readonly ConversionTask[], bucketBytes: number): Generator<ConversionTask[]> {
  let bucket: ConversionTask[] = []
  let bytes = 0
  for (const task of tasks) {
    if (bucket.length > 0 && bytes + task.bytes > bucketBytes) {
      yield bucket
      bucket = []
      bytes = 0
    }
    bucket.push(task)
    bytes += task.bytes
  }
  if (bucket.length > 0) yield bucket
}
