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

/** True on the one rank of each copy of the model that speaks for it, of those that see its losses: sums count it once. */
export function speaksForModel(ctx: Ctx): boolean {
  const { rank: stage, size: stages } = ctx.groups.get('pp')
  return ctx.groups.get('tp').rank === 0 && stage === stages - 1
}
