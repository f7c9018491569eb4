// Attention on the packed output of linear_qkv, [T, G·(R+2)·D]: for each key-value head g its R query heads, then k, then v
// (Megatron's order). T = B·S, row b·S+s. Queries and keys are rotated in place first; k, v and q are views, never copies.
// Legend: B batch, S queries, K keys, G groups (kv heads), R queries a group, D channels a head.
import { native } from '../addon/load.js'
import { ViaductError } from '../base/errors.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { checkShape, defineOp } from './define.js'
import { mainGradOf, type TrainableWeight } from './weight.js'

/** Rotary embedding of queries and keys. */
export interface Rotary {
  /** float32 [P, R/2] */
  readonly cos: Tensor
  /** float32 [P, R/2] */
  readonly sin: Tensor
  /** int32 [T], each less than P. */
  readonly positions: Tensor
  /** Pairs (2i, 2i+1) instead of halves. */
  readonly interleaved: boolean
}

export interface AttentionShape {
  readonly batchSize: number
  /** Key-value heads here. */
  readonly groups: number
  /** Query heads of each key-value head. */
  readonly queriesPerGroup: number
  /** Channels a head. */
  readonly channels: number
}

export interface AttentionArgs extends AttentionShape {
  /** [T, G·(R+2)·D]; queries and keys in it are rotated in place. */
  readonly qkv: Tensor
  readonly rotary?: Rotary | null
  /** Factor of the scores, usually 1/sqrt(D). */
  readonly scale: number
  /** Default true. */
  readonly causal?: boolean
  /** Keys visible to each query, itself included; 0: all. */
  readonly window?: number
  /** Scores become softcap · tanh(score / softcap); 0: off. */
  readonly softcap?: number
  /** int32 [B, S]: the first visible key of each query. */
  readonly firstKey?: Tensor | null
  /** int32 [B]: visible keys end here. */
  readonly keyEnd?: Tensor | null
  /** [G·R]: one more score of each head, which the softmax counts and which takes no value. */
  readonly sink?: TrainableWeight | null
}

/** Views of packed memory: q [B,S,G,R,D], k and v [B,S,G,D]. */
export function unpack(
  ctx: Ctx,
  packed: Tensor,
  { batchSize: B, groups: G, queriesPerGroup: R, channels: D }: AttentionShape,
) {
  const row = G * (R + 2) * D
  const S = (packed.shape[0] as number) / B
  const group = (R + 2) * D
  return {
    q: packed.view(ctx, [B, S, G, R, D], [S * row, row, group, D, 1]),
    k: packed.view(ctx, [B, S, G, D], [S * row, row, group, 1], R * D),
    v: packed.view(ctx, [B, S, G, D], [S * row, row, group, 1], (R + 1) * D),
  }
}

/** [T, G·R·D] as [B,S,G,R,D]. */
export function heads(
  ctx: Ctx,
  x: Tensor,
  { batchSize: B, groups: G, queriesPerGroup: R, channels: D }: AttentionShape,
): Tensor {
  return x.reshape(ctx, [B, (x.shape[0] as number) / B, G, R, D])
}

/** Rotates queries and keys of packed memory in place: heads 0 to R of each group. */
export function rotate(
  ctx: Ctx,
  packed: Tensor,
  { groups: G, queriesPerGroup: R, channels: D }: AttentionShape,
  rotary: Rotary,
  inverse: boolean,
): void {
  const row = G * (R + 2) * D
  const qk = packed.view(ctx, [packed.shape[0] as number, G, R + 1, D], [row, (R + 2) * D, D, 1])
  const { cos, sin, positions, interleaved } = rotary
  native.rope(ctx.stream.id, qk.handle, cos.handle, sin.handle, positions.handle, interleaved, inverse)
}

export function checkPacked(op: string, qkv: Tensor, shape: AttentionShape): void {
  const { batchSize, groups, queriesPerGroup, channels } = shape
  const row = groups * (queriesPerGroup + 2) * channels
  const fits = qkv.shape.length === 2 && qkv.shape[1] === row && (qkv.shape[0] as number) % batchSize === 0
  checkShape(fits && qkv.isContiguous, op, `contiguous qkv [${batchSize}·S, ${row}]`, qkv)
}

/** What native attention is told behind the tensors. @param start - where the first query stands among the keys. */
export function attentionMask(
  { firstKey, keyEnd, scale, causal, window, softcap }: Omit<AttentionArgs, 'qkv' | keyof AttentionShape>,
  start = 0,
): [number, number, number, boolean, number, number, number] {
  return [firstKey?.handle ?? 0, keyEnd?.handle ?? 0, scale, causal ?? true, start, window ?? 0, softcap ?? 0]
}

/** Some of the heads of a sink. */
export interface Sink {
  readonly weight: TrainableWeight
  readonly first: number
  readonly count: number
}

export function wholeSink(weight: TrainableWeight): Sink {
  return { weight, first: 0, count: weight.data.shape[0] as number }
}

/** Lets the softmax behind `out` [B,S,G,R,D] and `lse` [B, G·R, S] count the sink. */
export function addSink(ctx: Ctx, { weight, first, count }: Sink, out: Tensor, lse: Tensor): void {
  native.attentionSink(ctx.stream.id, out.handle, lse.handle, weight.data.slice(ctx, 0, first, count).handle)
}

