// One contiguous float32 tensor with a place for each parameter: main gradients, moments and master weights. One fill zeroes
// all gradients, one collective a bucket sums them. Places begin at multiples of 16 elements; what lies between stays 0.
import { assert } from '../base/errors.js'
import { native } from '../addon/load.js'
import type { Parameter } from '../nn/parameter.js'
import type { Ctx } from '../tensor/ctx.js'
import { volume } from '../tensor/region.js'
import { Tensor } from '../tensor/tensor.js'

/** A run of elements of a flat buffer. */
export interface Range {
  readonly start: number
  readonly length: number
}

const alignment = 16

/** Where parameters lie in a flat buffer. */
export class FlatLayout {
  readonly offsets: ReadonlyMap<Parameter, number>
  readonly length: number

  constructor(readonly parameters: readonly Parameter[]) {
    const offsets = new Map<Parameter, number>()
    let at = 0
    for (const parameter of parameters) {
      offsets.set(parameter, at)
      at += Math.ceil(volume(parameter.shard.localShape) / alignment) * alignment
    }
    this.offsets = offsets
    this.length = Math.max(at, alignment)
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
        const first = localShape.length === 0 ? 0 : (block.localStart[0] as number) * row
        ranges.push({ start: offset + first, length: volume(block.size) })
      }
    }
    ranges.sort((a, b) => a.start - b.start)
    const merged: { start: number; length: number }[] = []
    for (const range of ranges) {
      const last = merged.at(-1)
      // What lies between two owned places of one alignment step is padding of the buffer, and 0.
      if (last !== undefined && range.start - (last.start + last.length) < alignment && range.start % alignment === 0) {
        last.length = range.start + range.length - last.start
      } else if (last !== undefined && range.start === last.start + last.length) last.length += range.length
      else merged.push({ ...range })
    }
    return merged
  }
}

/** A flat float32 tensor and its views. The maker disposes it. */
export class FlatBuffer {
  readonly flat: Tensor

  /** Zeros for all parameters of the layout. */
  constructor(
    ctx: Ctx,
    readonly layout: FlatLayout,
  ) {
    this.flat = Tensor.zeros(ctx, [layout.length], 'float32').keep()
  }

  /** The place of a parameter, of its local shape; the caller keeps or scopes it. */
  view(ctx: Ctx, parameter: Parameter): Tensor {
    const shape = parameter.shard.localShape
    const strides = shape.map((_, d) => volume(shape.slice(d + 1)))
    const offset = this.layout.offsets.get(parameter)
    assert(offset !== undefined, `${parameter.name} has no place in this buffer`)
    return this.flat.view(ctx, shape, strides, offset)
  }

  range(ctx: Ctx, range: Range): Tensor {
    return this.flat.view(ctx, [range.length], [1], range.start)
  }

  zero(ctx: Ctx): void {
    native.fill(ctx.stream.id, this.flat.handle, 0)
  }

  dispose(): void {
    this.flat.dispose()
  }
}
