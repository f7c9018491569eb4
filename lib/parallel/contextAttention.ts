// Attention over sequences that the ranks of cp share, in Megatron's form `all_gather`: keys and values of all ranks are gathered, in the
// order of the sequence, and each of a rank's two runs of queries looks at what stands before its end. Keys and values are not kept:
// the backward pass gathers them again, and sums their gradients over the ranks. Legend as in ops/attention.ts; s: this rank's tokens.
import { native } from '../addon/load.js'
import { type AttentionArgs, attention, checkPacked, heads, rotate, unpack } from '../ops/attention.js'
import { defineOp } from '../ops/define.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { gatherSequence, reduceScatterSequence, runStarts } from './contextShards.js'

export interface ContextAttentionArgs extends AttentionArgs {
  readonly group: Group
}

/** Calls f for each of this rank's runs: which of its tokens they are, where they stand in the sequence. */
function forRuns(
  args: ContextAttentionArgs,
  f: (half: 0 | 1, first: number, length: number, start: number) => void,
): void {
  const own = (args.qkv.shape[0] as number) / args.batchSize
  const length = own / 2
  const [front, back] = runStarts(own * args.group.size, args.group)
  f(0, 0, length, front)
  f(1, length, length, back)
}

/** Keys and values of all ranks, in the order of the sequence. */
function gatherKeys(ctx: Ctx, args: ContextAttentionArgs): { k: Tensor; v: Tensor } {
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

/** Attention over the queries and keys of `qkv` as they are. */
function attend(ctx: Ctx, args: ContextAttentionArgs, y: Tensor, lse: readonly [Tensor, Tensor]): void {
  const { firstKey, keyEnd, scale, window, softcap } = args
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const { q } = unpack(inner, args.qkv, args)
  const { k, v } = gatherKeys(inner, args)
  const out = heads(inner, y, args)
  forRuns(args, (half, first, length, start) => {
    native.attentionForward(
      ctx.stream.id,
      out.slice(inner, 1, first, length).handle,
      lse[half].handle,
      q.slice(inner, 1, first, length).handle,
      k.slice(inner, 1, 0, start + length).handle,
      v.slice(inner, 1, 0, start + length).handle,
      firstKey?.slice(inner, 1, first, length).handle ?? 0,
      keyEnd?.handle ?? 0,
      scale,
      true,
      start,
      window ?? 0,
      softcap ?? 0,
    )
  })
}

/** As `attention`, causal, of this rank's tokens to the keys of all ranks. */
const contextAttentionOp = defineOp<ContextAttentionArgs, { y: Tensor; front: Tensor; back: Tensor }>({
  name: 'contextAttention',
  shapes(args) {
    const { qkv, batchSize, groups, queriesPerGroup, channels } = args
    checkPacked('contextAttention', qkv, args)
    const tokens = qkv.shape[0] as number
    const statistics = {
      shape: [batchSize, groups * queriesPerGroup, tokens / batchSize / 2],
      dtype: 'float32',
    } as const
    return {
      y: { shape: [tokens, groups * queriesPerGroup * channels], dtype: qkv.dtype },
      front: statistics,
      back: statistics,
    }
  },
  forward(ctx, args, { y, front, back }) {
    if (args.rotary) rotate(ctx, args.qkv, args, args.rotary, false)
    attend(ctx, args, y, [front, back])
  },
  inputs: ({ qkv }) => [qkv],
  saves: ({ qkv, rotary, firstKey, keyEnd }, { y, front, back }) => [
    qkv,
    y,
    front,
    back,
    firstKey,
    keyEnd,
    rotary?.cos,
    rotary?.sin,
    rotary?.positions,
  ],
  remade: ({ y, front, back }) => [y, front, back],
  // Queries and keys have been rotated for good.
  remake: (ctx, args, _, [y, front, back]) => attend(ctx, args, y as Tensor, [front as Tensor, back as Tensor]),
  backwardInput(ctx, args, { y, front, back }, { y: dy }) {
    if (dy === null) return [null]
    const { qkv, rotary, group, firstKey, keyEnd, scale, window, softcap } = args
    const dqkv = ctx.empty(qkv.shape, qkv.dtype)
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
        (half === 0 ? front : back).handle,
        firstKey ? run(firstKey) : 0,
        keyEnd?.handle ?? 0,
        scale,
        true,
        start,
        window ?? 0,
        softcap ?? 0,
      )
    })
    for (const which of ['k', 'v'] as const) {
      native.add(id, sums[which].handle, sums[which].handle, part[which].handle)
      const own = inner.empty(ownK.shape, ownK.dtype)
      reduceScatterSequence(inner, own, sums[which], group)
      native.copy(id, d[which].handle, own.handle)
    }
    if (rotary) rotate(ctx, dqkv, args, rotary, true)
    return [dqkv]
  },
})

/** Attention where the ranks of the group share each sequence; of one rank plain attention. */
export function contextAttention(ctx: Ctx, args: ContextAttentionArgs): Tensor {
  return args.group.size === 1 ? attention(ctx, args).y : contextAttentionOp(ctx, args).y
}
