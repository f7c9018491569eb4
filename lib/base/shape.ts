// Shapes and strides, in elements. Pure functions; nothing here knows dtypes or memory.
import { ViaductError } from './errors.js'

/** Dimensions of a tensor, outermost first. */
export type Shape = readonly number[]

/** Number of elements; 1 for a scalar. */
export function numel(shape: Shape): number {
  let n = 1
  for (const dim of shape) n *= dim
  return n
}

/** Row-major strides without gaps. */
export function contiguousStrides(shape: Shape): number[] {
  const strides = new Array<number>(shape.length)
  let step = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = step
    step *= Math.max(shape[i] as number, 1)
  }
  return strides
}

/** True if `strides` are row-major without gaps; dims of size 1 may have any stride. */
export function isContiguous(shape: Shape, strides: readonly number[]): boolean {
  let step = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    const dim = shape[i] as number
    if (dim !== 1 && strides[i] !== step) return false
    step *= dim
  }
  return true
}

/** Equal rank and dimensions. */
export function sameShape(a: Shape, b: Shape): boolean {
  return a.length === b.length && a.every((dim, i) => dim === b[i])
}

/** `[2, 3]`, for messages. */
export function formatShape(shape: Shape): string {
  return `[${shape.join(', ')}]`
}

/**
 * `dim` counted from the end when negative.
 * @throws ERR_SHAPE when it is out of range.
 */
export function resolveDim(dim: number, rank: number, where: string): number {
  const resolved = dim < 0 ? rank + dim : dim
  if (Number.isInteger(resolved) && resolved >= 0 && resolved < rank) return resolved
  throw new ViaductError('ERR_SHAPE', where, `expected a dimension of ${-rank} to ${rank - 1}, got ${dim}`)
}

/**
 * The shape that `wanted` means for `elements` elements; one entry may be -1: what is left.
 * @throws ERR_SHAPE when the numbers of elements differ.
 */
export function resolveShape(wanted: Shape, elements: number, where: string): number[] {
  const open = wanted.indexOf(-1)
  const shape = [...wanted]
  if (open >= 0) {
    const others = numel(wanted) / -1
    shape[open] = others === 0 ? 0 : elements / others
  }
  const whole = shape.every((dim) => Number.isInteger(dim) && dim >= 0)
  if (whole && numel(shape) === elements) return shape
  throw new ViaductError('ERR_SHAPE', where, `expected a shape of ${elements} elements, got ${formatShape(wanted)}`)
}
