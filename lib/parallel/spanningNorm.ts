// RMS norm of queries and keys over the channels of all heads of all ranks (OLMoE): in the packed output of linear_qkv, of which each
// rank of tp has its heads. The statistics need every rank's channels, so they are gathered; only this rank's are kept.
// Legend: C channels of all ranks, c of this one; packed memory as in ops/attention.ts.
import { native } from '../addon/load.js'
import { checkShape, defineOp } from '../ops/define.js'
import type { QkNormArgs } from '../ops/qkNorm.js'
import { mainGradOf, type TrainableWeight } from '../ops/weight.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { allGather } from './collectives.js'

/** Weights are this rank's [c]. */
export interface SpanningNormArgs extends QkNormArgs {
  readonly group: Group
}

/** Queries, keys or values of packed memory: [T, G, n·D]. */
function part(
  ctx: Ctx,
  packed: Tensor,
  { groups: G, queriesPerGroup: R, channels: D }: QkNormArgs,
  which: 'q' | 'k' | 'v',
) {
  const row = G * (R + 2) * D
  const [first, count] = which === 'q' ? [0, R] : which === 'k' ? [R, 1] : [R + 1, 1]
  return packed.view(ctx, [packed.shape[0] as number, G, count * D], [row, (R + 2) * D, 1], first * D)
}

/** A contiguous copy of this rank's columns: [T, c]. */
function gathered(ctx: Ctx, x: Tensor): Tensor {
  const [T = 0, G = 0, width = 0] = x.shape
  const copy = ctx.empty(x.shape, x.dtype)
  native.copy(ctx.stream.id, copy.handle, x.handle)
  return copy.reshape(ctx, [T, G * width])
}

/** Columns of all ranks: [T, C]. */
function spanning(ctx: Ctx, own: Tensor, group: Group): Tensor {
  if (group.size === 1) return own
  const [T = 0, c = 0] = own.shape
  const all = allGather(ctx, own, group)
  const whole = ctx.empty([T, group.size, c], own.dtype)
  native.copy(ctx.stream.id, whole.handle, all.view(ctx, [T, group.size, c], [c, T * c, 1]).handle)
  return whole.reshape(ctx, [T, group.size * c])
}

/** This rank's columns of [T, C], in the shape of `like`. */
function ownColumns(ctx: Ctx, whole: Tensor, like: Tensor, group: Group): Tensor {
  const [T = 0, C = 0] = whole.shape
  const [, G = 1, width = 1] = like.shape
  return whole.view(ctx, [T, G, width], [C, width, 1], group.rank * (C / group.size))
}

const wholeWeight = (ctx: Ctx, { data }: TrainableWeight, group: Group) =>
  group.size === 1 ? data : allGather(ctx, data, group).reshape(ctx, [group.size * data.numel])

/** y as qkv, with normalised queries and keys. */
export const spanningNorm = defineOp<SpanningNormArgs, { y: Tensor; rstdQ: Tensor; rstdK: Tensor }>({
  name: 'spanningNorm',
  shapes({ qkv, groups: G, queriesPerGroup: R, channels: D }) {
    const fits = qkv.shape.length === 2 && qkv.shape[1] === G * (R + 2) * D && qkv.isContiguous
    checkShape(fits, 'spanningNorm', `contiguous qkv [T, ${G * (R + 2) * D}]`, qkv)
    const statistics = { shape: [qkv.shape[0] as number], dtype: 'float32' } as const
    return { y: { shape: qkv.shape, dtype: qkv.dtype }, rstdQ: statistics, rstdK: statistics }
  },
  forward(ctx, args, { y, rstdQ, rstdK }) {
    const { qkv, eps, group } = args
    const { id } = ctx.stream
    for (const [which, rstd] of [
      ['q', rstdQ],
      ['k', rstdK],
    ] as const) {
      const x = spanning(ctx, gathered(ctx, part(ctx, qkv, args, which)), group)
      const normed = ctx.empty(x.shape, x.dtype)
      const w = wholeWeight(ctx, args[which], group)
      native.rmsNormForward(id, normed.handle, rstd.handle, 0, x.handle, 0, w.handle, eps, false)
      const to = part(ctx, y, args, which)
      native.copy(id, to.handle, ownColumns(ctx, normed, to, group).handle)
    }
    native.copy(id, part(ctx, y, args, 'v').handle, part(ctx, qkv, args, 'v').handle)
  },
  inputs: ({ qkv }) => [qkv],
  weights: ({ q, k }) => [q, k],
  saves: ({ qkv, q, k }, { rstdQ, rstdK }) => [qkv, q.data, k.data, rstdQ, rstdK],
  backwardInput(ctx, args, { rstdQ, rstdK }, { y: dy }) {
    if (dy === null) return [null]
    const { qkv, group } = args
    const { id } = ctx.stream
    const dqkv = ctx.empty(dy.shape, dy.dtype)
    for (const [which, rstd] of [
      ['q', rstdQ],
      ['k', rstdK],
    ] as const) {
      const x = spanning(ctx, gathered(ctx, part(ctx, qkv, args, which)), group)
      const d = spanning(ctx, gathered(ctx, part(ctx, dy, args, which)), group)
      const dx = ctx.empty(x.shape, x.dtype)
      const w = wholeWeight(ctx, args[which], group)
      native.rmsNormBackwardInput(id, dx.handle, d.handle, x.handle, w.handle, rstd.handle, 0, false)
      const to = part(ctx, dqkv, args, which)
      native.copy(id, to.handle, ownColumns(ctx, dx, to, group).handle)
    }
    native.copy(id, part(ctx, dqkv, args, 'v').handle, part(ctx, dy, args, 'v').handle)
    return [dqkv]
  },
  backwardWeight(ctx, args, { rstdQ, rstdK }, { y: dy }) {
    if (dy === null) return
    for (const [which, rstd] of [
      ['q', rstdQ],
      ['k', rstdK],
    ] as const) {
      if (!args[which].requiresGrad) continue
      const x = gathered(ctx, part(ctx, args.qkv, args, which))
      const d = gathered(ctx, part(ctx, dy, args, which))
      native.rmsNormBackwardWeight(ctx.stream.id, mainGradOf(ctx, args[which]).handle, d.handle, x.handle, rstd.handle)
    }
  },
})
