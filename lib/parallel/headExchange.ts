// Tokens for heads (Ulysses): ranks that have all heads of a run of tokens get all tokens of a run of heads, and back. Rows of a tensor
// are tokens in the order of contextShards.ts, its columns are heads, one behind the other, which the number of ranks divides.
import { native } from '../addon/load.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { allToAllInto } from './collectives.js'
import { runViews } from './contextShards.js'

/** Each rank's columns of x [B · s, C], as [ranks, B, s, C / ranks]. */
function byColumns(ctx: Ctx, x: Tensor, batchSize: number, { size }: Group): Tensor {
  const [tokens = 0, C = 0] = x.shape
  const [s, columns] = [tokens / batchSize, C / size]
  return x.view(ctx, [size, batchSize, s, columns], [columns, s * C, C, 1])
}

const exchange = (ctx: Ctx, out: Tensor, t: Tensor, group: Group) => {
  const each = Array<number>(group.size).fill(1)
  allToAllInto(ctx, out, t, each, each, group)
}

/** [B · s, C] of this rank's tokens and all heads, to `out` [B · ranks · s, C / ranks] of all tokens and this rank's heads. */
export function tokensToHeads(ctx: Ctx, out: Tensor, x: Tensor, batchSize: number, group: Group): void {
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const columns = byColumns(inner, x, batchSize, group)
  const sent = inner.empty(columns.shape, x.dtype)
  native.copy(ctx.stream.id, sent.handle, columns.handle)
  const received = inner.empty(columns.shape, x.dtype)
  exchange(inner, received, sent, group)
  const [tokens = 0, width = 0] = out.shape
  const whole = out.reshape(inner, [batchSize, tokens / batchSize, width])
  for (const { sequence, rank } of runViews(inner, whole, received, batchSize, group))
    native.copy(ctx.stream.id, sequence.handle, rank.handle)
}

/** The way back: [B · ranks · s, C / ranks] to `out` [B · s, C]. */
export function headsToTokens(ctx: Ctx, out: Tensor, x: Tensor, batchSize: number, group: Group): void {
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const columns = byColumns(inner, out, batchSize, group)
  const sent = inner.empty(columns.shape, x.dtype)
  const [tokens = 0, width = 0] = x.shape
  const whole = x.reshape(inner, [batchSize, tokens / batchSize, width])
  for (const { sequence, rank } of runViews(inner, whole, sent, batchSize, group))
    native.copy(ctx.stream.id, rank.handle, sequence.handle)
  const received = inner.empty(columns.shape, x.dtype)
  exchange(inner, received, sent, group)
  native.copy(ctx.stream.id, columns.handle, received.handle)
}
