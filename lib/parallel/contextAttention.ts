// Attention over sequences that the ranks of cp share, in the form that their groups stand for (contextShards.ts): tokens are exchanged
// for heads where ranks of `heads` are several (headExchange.ts), then keys and values travel round `ring` (ringAttention.ts); where
// neither has ranks they are gathered over cp (gatheredAttention.ts). Legend as in ops/attention.ts; s: this rank's tokens of a row.
import type { AttentionContext } from '../nn/coreAttention.js'
import {
  type AttentionArgs,
  addSink,
  attention,
  attentionGradient,
  checkPacked,
  heads as headsOf,
  rotate,
  type Sink,
  sinkGradient,
} from '../ops/attention.js'
import { defineOp } from '../ops/define.js'
import type { TrainableWeight } from '../ops/weight.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { type ContextGroups, pick } from './contextShards.js'
import { gatheredBackward, gatheredForward } from './gatheredAttention.js'
import { headsToTokens, tokensToHeads } from './headExchange.js'
import { ringBackward, ringForward } from './ringAttention.js'

/** What of the batch attention looks at, and who shares its sequences; null: each rank has all of its own. */
export interface SharedAttentionContext extends AttentionContext {
  readonly context: ContextGroups | null
}

/** `firstKey` and `keyEnd` are those of `keyBounds`. */
export interface ContextAttentionArgs extends AttentionArgs {
  readonly context: ContextGroups
}

interface Outputs extends Record<string, Tensor | null> {
  /** [B·s, G·R·D] */
  readonly y: Tensor
  /** float32, [runs of queries, B, heads, queries of a run]: of the heads and tokens that this rank attends with. */
  readonly lse: Tensor
  /** Packed queries, keys and values of all tokens of `heads` and this rank's share of their heads; null without an exchange. */
  readonly exchanged: Tensor | null
}

/** What attention takes where tokens have been exchanged for heads. */
function attended(args: ContextAttentionArgs, exchanged: Tensor | null): AttentionArgs {
  return exchanged === null
    ? { ...args, rotary: null, sink: null }
    : { ...args, qkv: exchanged, groups: args.groups / args.context.heads.size, rotary: null, sink: null }
}

/** The rank has all tokens and some of the heads: attention as ever. */
function wholeArgs(ctx: Ctx, args: AttentionArgs): AttentionArgs {
  return {
    ...args,
    firstKey: args.firstKey ? pick(ctx, args.firstKey, 0) : null,
    keyEnd: args.keyEnd ? pick(ctx, args.keyEnd, 0) : null,
  }
}

/** Attention of queries and keys as they are. */
function attend(ctx: Ctx, args: ContextAttentionArgs, { y, lse, exchanged }: Outputs): void {
  const { cp, heads, ring } = args.context
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const own = attended(args, exchanged)
  const width = own.groups * own.queriesPerGroup * own.channels
  const out = exchanged === null ? y : inner.empty([own.qkv.shape[0] as number, width], y.dtype)
  if (ring.size > 1) ringForward(inner, { ...own, ring }, out, lse)
  else if (exchanged === null) gatheredForward(inner, { ...wholeArgs(inner, own), group: cp }, out, lse)
  else attention.rule.forward(inner, wholeArgs(inner, own), { y: out, lse: pick(inner, lse, 0) })
  if (args.sink)
    forSinks(inner, own, args.context, args.sink, lse, out, (sink, sums, part) => addSink(inner, sink, part, sums))
  if (exchanged !== null) headsToTokens(inner, y, out, args.batchSize, heads)
}

/** Calls f for each run of queries, with the sink of this rank's heads and the run of `out` as [B, tokens, G, R, D]. */
function forSinks(
  ctx: Ctx,
  own: AttentionArgs,
  { heads: group }: ContextGroups,
  weight: TrainableWeight,
  lse: Tensor,
  out: Tensor,
  f: (sink: Sink, lse: Tensor, out: Tensor, first: number, length: number) => void,
): void {
  const count = own.groups * own.queriesPerGroup
  const sink = { weight, first: group.rank * count, count }
  const [runs = 0, , , length = 0] = lse.shape
  const whole = headsOf(ctx, out, own)
  for (let run = 0; run < runs; run++)
    f(sink, pick(ctx, lse, run), whole.slice(ctx, 1, run * length, length), run * length, length)
}

