// Activations, plain and gated. F: channels after the gate. Gated input is [T, 2F], the gate first, then up.
import { native } from '../addon/load.js'
import type { Tensor } from '../tensor/tensor.js'
import { checkShape, defineOp } from './define.js'
import { isExclusive } from './tape.js'

/** Codes of `enum class Activation` in native/backend.h. */
export const activationCodes = { silu: 0, gelu: 1, gelu_tanh: 2, relu: 3, relu2: 4, quick_gelu: 5, sigmoid: 6 } as const

/** `gelu` is exact (erf), `gelu_tanh` the approximation, `relu2` the squared relu, `quick_gelu` x · sigmoid(1.702 x). */
export type Activation = keyof typeof activationCodes

export interface ActivationArgs {
  readonly x: Tensor
  readonly kind: Activation
}

/** y[T, F] = act(x[:, :F]) · x[:, F:]. Its backward pass overwrites x when nobody else holds it. */
export const gatedActivation = defineOp<ActivationArgs, { y: Tensor }>({
  name: 'gatedActivation',
  shapes({ x }) {
    const [tokens = 0, width = 1] = x.shape
    checkShape(x.shape.length === 2 && width % 2 === 0, 'gatedActivation', 'x [T, 2F]', x)
    return { y: { shape: [tokens, width / 2], dtype: x.dtype } }
  },
  forward(ctx, { x, kind }, { y }) {
    native.gatedActivationForward(ctx.stream.id, y.handle, x.handle, activationCodes[kind])
  },
  inputs: ({ x }) => [x],
  saves: ({ x }) => [x],
  remade: ({ y }) => [y],
  remake(ctx, { x, kind }, _, [y]) {
    native.gatedActivationForward(ctx.stream.id, (y as Tensor).handle, x.handle, activationCodes[kind])
  },
  backwardInput(ctx, { x, kind }, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = isExclusive(x) ? x : ctx.empty(x.shape, x.dtype)
    native.gatedActivationBackward(ctx.stream.id, dx.handle, dy.handle, x.handle, activationCodes[kind])
    return [dx]
  },
})

/** y = act(x), any shape. Its backward pass overwrites x when nobody else holds it. */
export const activation = defineOp<ActivationArgs, { y: Tensor }>({
  name: 'activation',
  shapes: ({ x }) => ({ y: { shape: x.shape, dtype: x.dtype } }),
  forward(ctx, { x, kind }, { y }) {
    native.activationForward(ctx.stream.id, y.handle, x.handle, activationCodes[kind])
  },
  inputs: ({ x }) => [x],
  saves: ({ x }) => [x],
  backwardInput(ctx, { x, kind }, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = isExclusive(x) ? x : ctx.empty(x.shape, x.dtype)
    native.activationBackward(ctx.stream.id, dx.handle, dy.handle, x.handle, activationCodes[kind])
    return [dx]
  },
})