/** Adds to the sink's main gradient; `out` and `lse` as addSink left them. */
export function sinkGradient(ctx: Ctx, sink: Sink, dOut: Tensor, out: Tensor, lse: Tensor): void {
  const { weight, first, count } = sink
  const [B = 0, S = 0] = out.shape
  const rows = ctx.empty([B * S, count], 'float32')
  const part = weight.data.slice(ctx, 0, first, count)
  native.attentionSinkBackward(ctx.stream.id, rows.handle, dOut.handle, out.handle, lse.handle, part.handle)
  native.sumRows(ctx.stream.id, mainGradOf(ctx, weight).slice(ctx, 0, first, count).handle, rows.handle)
}

/** Attention over the queries and keys of `qkv` as they are. */
function attend(ctx: Ctx, args: AttentionArgs, y: Tensor, lse: Tensor): void {
  const { q, k, v } = unpack(ctx, args.qkv, args)
  native.attentionForward(
    ctx.stream.id,
    heads(ctx, y, args).handle,
    lse.handle,
    q.handle,
    k.handle,
    v.handle,
    ...attentionMask(args),
  )
  if (args.sink) addSink(ctx, wholeSink(args.sink), heads(ctx, y, args), lse)
}

/** The gradient of `qkv` as it is, to `dqkv`. */
export function attentionGradient(
  ctx: Ctx,
  args: AttentionArgs,
  dqkv: Tensor,
  dy: Tensor,
  y: Tensor,
  lse: Tensor,
): void {
  const { q, k, v } = unpack(ctx, args.qkv, args)
  const { q: dq, k: dk, v: dv } = unpack(ctx, dqkv, args)
  native.attentionBackward(
    ctx.stream.id,
    dq.handle,
    dk.handle,
    dv.handle,
    heads(ctx, dy, args).handle,
    q.handle,
    k.handle,
    v.handle,
    heads(ctx, y, args).handle,
    lse.handle,
    ...attentionMask(args),
  )
}

/** y[T, G·R·D] = softmax(rotated q · rotated kᵀ · scale) · v. The gradient of qkv is one packed tensor. */
export const attention = defineOp<AttentionArgs, { y: Tensor; lse: Tensor }>({
  name: 'attention',
  shapes(args) {
    const { qkv, batchSize, groups, queriesPerGroup, channels } = args
    checkPacked('attention', qkv, args)
    const tokens = qkv.shape[0] as number
    return {
      y: { shape: [tokens, groups * queriesPerGroup * channels], dtype: qkv.dtype },
      lse: { shape: [batchSize, groups * queriesPerGroup, tokens / batchSize], dtype: 'float32' },
    }
  },
  forward(ctx, args, { y, lse }) {
    if (args.rotary) rotate(ctx, args.qkv, args, args.rotary, false)
    attend(ctx, args, y, lse)
  },
  inputs: ({ qkv }) => [qkv],
  weights: ({ sink }) => [sink],
  saves: ({ qkv, rotary, firstKey, keyEnd, sink }, { y, lse }) => [
    qkv,
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
  remake: (ctx, args, _, [y, lse]) => attend(ctx, args, y as Tensor, lse as Tensor),
  backwardInput(ctx, args, { y, lse }, { y: dy }) {
    if (dy === null) return [null]
    const dqkv = ctx.empty(args.qkv.shape, args.qkv.dtype)
    attentionGradient(ctx, args, dqkv, dy, y, lse)
    if (args.rotary) rotate(ctx, dqkv, args, args.rotary, true)
    return [dqkv]
  },
  backwardWeight(ctx, args, { y, lse }, { y: dy }) {
    if (dy === null || !args.sink?.requiresGrad) return
    sinkGradient(ctx, wholeSink(args.sink), heads(ctx, dy, args), heads(ctx, y, args), lse)
  },
})

export interface CachedAttentionArgs extends AttentionArgs {
  /** [B, maxLength, G, D]; keys of this call are written at `start`. */
  readonly keyCache: Tensor
  /** [B, maxLength, G, D] */
  readonly valueCache: Tensor
  /** Keys that the cache holds already: where the first query stands. */
  readonly start: number
}

/**
 * Attention over a cache that this call extends; for inference only.
 * @throws ERR_UNSUPPORTED under a tape, ERR_SHAPE when the cache is too short.
 */
export function cachedAttention(ctx: Ctx, args: CachedAttentionArgs): Tensor {
  if (ctx.tape !== null) {
    throw new ViaductError(
      'ERR_UNSUPPORTED',
      'cachedAttention',
      'expected no tape, got one: a cache has no backward pass',
    )
  }
  const { qkv, rotary, keyCache, valueCache, start } = args
  const { batchSize: B, groups: G, queriesPerGroup: R, channels: D } = args
  checkPacked('cachedAttention', qkv, args)
  const tokens = qkv.shape[0] as number
  const S = tokens / B
  const length = start + S
  checkShape(length <= (keyCache.shape[1] as number), 'cachedAttention', `a cache of at least ${length} keys`, keyCache)
  if (rotary) rotate(ctx, qkv, args, rotary, false)
  const { q, k, v } = unpack(ctx, qkv, args)
  native.copy(ctx.stream.id, keyCache.slice(ctx, 1, start, S).handle, k.handle)
  native.copy(ctx.stream.id, valueCache.slice(ctx, 1, start, S).handle, v.handle)
  const y = ctx.empty([tokens, G * R * D], qkv.dtype)
  const lse = ctx.empty([B, G * R, S], 'float32')
  native.attentionForward(
    ctx.stream.id,
    heads(ctx, y, args).handle,
    lse.handle,
    q.handle,
    keyCache.slice(ctx, 1, 0, length).handle,
    valueCache.slice(ctx, 1, 0, length).handle,
    ...attentionMask(args, start),
  )
  if (args.sink) addSink(ctx, wholeSink(args.sink), heads(ctx, y, args), lse)
  return y
}