/** What this rank attends with of a tensor like `y`: all tokens and its share of the heads where there is an exchange. */
function toHeads(ctx: Ctx, args: ContextAttentionArgs, t: Tensor): Tensor {
  const { heads } = args.context
  if (heads.size === 1) return t
  const [tokens = 0, width = 0] = t.shape
  const whole = ctx.empty([heads.size * tokens, width / heads.size], t.dtype)
  tokensToHeads(ctx, whole, t, args.batchSize, heads)
  return whole
}

/** As `attention`, causal, of this rank's tokens to the keys of all ranks. */
const contextAttentionOp = defineOp<ContextAttentionArgs, Outputs>({
  name: 'contextAttention',
  shapes(args) {
    const { qkv, batchSize: B, groups, queriesPerGroup, channels, context } = args
    checkPacked('contextAttention', qkv, args)
    const [tokens = 0, width = 0] = qkv.shape
    const { size } = context.heads
    const runs = size === context.cp.size ? 1 : 2
    return {
      y: { shape: [tokens, groups * queriesPerGroup * channels], dtype: qkv.dtype },
      lse: { shape: [runs, B, (groups * queriesPerGroup) / size, (size * tokens) / B / runs], dtype: 'float32' },
      exchanged: size === 1 ? null : { shape: [size * tokens, width / size], dtype: qkv.dtype },
    }
  },
  forward(ctx, args, out) {
    if (args.rotary) rotate(ctx, args.qkv, args, args.rotary, false)
    if (out.exchanged) tokensToHeads(ctx, out.exchanged, args.qkv, args.batchSize, args.context.heads)
    attend(ctx, args, out)
  },
  inputs: ({ qkv }) => [qkv],
  weights: ({ sink }) => [sink],
  saves: ({ qkv, rotary, firstKey, keyEnd, sink }, { y, lse, exchanged }) => [
    exchanged ?? qkv,
    sink?.data,
    y,
    lse,
    firstKey,
    keyEnd,
    rotary?.cos,
    rotary?.sin,
    rotary?.positions,
  ],
  remade: ({ y, lse }) => [y, lse],
  // Queries and keys have been rotated for good.
  remake: (ctx, args, { exchanged }, [y, lse]) => attend(ctx, args, { y: y as Tensor, lse: lse as Tensor, exchanged }),
  backwardInput(ctx, args, { y, lse, exchanged }, { y: dy }) {
    if (!dy) return [null]
    const { cp, heads, ring } = args.context
    const dqkv = ctx.empty(args.qkv.shape, args.qkv.dtype)
    using scope = new Scope()
    const inner = ctx.with({ scope })
    const own = attended(args, exchanged)
    const [out, dOut] = [toHeads(inner, args, y), toHeads(inner, args, dy)]
    const d = exchanged === null ? dqkv : inner.empty(exchanged.shape, exchanged.dtype)
    if (ring.size > 1) ringBackward(inner, { ...own, ring }, d, dOut, out, lse)
    else if (exchanged === null) gatheredBackward(inner, { ...wholeArgs(inner, own), group: cp }, d, dOut, out, lse)
    else attentionGradient(inner, wholeArgs(inner, own), d, dOut, out, pick(inner, lse, 0))
    if (exchanged !== null) headsToTokens(inner, dqkv, d, args.batchSize, heads)
    if (args.rotary) rotate(ctx, dqkv, args, args.rotary, true)
    return [dqkv]
  },
  backwardWeight(ctx, args, { y, lse, exchanged }, { y: dy }) {
    if (!dy || !args.sink?.requiresGrad) return
    using scope = new Scope()
    const inner = ctx.with({ scope })
    const own = attended(args, exchanged)
    const dOut = headsOf(inner, toHeads(inner, args, dy), own)
    const out = toHeads(inner, args, y)
    forSinks(inner, own, args.context, args.sink, lse, out, (sink, sums, part, first, length) =>
      sinkGradient(inner, sink, dOut.slice(inner, 1, first, length), part, sums),
    )
  },
})

/** Attention where ranks share each sequence. */
export function contextAttention(ctx: Ctx, args: ContextAttentionArgs): Tensor {
  return contextAttentionOp(ctx, args).y
}
