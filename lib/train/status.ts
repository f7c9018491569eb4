// Small numbers that all ranks agree on: the status word of a step, sums of losses and counts. One float64 all-reduce, summed in
// rank order, so that every rank reads the same bits and takes the same decision.
import { allReduce } from '../parallel/collectives.js'
import type { Ctx } from '../tensor/ctx.js'
import { withScope } from '../tensor/scope.js'
import { Tensor } from '../tensor/tensor.js'

/** Sums of `values` over all ranks, element by element. Every rank calls it. */
export async function sumOverRanks(ctx: Ctx, values: readonly number[]): Promise<number[]> {
  const world = ctx.groups.get('world')
  if (world.size === 1) return [...values]
  return await withScope(ctx, async (inner) => {
    const sums = Tensor.fromHost(inner, Float64Array.from(values), [values.length], 'float64')
    allReduce(inner, sums, world)
    const bytes = await sums.bytes()
    return Array.from(new Float64Array(bytes.buffer, bytes.byteOffset, values.length))
  })
}

/** True on the one rank of each data-parallel place that speaks for its model-parallel group: sums count it once. */
export function isFirstOfModel(ctx: Ctx): boolean {
  return ctx.groups.get('tp').rank === 0 && ctx.groups.get('pp').rank === 0
}
