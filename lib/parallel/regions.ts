// Conjugate regions of tensor parallelism: what is a copy forward is a sum backward, and the other way round; with sequence
// parallelism a gather of rows and a sum whose rows are shared out. With one rank all are the tensor itself. The tensor that
// enters a sum must have no other reader. The gather of rows is inside of gatheredLinear.ts.
import { native } from '../addon/load.js'
import { defineOp } from '../ops/define.js'
import { isExclusive } from '../ops/tape.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { allReduce, reduceScatter } from './collectives.js'
import { gatherShared, reduceScatterSharedInto, sharedRows } from './sharedRows.js'

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

const reduceScatterOp = defineOp<RegionArgs, { y: Tensor }>({
  name: 'reduceScatterForwardGatherBackward',
  shapes: ({ x, group }) => ({
    y: { shape: [sharedRows(x.shape[0] as number, group), ...x.shape.slice(1)], dtype: x.dtype },
  }),
  forward: (ctx, { x, group }, { y }) => reduceScatterSharedInto(ctx, y, x, group),
  inputs: ({ x }) => [x],
  backwardInput: (ctx, { x, group }, _, { y: dy }) => [
    dy === null ? null : gatherShared(ctx, dy, x.shape[0] as number, group),
  ],
})

const gatherOp = defineOp<RegionArgs, { y: Tensor }>({
  name: 'gatherForwardReduceScatterBackward',
  shapes: ({ x, group }) => ({
    y: { shape: [group.size * (x.shape[0] as number), ...x.shape.slice(1)], dtype: x.dtype },
  }),
  forward: (ctx, { x, group }, { y }) => native.allGather(group.comm, ctx.stream.id, y.handle, x.handle),
  inputs: ({ x }) => [x],
  backwardInput: (ctx, { group }, _, { y: dy }) => [dy === null ? null : reduceScatter(ctx, dy, group)],
})

/** Every rank's rows, in rank order; gradients are summed and each rank gets that of its own. All have equally many. */
export function gatherForwardReduceScatterBackward(ctx: Ctx, x: Tensor, group: Group): Tensor {
  return group.size === 1 ? x : gatherOp(ctx, { x, group }).y
}

/** The way back: each rank's rows of the sum of all ranks' tensors; gradients are gathered. x is freed. */
export function reduceScatterForwardGatherBackward(ctx: Ctx, x: Tensor, group: Group): Tensor {
  if (group.size === 1) return x
  const { y } = reduceScatterOp(ctx, { x, group })
  x.dispose()
  return y
}

/**
 * The output of row-parallel layers and of the embedding, of which each rank computed a part for all tokens, summed over tp.
 * Whole on each rank and in x's memory; with sequence parallelism each rank gets its run of rows, and x is freed.
 */
export function sumParts(ctx: Ctx, x: Tensor, tp: Group): Tensor {
  if (tp.size === 1) return x
  if (ctx.batch?.sharedTokens === undefined) return reduceOp(ctx, { x, group: tp }).y
  const { y } = reduceScatterOp(ctx, { x, group: tp })
  x.dispose()
  return y
}
