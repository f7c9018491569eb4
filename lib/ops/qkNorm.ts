// RMS norm of queries and keys inside of the packed output of linear_qkv, [T, G·(R+2)·D] (see attention.ts): of each head alone,
// with one weight for all queries and one for all keys. Values pass through. Norms over all heads are in parallel/spanningNorm.ts.
import { native } from '../addon/load.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import type { AttentionShape } from './attention.js'
import { checkShape, defineOp } from './define.js'
import { mainGradOf, type TrainableWeight } from './weight.js'

export interface QkNormArgs extends Omit<AttentionShape, 'batchSize'> {
  /** [T, G·(R+2)·D], contiguous. */
  readonly qkv: Tensor
  /** [D] */
  readonly q: TrainableWeight
  /** [D] */
  readonly k: TrainableWeight
  readonly eps: number
}

/** Views of packed memory by head: queries [T·G, R, D], keys and values [T·G, D]. */
function heads(ctx: Ctx, packed: Tensor, { groups: G, queriesPerGroup: R, channels: D }: Omit<QkNormArgs, 'qkv'>) {
  const rows = (packed.shape[0] as number) * G
  const group = (R + 2) * D
  return {
    q: packed.view(ctx, [rows, R, D], [group, D, 1]),
    k: packed.view(ctx, [rows, D], [group, 1], R * D),
    v: packed.view(ctx, [rows, D], [group, 1], (R + 1) * D),
  }
}

/** y as qkv, with normalised queries and keys. */
export const qkNorm = defineOp<QkNormArgs, { y: Tensor; rstdQ: Tensor; rstdK: Tensor }>({
  name: 'qkNorm',
  shapes({ qkv, groups: G, queriesPerGroup: R, channels: D }) {
    const fits = qkv.shape.length === 2 && qkv.shape[1] === G * (R + 2) * D && qkv.isContiguous
    checkShape(fits, 'qkNorm', `contiguous qkv [T, ${G * (R + 2) * D}]`, qkv)
    const rows = (qkv.shape[0] as number) * G
    return {
      y: { shape: qkv.shape, dtype: qkv.dtype },
      rstdQ: { shape: [rows * R], dtype: 'float32' },
      rstdK: { shape: [rows], dtype: 'float32' },
    }
  },
  forward(ctx, args, { y, rstdQ, rstdK }) {
    const from = heads(ctx, args.qkv, args)
    const to = heads(ctx, y, args)
    const { q, k, eps } = args
    const { id } = ctx.stream
    native.rmsNormForward(id, to.q.handle, rstdQ.handle, 0, from.q.handle, 0, q.data.handle, eps, false)
    native.rmsNormForward(id, to.k.handle, rstdK.handle, 0, from.k.handle, 0, k.data.handle, eps, false)
    native.copy(id, to.v.handle, from.v.handle)
  },
  inputs: ({ qkv }) => [qkv],
  weights: ({ q, k }) => [q, k],
  saves: ({ qkv, q, k }, { rstdQ, rstdK }) => [qkv, q.data, k.data, rstdQ, rstdK],
  backwardInput(ctx, args, { rstdQ, rstdK }, { y: dy }) {
    if (dy === null) return [null]
    const dqkv = ctx.empty(dy.shape, dy.dtype)
    const x = heads(ctx, args.qkv, args)
    const [d, dx] = [heads(ctx, dy, args), heads(ctx, dqkv, args)]
    const { q, k } = args
    const { id } = ctx.stream
    native.rmsNormBackwardInput(id, dx.q.handle, d.q.handle, x.q.handle, q.data.handle, rstdQ.handle, 0, false)
    native.rmsNormBackwardInput(id, dx.k.handle, d.k.handle, x.k.handle, k.data.handle, rstdK.handle, 0, false)
    native.copy(id, dx.v.handle, d.v.handle)
    return [dqkv]
  },
  backwardWeight(ctx, args, { rstdQ, rstdK }, { y: dy }) {
    if (dy === null) return
    const x = heads(ctx, args.qkv, args)
    const d = heads(ctx, dy, args)
    const { id } = ctx.stream
    const { q, k } = args
    if (q.requiresGrad)
      native.rmsNormBackwardWeight(id, mainGradOf(ctx, q).handle, d.q.handle, x.q.handle, rstdQ.handle)
    if (k.requiresGrad)
      native.rmsNormBackwardWeight(id, mainGradOf(ctx, k).handle, d.k.handle, x.k.handle, rstdK.handle)
  },
})
