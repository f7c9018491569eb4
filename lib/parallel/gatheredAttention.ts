// Attention with the keys and values of all ranks that share a sequence, gathered (Megatron's form `all_gather`), in the order of the
// sequence: each of a rank's two runs of queries looks at what stands before its end. Keys and values are not kept: the backward pass
// gathers them again, and sums their gradients over the ranks. Legend as in ops/attention.ts; s: this rank's tokens, h: half of them.
import { native } from '../addon/load.js'
import { type AttentionArgs, attentionMask, heads, unpack } from '../ops/attention.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { gatherSequence, pick, reduceScatterSequence, runStarts } from './contextShards.js'

export interface GatheredArgs extends AttentionArgs {
  readonly group: Group
}

/** Calls f for each of this rank's runs: which of its tokens they are, where they stand in the sequence. */
function forRuns(args: GatheredArgs, f: (half: 0 | 1, first: number, length: number, start: number) => void): void {
  const own = (args.qkv.shape[0] as number) / args.batchSize
  const length = own / 2
  const [front, back] = runStarts(own * args.group.size, args.group)
  f(0, 0, length, front)
  f(1, length, length, back)
}

/** Keys and values of all ranks, in the order of the sequence. */
function gatherKeys(ctx: Ctx, args: GatheredArgs): { k: Tensor; v: Tensor } {
  const own = unpack(ctx, args.qkv, args)
  const gather = (t: Tensor) => {
    const packed = ctx.empty(t.shape, t.dtype)
    native.copy(ctx.stream.id, packed.handle, t.handle)
    const whole = gatherSequence(ctx, packed, args.group)
    packed.dispose()
    return whole
  }
  return { k: gather(own.k), v: gather(own.v) }
}

/** What attention is told of a run of queries. */
function maskOf(ctx: Ctx, args: GatheredArgs, first: number, length: number, start: number) {
  return attentionMask({ ...args, firstKey: args.firstKey?.slice(ctx, 1, first, length) ?? null }, start)
}

/** Attention of queries and keys as they are, to `y` [T, G·R·D] and lse float32 [2, B, G·R, h]. */
export function gatheredForward(ctx: Ctx, args: GatheredArgs, y: Tensor, lse: Tensor): void {
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const { q } = unpack(inner, args.qkv, args)
  const { k, v } = gatherKeys(inner, args)
  const out = heads(inner, y, args)
  forRuns(args, (half, first, length, start) => {
    native.attentionForward(
      ctx.stream.id,
      out.slice(inner, 1, first, length).handle,
      pick(inner, lse, half).handle,
      q.slice(inner, 1, first, length).handle,
      k.slice(inner, 1, 0, start + length).handle,
      v.slice(inner, 1, 0, start + length).handle,
      ...maskOf(inner, args, first, length, start),
    )
  })
}

/** The gradients of the packed queries, keys and values. */
export function gatheredBackward(ctx: Ctx, args: GatheredArgs, dqkv: Tensor, dy: Tensor, y: Tensor, lse: Tensor): void {
  const { qkv, group } = args
  const { id } = ctx.stream
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const { q, k: ownK } = unpack(inner, qkv, args)
  const { k, v } = gatherKeys(inner, args)
  const d = unpack(inner, dqkv, args)
  const [out, dOut] = [heads(inner, y, args), heads(inner, dy, args)]
  const zeros = () => {
    const t = inner.empty(k.shape, k.dtype)
    native.fill(id, t.handle, 0)
    return t
  }
  const sums = { k: zeros(), v: zeros() }
  const part = { k: zeros(), v: zeros() }
  forRuns(args, (half, first, length, start) => {
    const into = half === 0 ? sums : part
    const seen = (t: Tensor) => t.slice(inner, 1, 0, start + length).handle
    const run = (t: Tensor) => t.slice(inner, 1, first, length).handle
    native.attentionBackward(
      id,
      run(d.q),
      seen(into.k),
      seen(into.v),
      run(dOut),
      run(q),
      seen(k),
      seen(v),
      run(out),
      pick(inner, lse, half).handle,
      ...maskOf(inner, args, first, length, start),
    )
  })
  for (const which of ['k', 'v'] as const) {
    native.add(id, sums[which].handle, sums[which].handle, part[which].handle)
    const own = inner.empty(ownK.shape, ownK.dtype)
    reduceScatterSequence(inner, own, sums[which], group)
    native.copy(id, d[which].handle, own.handle)
  }
}
