// How a local tensor is a shard of a logical one. Axis names are opaque here: meshes give them meaning. Norms, clipping,
// checkpoint, export and byte counts look at owned blocks only. See the gradient-sum table in docs/runtime.md.
import { assert } from '../base/errors.js'
import { composeRegions, type Region, volume } from './region.js'

/** A box of the logical tensor that this rank holds. */
export interface ShardBlock {
  readonly globalStart: readonly number[]
  readonly localStart: readonly number[]
  readonly size: readonly number[]
  /** Which copy of the box this is; copy 0 is the owner: it alone counts in norms and is written to files. */
  readonly replica: number
  /** Axes over which this box's gradient is summed, besides the data-parallel ones. */
  readonly gradSum: readonly string[]
}

/** Where a local tensor lies in the logical tensor. Local elements outside all blocks are padding and stay 0. */
export interface ShardSpec {
  readonly logicalShape: readonly number[]
  readonly localShape: readonly number[]
  readonly blocks: readonly ShardBlock[]
  /** Axis whose ranks hold the same, and over which gradients are summed: of experts `edp`. Default: `dp_cp`. */
  readonly copies?: CopiesAxis
}

export type CopiesAxis = 'dp_cp' | 'edp'

interface ShardOptions {
  readonly gradSum?: readonly string[]
  readonly replica?: number
}

/** The whole tensor on every rank. `replica` is this rank's copy number: 0 on exactly one rank of the copies. */
export function replicated(shape: readonly number[], options: ShardOptions = {}): ShardSpec {
  const zeros = shape.map(() => 0)
  return {
    logicalShape: [...shape],
    localShape: [...shape],
    blocks: [
      {
        globalStart: zeros,
        localStart: zeros,
        size: [...shape],
        replica: options.replica ?? 0,
        gradSum: options.gradSum ?? [],
      },
    ],
  }
}

/**
 * An even split of one dim. `padTo` (default: the dim itself) is the padded length that is divided by `parts`: a vocabulary
 * is padded in memory only, so blocks stop at the logical length.
 */
export function splitDim(
  shape: readonly number[],
  dim: number,
  index: number,
  parts: number,
  padTo?: number,
): ShardSpec {
  const logical = shape[dim] as number
  const padded = padTo ?? logical
  assert(padded % parts === 0, `dim ${dim} of [${shape}] (padded to ${padded}) must be divisible by ${parts}`)
  const local = padded / parts
  const start = index * local
  const size = Math.max(0, Math.min(local, logical - start))
  const at = (value: number) => shape.map((_, d) => (d === dim ? value : 0))
  const localShape = shape.map((n, d) => (d === dim ? local : n))
  const boxSize = shape.map((n, d) => (d === dim ? size : n))
  const blocks: ShardBlock[] =
    size === 0 ? [] : [{ globalStart: at(start), localStart: at(0), size: boxSize, replica: 0, gradSum: [] }]
  return { logicalShape: [...shape], localShape, blocks }
}

/**
 * Rows of dim 0 cut into runs: the local tensor is the runs one after the other. Expresses gate and up halves
 * (`[gate_i; up_i]`), query groups, and key and value rows held by several ranks.
 */
export function rowRuns(
  shape: readonly number[],
  runs: readonly {
    readonly start: number
    readonly count: number
    readonly replica?: number
    readonly gradSum?: readonly string[]
  }[],
): ShardSpec {
  const rest = shape.slice(1)
  const zeros = rest.map(() => 0)
  let rows = 0
  const blocks = runs.map((run) => {
    const block: ShardBlock = {
      globalStart: [run.start, ...zeros],
      localStart: [rows, ...zeros],
      size: [run.count, ...rest],
      replica: run.replica ?? 0,
      gradSum: run.gradSum ?? [],
    }
    rows += run.count
    return block
  })
  return { logicalShape: [...shape], localShape: [rows, ...rest], blocks }
}

/** Logical to local regions of all blocks, replicas included: what a load fills. */
export function loadRegions(spec: ShardSpec): Region[] {
  return spec.blocks.map((b) => ({ from: b.globalStart, to: b.localStart, size: b.size }))
}

/** Local to logical regions of owned blocks only: what a save writes. */
export function ownedRegions(spec: ShardSpec): Region[] {
  return spec.blocks
    .filter((b) => b.replica === 0)
    .map((b) => ({ from: b.localStart, to: b.globalStart, size: b.size }))
}

/** Elements that this rank owns. */
export function ownedElements(spec: ShardSpec): number {
  return ownedRegions(spec).reduce((n, r) => n + volume(r.size), 0)
}

/** A run of the flat local tensor and the box of the logical tensor that it is. */
export interface FlatRange {
  /** First element in the flat local tensor. */
  readonly offset: number
  /** Number of elements. */
  readonly count: number
  /** The box; `localStart` and the rest are as of the block that it is cut from. */
  readonly block: ShardBlock
}

/**
 * Elements [begin, end) of the flat local tensor as contiguous runs, each a box of the logical tensor: how an optimizer that cuts
 * flat parameters anywhere says what it holds. Padding is left out. A matrix yields at most three runs a block.
 */
export function flatRanges(shard: ShardSpec, begin: number, end: number): FlatRange[] {
  const { localShape } = shard
  return flatBoxes(localShape, begin, end).flatMap(({ start, size }) =>
    shard.blocks.flatMap((block) => {
      const whole = localShape.every((n, d) => d === 0 || (block.localStart[d] === 0 && block.size[d] === n))
      assert(whole, `a block of [${block.size}] in a local tensor [${localShape}] must be a run of rows`)
      const [inside] = composeRegions(
        [{ from: block.globalStart, to: block.localStart, size: block.size }],
        [{ from: start, to: start, size }],
      )
      if (inside === undefined) return []
      const { from: globalStart, to: localStart, size: boxSize } = inside
      const offset = localStart.reduce((at, n, d) => at * (localShape[d] as number) + n, 0)
      return [{ offset, count: volume(boxSize), block: { ...block, globalStart, localStart, size: boxSize } }]
    }),
  )
}

/** [begin, end) of a flat tensor as boxes: a first part of a row, whole rows, a last part of a row. */
function flatBoxes(shape: readonly number[], begin: number, end: number): { start: number[]; size: number[] }[] {
  if (end <= begin) return []
  const [, ...rest] = shape
  if (rest.length === 0)
    return shape.length === 0 ? [{ start: [], size: [] }] : [{ start: [begin], size: [end - begin] }]
  const row = volume(rest)
  const partOf = (at: number, from: number, to: number) =>
    flatBoxes(rest, from, to).map(({ start, size }) => ({ start: [at, ...start], size: [1, ...size] }))
  const first = Math.floor(begin / row)
  const last = Math.floor(end / row)
  if (first === last) return partOf(first, begin - first * row, end - first * row)
  const whole = Math.ceil(begin / row)
  return [
    ...(whole > first ? partOf(first, begin - first * row, row) : []),
    ...(last > whole ? [{ start: [whole, ...rest.map(() => 0)], size: [last - whole, ...rest] }] : []),
    ...partOf(last, 0, end - last * row),
  ]
}
