// Matrix products. T: tokens, K: input channels, N: output channels; weights are [N, K] as in PyTorch and Megatron.
import { native } from '../addon/load.js'
import type { DType } from '../base/dtype.js'
import type { Shape } from '../base/shape.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { type Activation, type ActivationArgs, activation, activationCodes } from './activation.js'
import { checkShape, defineOp } from './define.js'
import { mainGradOf, type TrainableWeight } from './weight.js'

export interface LinearArgs {
  /** [T, K] */
  readonly x: Tensor
  /** [N, K] */
  readonly weight: TrainableWeight
  /** [N] */
  readonly bias?: TrainableWeight | null
}

/** y[T, N] = x · weightᵀ + bias, in x's dtype. */
export const linear = defineOp<LinearArgs, { y: Tensor }>({
  name: 'linear',
  shapes({ x, weight }) {
    const w = weight.data
    checkShape(x.shape.length === 2 && x.shape[1] === w.shape[1], 'linear', 'x [T, K] and weight [N, K]', x, w)
    return { y: { shape: [x.shape[0] as number, w.shape[0] as number], dtype: x.dtype } }
  },
  forward(ctx, { x, weight, bias }, { y }) {
    native.matmul(
      ctx.stream.id,
      y.handle,
      x.handle,
      weight.data.handle,
      bias ? bias.data.handle : 0,
      false,
      true,
      false,
    )
  },
  inputs: ({ x }) => [x],
  weights: ({ weight, bias }) => [weight, bias],
  saves: ({ x, weight }) => [weight.requiresGrad ? x : null, weight.data],
  backwardInput(ctx, { x, weight }, _, { y: dy }, [wanted]) {
    if (!wanted || dy === null) return [null]
    const w = weight.data
    const dx = ctx.empty([dy.shape[0] as number, w.shape[1] as number], x.dtype)
    native.matmul(ctx.stream.id, dx.handle, dy.handle, w.handle, 0, false, false, false)
    return [dx]
  },
  backwardWeight(ctx, { x, weight, bias }, _, { y: dy }) {
    if (dy === null) return
    if (weight.requiresGrad) {
      const dw = mainGradOf(ctx, weight)
      native.matmul(ctx.stream.id, dw.handle, dy.handle, x.handle, 0, true, false, true)
    }
    if (bias?.requiresGrad) native.sumRows(ctx.stream.id, mainGradOf(ctx, bias).handle, dy.handle)
  },
})

/** Calls f with float32 copies, which are freed behind it; with the tensors themselves where they are float32. */
function withFloat32(ctx: Ctx, tensors: readonly Tensor[], f: (...wide: Tensor[]) => void): void {
  using scope = new Scope()
  const inner = ctx.with({ scope })
  f(
    ...tensors.map((t) => {
      if (t.dtype === 'float32') return t
      const copy = inner.empty(t.shape, 'float32')
      native.copy(ctx.stream.id, copy.handle, t.handle)
      return copy
    }),
  )
}

/** y float32 [T, N] = x · weightᵀ, of float32 copies of both. */
export const linearFloat32 = defineOp<Omit<LinearArgs, 'bias'>, { y: Tensor }>({
  name: 'linearFloat32',
  shapes: (args) => ({ y: { shape: (linear.rule.shapes(args).y as { shape: Shape }).shape, dtype: 'float32' } }),
  forward: (ctx, { x, weight }, { y }) =>
    withFloat32(ctx, [x, weight.data], (input, w) =>
      native.matmul(ctx.stream.id, y.handle, input.handle, w.handle, 0, false, true, false),
    ),
  inputs: ({ x }) => [x],
  weights: ({ weight }) => [weight],
  saves: ({ x, weight }) => [weight.requiresGrad ? x : null, weight.data],
  backwardInput(ctx, { x, weight }, _, { y: dy }, [wanted]) {
    if (!wanted || dy === null) return [null]
    const dx = ctx.empty(x.shape, x.dtype)
    const exact = x.dtype === 'float32' ? dx : ctx.empty(x.shape, 'float32')
    withFloat32(ctx, [weight.data], (w) =>
      native.matmul(ctx.stream.id, exact.handle, dy.handle, w.handle, 0, false, false, false),
    )
    if (exact !== dx) native.copy(ctx.stream.id, dx.handle, exact.handle)
    return [dx]
  },
  backwardWeight(ctx, { x, weight }, _, { y: dy }) {
    if (dy === null || !weight.requiresGrad) return
    const dw = mainGradOf(ctx, weight)
    withFloat32(ctx, [x], (input) =>
      native.matmul(ctx.stream.id, dw.handle, dy.handle, input.handle, 0, true, false, true),
    )
  },
})

export interface AddBiasArgs {
  /** [T, N]; overwritten. */
  readonly x: Tensor
  readonly bias: TrainableWeight
}

/** x += bias, in place: after the reduction of a row-parallel product. */
export const addBias = defineOp<AddBiasArgs, { y: Tensor }>({
  name: 'addBias',
  shapes({ x, bias }) {
    checkShape(
      x.shape.length === 2 && x.shape[1] === bias.data.shape[0],
      'addBias',
      'x [T, N] and bias [N]',
      x,
      bias.data,
    )
    return { y: { inPlace: x } }
  },
  forward(ctx, { x, bias }, { y }) {
    native.addBias(ctx.stream.id, y.handle, x.handle, bias.data.handle)
  },
  inputs: ({ x }) => [x],
  weights: ({ bias }) => [bias],
  backwardInput: (_ctx, _args, _out, { y: dy }) => [dy],
  backwardWeight(ctx, { bias }, _, { y: dy }) {
    if (dy !== null) native.sumRows(ctx.stream.id, mainGradOf(ctx, bias).handle, dy.handle)
  },
})

interface ActingArgs extends LinearArgs {
  readonly kind: Activation
}

interface ActedArgs extends ActingArgs {
  /** [T, N]: the product ends with the function, whose values go here. */
  readonly acted: Tensor
}

/** `linear` as far as its result and gradients go; besides it fills `acted`. */
const linearActing = defineOp<ActedArgs, { y: Tensor }>({
  ...linear.rule,
  name: 'linearActing',
  forward: (ctx, args, { y }) => actInto(ctx, args.acted, y, args),
})

/** `activation` of x, whose values are there already. */
const activationGiven = defineOp<ActivationArgs & { readonly acted: Tensor }, { y: Tensor }>({
  ...activation.rule,
  name: 'activationGiven',
  shapes: ({ acted }) => ({ y: { inPlace: acted } }),
  forward: () => {},
})

function actInto(ctx: Ctx, y: Tensor, pre: Tensor | null, { x, weight, bias, kind }: ActingArgs) {
  native.matmulActivation(
    ctx.stream.id,
    y.handle,
    pre?.handle ?? 0,
    x.handle,
    weight.data.handle,
    bias?.data.handle ?? 0,
    activationCodes[kind],
  )
}

/** act(x · weightᵀ + bias) [T, N], in one product where the device has it. */
export function linearActivation(ctx: Ctx, args: ActingArgs): Tensor {
  const { y: spec } = linear.rule.shapes(args) as { y: { shape: Shape; dtype: DType } }
  const acted = ctx.empty(spec.shape, spec.dtype)
  if (ctx.tape === null) {
    actInto(ctx, acted, null, args)
    return acted
  }
  const x = linearActing(ctx, { ...args, acted }).y
  return activationGiven(ctx, { x, kind: args.kind, acted }).y
}
