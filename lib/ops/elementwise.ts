// Elementwise ops and sums. Operands have one shape; nothing broadcasts.
import { native } from '../addon/load.js'
import type { DType } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { type Shape, sameShape } from '../base/shape.js'
import type { Tensor } from '../tensor/tensor.js'
import { checkShape, defineOp } from './define.js'
import { isExclusive } from './tape.js'

/** y = a + b. */
export const add = defineOp<{ readonly a: Tensor; readonly b: Tensor }, { y: Tensor }>({
  name: 'add',
  shapes({ a, b }) {
    checkShape(sameShape(a.shape, b.shape), 'add', 'two tensors of one shape', a, b)
    return { y: { shape: a.shape, dtype: a.dtype } }
  },
  forward: (ctx, { a, b }, { y }) => native.add(ctx.stream.id, y.handle, a.handle, b.handle),
  inputs: ({ a, b }) => [a, b],
  backwardInput: (_ctx, _args, _out, { y: dy }) => [dy, dy],
})

/** y = a · b, element by element. */
export const mul = defineOp<{ readonly a: Tensor; readonly b: Tensor }, { y: Tensor }>({
  name: 'mul',
  shapes({ a, b }) {
    checkShape(sameShape(a.shape, b.shape), 'mul', 'two tensors of one shape', a, b)
    return { y: { shape: a.shape, dtype: a.dtype } }
  },
  forward: (ctx, { a, b }, { y }) => native.mul(ctx.stream.id, y.handle, a.handle, b.handle),
  inputs: ({ a, b }) => [a, b],
  saves: ({ a, b }) => [a, b],
  backwardInput(ctx, { a, b }, _, { y: dy }, [wantA, wantB]) {
    if (dy === null) return [null, null]
    const times = (other: Tensor) => {
      const d = ctx.empty(dy.shape, dy.dtype)
      native.mul(ctx.stream.id, d.handle, dy.handle, other.handle)
      return d
    }
    return [wantA ? times(b) : null, wantB ? times(a) : null]
  },
})

/** y = x · factor[0]; factor is a float32 slot and gets no gradient. */
export const scale = defineOp<{ readonly x: Tensor; readonly factor: Tensor }, { y: Tensor }>({
  name: 'scale',
  shapes: ({ x }) => ({ y: { shape: x.shape, dtype: x.dtype } }),
  forward(ctx, { x, factor }, { y }) {
    native.copy(ctx.stream.id, y.handle, x.handle)
    native.scale(ctx.stream.id, y.handle, factor.handle)
  },
  inputs: ({ x }) => [x],
  saves: ({ factor }) => [factor],
  backwardInput(ctx, { factor }, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = isExclusive(dy) ? dy : ctx.empty(dy.shape, dy.dtype)
    if (dx !== dy) native.copy(ctx.stream.id, dx.handle, dy.handle)
    native.scale(ctx.stream.id, dx.handle, factor.handle)
    return [dx]
  },
})

/** y = x between -limit and limit. The gradient passes where x is no further out. */
export const clip = defineOp<{ readonly x: Tensor; readonly limit: number }, { y: Tensor }>({
  name: 'clip',
  shapes: ({ x }) => ({ y: { shape: x.shape, dtype: x.dtype } }),
  forward: (ctx, { x, limit }, { y }) => native.clamp(ctx.stream.id, y.handle, x.handle, -limit, limit),
  inputs: ({ x }) => [x],
  saves: ({ x }) => [x],
  backwardInput(ctx, { x, limit }, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = isExclusive(dy) ? dy : ctx.empty(dy.shape, dy.dtype)
    native.clampBackward(ctx.stream.id, dx.handle, dy.handle, x.handle, -limit, limit)
    return [dx]
  },
})

/** A contiguous copy in another or the same float dtype; the gradient comes back in x's dtype. */
export const cast = defineOp<{ readonly x: Tensor; readonly dtype: DType }, { y: Tensor }>({
  name: 'cast',
  shapes: ({ x, dtype }) => ({ y: { shape: x.shape, dtype } }),
  forward: (ctx, { x }, { y }) => native.copy(ctx.stream.id, y.handle, x.handle),
  inputs: ({ x }) => [x],
  backwardInput(ctx, { x }, _, { y: dy }) {
    if (dy === null || dy.dtype === x.dtype) return [dy]
    const dx = ctx.empty(x.shape, x.dtype)
    native.copy(ctx.stream.id, dx.handle, dy.handle)
    return [dx]
  },
})

/** The same memory under another shape. @throws ERR_SHAPE, or ERR_LAYOUT when x is not contiguous. */
export const reshape = defineOp<{ readonly x: Tensor; readonly shape: Shape }, { y: Tensor }>({
  name: 'reshape',
  shapes({ x, shape }) {
    if (!x.isContiguous) {
      throw new ViaductError('ERR_LAYOUT', 'reshape', `expected a contiguous tensor, got ${x}: copy it first`)
    }
    return { y: { inPlace: x, shape } }
  },
  forward() {},
  inputs: ({ x }) => [x],
  backwardInput: (ctx, { x }, _, { y: dy }) => [dy === null ? null : dy.reshape(ctx, x.shape)],
})

/** y[0] = sum of x, float32. */
export const sum = defineOp<{ readonly x: Tensor }, { y: Tensor }>({
  name: 'sum',
  shapes: () => ({ y: { shape: [1], dtype: 'float32' } }),
  forward: (ctx, { x }, { y }) => native.sum(ctx.stream.id, y.handle, x.handle),
  inputs: ({ x }) => [x],
  backwardInput(ctx, { x }, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = ctx.empty(x.shape, x.dtype)
    native.fill(ctx.stream.id, dx.handle, 1)
    native.scale(ctx.stream.id, dx.handle, dy.handle)
    return [dx]
  },
})
