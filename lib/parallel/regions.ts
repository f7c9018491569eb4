// Conjugate regions of tensor parallelism: what is a copy forward is a sum backward, and the other way round. With one rank
// both are the tensor itself. In place: the tensor that enters a sum must have no other reader.
import { native } from '../addon/load.js'
import { defineOp } from '../ops/define.js'
import { isExclusive } from '../ops/tape.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { allReduce } from './collectives.js'

interface RegionArgs {
  readonly x: Tensor
  readonly group: Group
}

const copyOp = defineOp<RegionArgs, { y: Tensor }>({
  name: 'copyForwardReduceBackward',
  shapes: ({ x }) => ({ y: { inPlace: x } }),
  forward() {},
  inputs: ({ x }) => [x],
  backwardInput(ctx, { group }, _, { y: dy }) {
    if (dy === null) return [null]
    let dx = dy
    if (!isExclusive(dy)) {
      dx = ctx.empty(dy.shape, dy.dtype)
      native.copy(ctx.stream.id, dx.handle, dy.handle)
    }
    allReduce(ctx, dx, group)
    return [dx]
  },
})

const reduceOp = defineOp<RegionArgs, { y: Tensor }>({
  name: 'reduceForwardCopyBackward',
  shapes: ({ x }) => ({ y: { inPlace: x } }),
  forward(ctx, { group }, { y }) {
    allReduce(ctx, y, group)
  },
  inputs: ({ x }) => [x],
  backwardInput: (_ctx, _args, _out, { y: dy }) => [dy],
})

/** The input of column-parallel layers: the same on each rank; its gradient is the sum over the group. */
export function copyForwardReduceBackward(ctx: Ctx, x: Tensor, group: Group): Tensor {
  return group.size === 1 ? x : copyOp(ctx, { x, group }).y
}

/** The output of row-parallel layers: summed over the group, in place; its gradient is the same on each rank. */
export function reduceForwardCopyBackward(ctx: Ctx, x: Tensor, group: Group): Tensor {
  return group.size === 1 ? x : reduceOp(ctx, { x, group }).y
}
