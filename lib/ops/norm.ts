// Normalisation over channels. T: tokens, H: channels. The residual addition of a pre-norm block is part of the RMS norm: one pass
// over memory forward and one backward. Statistics are float32 [T].
import { native } from '../addon/load.js'
import type { Tensor } from '../tensor/tensor.js'
import { checkShape, defineOp } from './define.js'
import { isExclusive } from './tape.js'
import { mainGradOf, type TrainableWeight } from './weight.js'

export interface RmsNormArgs {
  /** [T, H] */
  readonly x: Tensor
  /** [T, H], added to x before the norm. */
  readonly residual?: Tensor | null
  /** [H] */
  readonly weight: TrainableWeight
  readonly eps: number
  /** The weight is stored less 1. Default false. */
  readonly zeroCentered?: boolean
}

/** h = x + residual; y = h / sqrt(mean(h²) + eps) · weight. `sum` is h; without a residual it is x's memory. */
export const rmsNorm = defineOp<RmsNormArgs, { y: Tensor; rstd: Tensor; sum: Tensor }>({
  name: 'rmsNorm',
  shapes({ x, residual, weight }) {
    const { shape, dtype } = x
    checkShape(
      shape.length === 2 && shape[1] === weight.data.shape[0],
      'rmsNorm',
      'x [T, H] and weight [H]',
      x,
      weight.data,
    )
    return {
      y: { shape, dtype },
      rstd: { shape: [shape[0] as number], dtype: 'float32' },
      sum: residual ? { shape, dtype } : { inPlace: x },
    }
  },
  forward(ctx, { x, residual, weight, eps, zeroCentered }, { y, rstd, sum }) {
    native.rmsNormForward(
      ctx.stream.id,
      y.handle,
      rstd.handle,
      residual ? sum.handle : 0,
      x.handle,
      residual?.handle ?? 0,
      weight.data.handle,
      eps,
      zeroCentered ?? false,
    )
  },
  inputs: ({ x, residual }) => [x, residual],
  weights: ({ weight }) => [weight],
  saves: ({ x, residual, weight }, { rstd, sum }) => [residual ? sum : x, rstd, weight.data],
  remade: ({ y }) => [y],
  remake(ctx, { x, residual, weight, eps, zeroCentered }, { rstd, sum }, [y]) {
    const again = ctx.empty(rstd.shape, rstd.dtype)
    native.rmsNormForward(
      ctx.stream.id,
      (y as Tensor).handle,
      again.handle,
      0,
      (residual ? sum : x).handle,
      0,
      weight.data.handle,
      eps,
      zeroCentered ?? false,
    )
    again.dispose()
  },
  backwardInput(ctx, { x, residual, weight, zeroCentered }, { rstd, sum }, { y: dy, sum: dSum }) {
    if (dy === null) return [dSum, dSum]
    // The gradient that passes by the norm is added in the same pass, in its memory when nobody else reads it.
    const dh = dSum !== null && isExclusive(dSum) ? dSum : ctx.empty(dy.shape, dy.dtype)
    native.rmsNormBackwardInput(
      ctx.stream.id,
      dh.handle,
      dy.handle,
      (residual ? sum : x).handle,
      weight.data.handle,
      rstd.handle,
      dSum?.handle ?? 0,
      zeroCentered ?? false,
    )
    return [dh, dh]
  },
  backwardWeight(ctx, { x, residual, weight }, { rstd, sum }, { y: dy }) {
    if (dy === null) return
    native.rmsNormBackwardWeight(
      ctx.stream.id,
      mainGradOf(ctx, weight).handle,
      dy.handle,
      (residual ? sum : x).handle,
      rstd.handle,
    )
  },
})

export interface LayerNormArgs {
  /** [T, H] */
  readonly x: Tensor
  /** [H] */
  readonly weight: TrainableWeight
  /** [H] */
  readonly bias?: TrainableWeight | null
  readonly eps: number
  readonly zeroCentered?: boolean
}

/** y = (x - mean) / sqrt(variance + eps) · weight + bias. */
export const layerNorm = defineOp<LayerNormArgs, { y: Tensor; mean: Tensor; rstd: Tensor }>({
  name: 'layerNorm',
  shapes({ x, weight }) {
    const { shape, dtype } = x
    checkShape(
      shape.length === 2 && shape[1] === weight.data.shape[0],
      'layerNorm',
      'x [T, H] and weight [H]',
      x,
      weight.data,
    )
    const statistics = { shape: [shape[0] as number], dtype: 'float32' } as const
    return { y: { shape, dtype }, mean: statistics, rstd: statistics }
  },
  forward(ctx, { x, weight, bias, eps, zeroCentered }, { y, mean, rstd }) {
    native.layerNormForward(
      ctx.stream.id,
      y.handle,
      mean.handle,
      rstd.handle,
      x.handle,
      weight.data.handle,
      bias?.data.handle ?? 0,
      eps,
      zeroCentered ?? false,
    )
  },
  inputs: ({ x }) => [x],
  weights: ({ weight, bias }) => [weight, bias],
  saves: ({ x, weight }, { mean, rstd }) => [x, mean, rstd, weight.data],
  remade: ({ y }) => [y],
  remake(ctx, { x, weight, bias, eps, zeroCentered }, { rstd }, [y]) {
    const statistics = [ctx.empty(rstd.shape, rstd.dtype), ctx.empty(rstd.shape, rstd.dtype)] as const
    native.layerNormForward(
      ctx.stream.id,
      (y as Tensor).handle,
      statistics[0].handle,
      statistics[1].handle,
      x.handle,
      weight.data.handle,
      bias?.data.handle ?? 0,
      eps,
      zeroCentered ?? false,
    )
    for (const t of statistics) t.dispose()
  },
  backwardInput(ctx, { x, weight, zeroCentered }, { mean, rstd }, { y: dy }) {
    if (dy === null) return [null]
    const dx = ctx.empty(dy.shape, dy.dtype)
    native.layerNormBackwardInput(
      ctx.stream.id,
      dx.handle,
      dy.handle,
      x.handle,
      weight.data.handle,
      mean.handle,
      rstd.handle,
      zeroCentered ?? false,
    )
    return [dx]
  },
  backwardWeight(ctx, { x, weight, bias }, { mean, rstd }, { y: dy }) {
    if (dy === null) return
    if (!weight.requiresGrad) {
      if (bias?.requiresGrad) native.sumRows(ctx.stream.id, mainGradOf(ctx, bias).handle, dy.handle)
      return
    }
    const dBias = bias?.requiresGrad ? mainGradOf(ctx, bias).handle : 0
    native.layerNormBackwardWeight(
      ctx.stream.id,
      mainGradOf(ctx, weight).handle,
      dBias,
      dy.handle,
      x.handle,
      mean.handle,
      rstd.handle,
    )
  },
})
