// Where parameters lie in flat buffers. A bucket is what one collective carries: whole parameters of one dtype, padded so that it
// is cut into equal ranges, one for each data-parallel rank. Places begin at multiples of 16 elements; what lies between stays 0.

import type { DType } from '../base/dtype.js'
import { assert } from '../base/errors.js'
import type { Parameter } from '../nn/parameter.js'
import { volume } from '../tensor/region.js'
import type { CopiesAxis } from '../tensor/shardSpec.js'

/** A run of elements of a flat buffer. */
export interface Range {
  readonly start: number
  readonly length: number
}

/** Parameters whose gradients one collective sums: a run of the flat buffer. */
export interface Bucket extends Range {
  readonly parameters: readonly Parameter[]
  readonly dtype: DType
  /** The axis over whose ranks the gradients are summed. */
  readonly axis: CopiesAxis
  /** Ranges that it is cut into. */
  readonly parts: number
}

/** The part of a flat parameter that lies in a range: elements [begin, begin + count). */
export interface Segment {
  readonly parameter: Parameter
  readonly begin: number
  readonly count: number
  /** Its first element, from the beginning of the range. */
  readonly offset: number
}

export interface FlatOptions {
  /** Ranges of a bucket, by its axis. Default 1. */
  readonly parts?: (axis: CopiesAxis) => number
  /** A bucket ends at the first border of parameters where it has this many elements. Default: no limit. */
  readonly bucketSize?: number
  /** Parameters of different units are in different buckets. */
  readonly unitOf?: (parameter: Parameter) => string
}

const alignment = 16

const roundUp = (n: number, multiple: number) => Math.ceil(n / multiple) * multiple

export class FlatLayout {
  readonly offsets: ReadonlyMap<Parameter, number>
  readonly buckets: readonly Bucket[]
  readonly length: number
  constructor(
    readonly parameters: readonly Parameter[],
    options: FlatOptions = {},
  ) {
    const offsets = new Map<Parameter, number>()
    let at = 0
    this.buckets = bucketsOf(parameters, options).map((members) => {
      const start = at
      for (const parameter of members) {
        offsets.set(parameter, at)
        at += roundUp(sizeOf(parameter), alignment)
      }
      const { dtype, shard } = members[0] as Parameter
      const axis = axisOf(shard)
      const parts = options.parts?.(axis) ?? 1
      at = start + roundUp(at - start, alignment * parts)
      return { start, length: at - start, parameters: members, dtype, axis, parts }
    })
    this.offsets = offsets
    this.length = Math.max(at, alignment)
  }

  /** One of the equal ranges of a bucket. */
  part(bucket: Bucket, index: number): Range {
    const length = bucket.length / bucket.parts
    return { start: bucket.start + index * length, length }
  }

  /** What of which parameter of a bucket lies in a range, in order. */
  segments(bucket: Bucket, { start, length }: Range): Segment[] {
    return bucket.parameters.flatMap((parameter) => {
      const at = this.offsets.get(parameter) as number
      const from = Math.max(at, start)
      const count = Math.min(at + sizeOf(parameter), start + length) - from
      return count > 0 ? [{ parameter, begin: from - at, count, offset: from - start }] : []
    })
  }

  /** Elements that this rank owns, as few runs as possible: replicas and vocabulary padding are left out. */
  ownedRanges(): Range[] {
    const ranges: { start: number; length: number }[] = []
    for (const parameter of this.parameters) {
      const { blocks, localShape } = parameter.shard
      const row = volume(localShape.slice(1))
      const offset = this.offsets.get(parameter) as number
      for (const block of blocks) {
        if (block.replica !== 0) continue
        assert(
          block.size.every((size, d) => d === 0 || size === localShape[d]),
          `blocks of ${parameter.name} are no runs of rows`,
        )
        const start = offset + (block.localStart[0] ?? 0) * row
        let end = start + volume(block.size)
        // Behind a parameter's last element lies padding of the buffer, which is 0: it joins neighbours.
        if (end === offset + volume(localShape)) end = roundUp(end, alignment)
        const last = ranges.at(-1)
        if (last !== undefined && last.start + last.length === start) last.length = end - last.start
        else ranges.push({ start, length: end - start })
      }
    }
    return ranges
  }
}

/** What two lists of ranges share; both in order. */
export function intersect(a: readonly Range[], b: readonly Range[]): Range[] {
  return a.flatMap((left) =>
    b.flatMap((right) => {
      const start = Math.max(left.start, right.start)
      const length = Math.min(left.start + left.length, right.start + right.length) - start
      return length > 0 ? [{ start, length }] : []
    }),
  )
}

const axisOf = ({ copies }: Parameter['shard']) => copies ?? 'dp_cp'

const sizeOf = ({ shard }: Parameter) => volume(shard.localShape)

/** Buckets of each axis by themselves, in the order in which their first parameters stand. */
function bucketsOf(parameters: readonly Parameter[], options: FlatOptions): Parameter[][] {
  const places = new Map(parameters.map((parameter, i) => [parameter, i]))
  const first = (bucket: readonly Parameter[]) => places.get(bucket[0] as Parameter) as number
  return (['dp_cp', 'edp'] as const)
    .flatMap((axis) =>
      cut(
        parameters.filter(({ shard }) => axisOf(shard) === axis),
        options,
      ),
    )
    .sort((a, b) => first(a) - first(b))
}

/** Cut from the last parameter on: its gradient is the first to be complete, so the bucket that fills up first is full. */
function cut(parameters: readonly Parameter[], options: FlatOptions): Parameter[][] {
  const { bucketSize = Number.POSITIVE_INFINITY, unitOf = () => '' } = options
  const buckets: Parameter[][] = []
  let open: Parameter[] = []
  let elements = 0
  for (const parameter of parameters.toReversed()) {
    const [first] = open
    const fits = first === undefined || (first.dtype === parameter.dtype && unitOf(first) === unitOf(parameter))
    if (elements >= bucketSize || !fits) {
      buckets.push(open)
      open = []
      elements = 0
    }
    open.push(parameter)
    elements += sizeOf(parameter)
  }
  if (open.length > 0) buckets.push(open)
  return buckets.reverse().map((bucket) => bucket.reverse())
}
