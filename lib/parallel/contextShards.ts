// Context parallelism: each rank of cp has two runs of every sequence, one from its front and one from its back, so that with causal
// attention all have as many keys to look at: of 2·cp runs rank r has runs r and 2·cp-1-r. Where 2·cp does not divide a sequence, it is
// filled up at its end by tokens that nobody sees and that count nowhere.
import { native } from '../addon/load.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { allGather, reduceScatterInto } from './collectives.js'

type Place = Pick<Group, 'rank' | 'size'>

/** Tokens of one of the 2·cp runs. */
export const runLength = (seqLength: number, { size }: Pick<Group, 'size'>): number => Math.ceil(seqLength / (2 * size))

/** Where this rank's two runs begin in the sequence. */
export function runStarts(seqLength: number, { rank, size }: Place): readonly [number, number] {
  const length = runLength(seqLength, { size })
  return [rank * length, (2 * size - 1 - rank) * length]
}

/** Of each of this rank's tokens its place in [B, S], row by row; -1 for what fills up. */
export function ownPlaces(batchSize: number, seqLength: number, group: Place): Int32Array {
  const length = runLength(seqLength, group)
  const starts = runStarts(seqLength, group)
  const places = new Int32Array(batchSize * 2 * length)
  for (let b = 0, at = 0; b < batchSize; b++)
    for (const start of starts)
      for (let i = start; i < start + length; i++) places[at++] = i < seqLength ? b * seqLength + i : -1
  return places
}

/** The runs of a tensor with the tokens of all ranks as [B, S', ...], of which the first half of each rank's block is its first run. */
function runViews(ctx: Ctx, whole: Tensor, byRank: Tensor, batchSize: number, group: Pick<Group, 'size'>) {
  const rest = whole.shape.slice(2)
  const length = (whole.shape[1] as number) / (2 * group.size)
  const views: { readonly sequence: Tensor; readonly rank: Tensor }[] = []
  for (let rank = 0; rank < group.size; rank++) {
    const own = byRank.slice(ctx, 0, rank, 1).reshape(ctx, [batchSize, 2 * length, ...rest])
    runStarts(2 * group.size * length, { rank, size: group.size }).forEach((start, half) => {
      const sequence = whole.slice(ctx, 1, start, length)
      views.push({ sequence, rank: own.slice(ctx, 1, half * length, length) })
    })
  }
  return views
}

/** Every rank's tokens [B, s, ...] in the order of the sequences: [B, cp · s, ...]. Owned by the scope. */
export function gatherSequence(ctx: Ctx, own: Tensor, group: Group): Tensor {
  const [B = 0, s = 0, ...rest] = own.shape
  const whole = ctx.empty([B, group.size * s, ...rest], own.dtype)
  using scope = new Scope()
  const inner = ctx.with({ scope })
  for (const { sequence, rank } of runViews(inner, whole, allGather(inner, own, group), B, group))
    native.copy(ctx.stream.id, sequence.handle, rank.handle)
  return whole
}

/** This rank's tokens of the sum over cp of tensors in the order of the sequences; written to `out`, [B, s, ...], contiguous. */
export function reduceScatterSequence(ctx: Ctx, out: Tensor, whole: Tensor, group: Group): void {
  const [B = 0, ...rest] = out.shape
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const byRank = inner.empty([group.size, ...out.shape], whole.dtype)
  for (const { sequence, rank } of runViews(inner, whole, byRank, B, group))
    native.copy(ctx.stream.id, rank.handle, sequence.handle)
  reduceScatterInto(inner, out, byRank.reshape(inner, [group.size * B, ...rest]), group)
}
