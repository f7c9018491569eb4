// One contiguous float32 tensor with a place for each parameter: main gradients, moments and master weights. One fill zeroes
// all gradients, one collective a bucket sums them. Places begin at multiples of 16 elements; what lies between stays 0.

import { native } from '../addon/load.js'
import { assert } from '../base/errors.js'
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
        const start = offset + (block.localStart[0] ?? 0) * row
        let end = start + volume(block.size)
        // Behind a parameter's last element lies padding of the buffer, which is 0: it joins neighbours.
        if (end === offset + volume(localShape)) end = Math.ceil(end / alignment) * alignment
        const last = ranges.at(-1)
        if (last !== undefined && last.start + last.length === start) last.length = end - last.start
        else ranges.push({ start, length: end - start })
      }
    }
    return ranges
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
