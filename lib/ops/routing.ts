// Tokens to experts and back. A router scores E experts for each of T tokens and chooses K of them; rows are sorted by expert, pass
// through the experts' matrices as one tensor, and are summed up again by token.
// Legend: H channels, N rows on their way (T·K on one rank), place [T, K]: the row of a token's choice, source [N]: the other way round.
import { native } from '../addon/load.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { checkShape, defineOp } from './define.js'
import { mainGradOf, type TrainableWeight } from './weight.js'

export interface RouteArgs {
  /** [T, E] */
  readonly logits: Tensor
  /** Experts of a token, K. */
  readonly topk: number
  /** Each score by itself instead of a softmax over all experts. */
  readonly sigmoid?: boolean
  /** Weights of the chosen experts sum up to 1 before scaling. A softmax over the chosen alone gives the same. */
  readonly normalize: boolean
  /** float32 [E], added for the choice alone. */
  readonly bias?: Tensor | null
  /** Neighbouring experts in so many groups, of which groupTopk can be chosen from. Default 1. */
  readonly groups?: number
  readonly groupTopk?: number
  /** Factor of the weights. Default 1. */
  readonly scaling?: number
}

/** weights float32 [T, K], experts int32 [T, K] the best first, scores float32 [T, E]. The choice itself has no gradient. */
export const route = defineOp<RouteArgs, { weights: Tensor; experts: Tensor; scores: Tensor }>({
  name: 'route',
  shapes({ logits, topk }) {
    checkShape(logits.shape.length === 2, 'route', 'logits [T, E]', logits)
    const chosen = [logits.shape[0] as number, topk]
    return {
      weights: { shape: chosen, dtype: 'float32' },
      experts: { shape: chosen, dtype: 'int32' },
      scores: { shape: logits.shape, dtype: 'float32' },
    }
  },
  forward(ctx, args, { weights, experts, scores }) {
    const { logits, bias, sigmoid = false, normalize, groups = 1, groupTopk = 1, scaling = 1 } = args
    native.routerForward(
      ctx.stream.id,
      weights.handle,
      experts.handle,
      scores.handle,
      logits.handle,
      bias?.handle ?? 0,
      sigmoid,
      normalize,
      groups,
      groupTopk,
      scaling,
    )
  },
  inputs: ({ logits }) => [logits],
  saves: (_, { experts, scores }) => [experts, scores],
  backwardInput(ctx, args, { experts, scores }, { weights: dWeights, scores: dScores }) {
    if (dWeights === null && dScores === null) return [null]
    const { logits, sigmoid = false, normalize, scaling = 1 } = args
    const dLogits = ctx.empty(logits.shape, logits.dtype)
    native.routerBackward(
      ctx.stream.id,
      dLogits.handle,
      dWeights?.handle ?? 0,
      dScores?.handle ?? 0,
      experts.handle,
      scores.handle,
      sigmoid,
      normalize,
      scaling,
    )
    return [dLogits]
  },
})

export interface SpreadArgs {
  /** [T, H] */
  readonly x: Tensor
  /** int32 [N]: t·K + k of each row. */
  readonly source: Tensor
  /** int32 [T, K], of all rows; `first` is the place of this tensor's first row. */
  readonly place: Tensor
  readonly first?: number
}

/** y[N, H]: the rows of the chosen experts, each a token's. Rows of a token add up in its gradient. */
export const spread = defineOp<SpreadArgs, { y: Tensor }>({
  name: 'spread',
  shapes({ x, source, place }) {
    checkShape(
      x.shape.length === 2 && place.shape.length === 2 && place.shape[0] === x.shape[0],
      'spread',
      'x [T, H] and place [T, K]',
      x,
      place,
    )
    return { y: { shape: [source.numel, x.shape[1] as number], dtype: x.dtype } }
  },
  forward(ctx, { x, source, place }, { y }) {
    native.spreadRows(ctx.stream.id, y.handle, x.handle, source.handle, 0, place.shape[1] as number)
  },
  inputs: ({ x }) => [x],
  saves: ({ place }) => [place],
  backwardInput(ctx, { x, place, first = 0 }, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = ctx.empty(x.shape, x.dtype)
    native.combineRows(ctx.stream.id, dx.handle, dy.handle, place.handle, 0, first)
    return [dx]
  },
})

export interface CombineArgs {
  /** [N, H] */
  readonly x: Tensor
  /** float32 [T, K] */
  readonly weights: Tensor
  readonly source: Tensor
  readonly place: Tensor
  readonly first?: number
}

/** y[T, H] = sum of weights · rows over each token's choices; choices whose row is not in x count as zeros. */
export const combine = defineOp<CombineArgs, { y: Tensor }>({
  name: 'combine',
  shapes({ x, place }) {
    checkShape(x.shape.length === 2 && place.shape.length === 2, 'combine', 'x [N, H] and place [T, K]', x, place)
    return { y: { shape: [place.shape[0] as number, x.shape[1] as number], dtype: x.dtype } }
  },
  forward(ctx, { x, weights, place, first = 0 }, { y }) {
    native.combineRows(ctx.stream.id, y.handle, x.handle, place.handle, weights.handle, first)
  },
  inputs: ({ x, weights }) => [x, weights],
  saves: ({ x, weights, source, place }) => [x, weights, source, place],
  backwardInput(ctx, { x, weights, source, place, first = 0 }, _, { y: dy }, [wantX, wantWeights]) {
    if (dy === null) return [null, null]
    const { id } = ctx.stream
    let dx: Tensor | null = null
    let dWeights: Tensor | null = null
    if (wantWeights) {
      dWeights = ctx.empty(weights.shape, 'float32')
      native.combineRowsBackwardWeights(id, dWeights.handle, dy.handle, x.handle, place.handle, first)
    }
    if (wantX) {
      dx = ctx.empty(x.shape, x.dtype)
      native.spreadRows(id, dx.handle, dy.handle, source.handle, weights.handle, place.shape[1] as number)
    }
    return [dx, dWeights]
  },
})

export interface GroupedLinearArgs {
  /** [N, K]: the rows of expert 0, then of expert 1, … */
  readonly x: Tensor
  /** Of each expert, [M, K]. */
  readonly weights: readonly TrainableWeight[]
  /** Rows of each expert; their sum is N. */
  readonly counts: readonly number[]
}

/** y[N, M]: each expert's rows times its weight transposed. */
export const groupedLinear = defineOp<GroupedLinearArgs, { y: Tensor }>({
  name: 'groupedLinear',
  shapes({ x, weights }) {
    const w = (weights[0] as TrainableWeight).data
    checkShape(x.shape.length === 2 && x.shape[1] === w.shape[1], 'groupedLinear', 'x [N, K] and weights [M, K]', x, w)
    return { y: { shape: [x.shape[0] as number, w.shape[0] as number], dtype: x.dtype } }
  },
  forward(ctx, { x, weights, counts }, { y }) {
    const handles = weights.map(({ data }) => data.handle)
    native.groupedMatmul(ctx.stream.id, y.handle, x.handle, handles, [...counts], true)
  },
  inputs: ({ x }) => [x],
  weights: ({ weights }) => weights,
  saves: ({ x, weights }) => [weights.some((w) => w.requiresGrad) ? x : null, ...weights.map((w) => w.data)],
  backwardInput(ctx, { x, weights, counts }, _, { y: dy }, [wanted]) {
    if (!wanted || dy === null) return [null]
    const dx = ctx.empty(x.shape, x.dtype)
    const handles = weights.map(({ data }) => data.handle)
    native.groupedMatmul(ctx.stream.id, dx.handle, dy.handle, handles, [...counts], false)
    return [dx]
  },
  backwardWeight(ctx, { x, weights, counts }, _, { y: dy }) {
    if (dy === null || !weights[0]?.requiresGrad) return
    const handles = weights.map((weight) => mainGradOf(ctx, weight).handle)
    native.groupedMatmulWeights(ctx.stream.id, handles, dy.handle, x.handle, [...counts])
  },
})

/**
 * The experts, int32 [T, K], with `numExperts` for choices beyond the capacity of their expert.
 * @param weights - float32 [T, K]: the heaviest choices are kept; null: the first ones.
 */
export function capExperts(
  ctx: Ctx,
  experts: Tensor,
  { numExperts, capacity, weights }: { numExperts: number; capacity: number; weights: Tensor | null },
): Tensor {
  const capped = ctx.empty(experts.shape, 'int32')
  native.capExperts(ctx.stream.id, capped.handle, experts.handle, weights?.handle ?? 0, numExperts, capacity)
  return capped
}

/** How often each expert was chosen, float32 [runs, E], of each of so many equal runs of tokens. */
export function expertCounts(ctx: Ctx, experts: Tensor, numExperts: number, runs = 1): Tensor {
  const counts = ctx.empty([runs, numExperts], 'float32')
  native.expertCounts(ctx.stream.id, counts.handle, experts.handle)
  return counts
}

/** Rows by expert: source int32 [T·K] and place int32 [T, K]. */
export function expertOrder(ctx: Ctx, experts: Tensor, numExperts: number): { source: Tensor; place: Tensor } {
  const source = ctx.empty([experts.numel], 'int32')
  const place = ctx.empty(experts.shape, 'int32')
  native.expertOrder(ctx.stream.id, source.handle, place.handle, experts.handle, numExperts)
  return { source, place }
}

/**
 * Rows by expert with as many places for each: source int32 [E·capacity], -1 where no row is, and place int32 [T, K], E·capacity for
 * choices of no expert and beyond the capacity.
 */
export function expertSlots(
  ctx: Ctx,
  experts: Tensor,
  { numExperts, capacity }: { numExperts: number; capacity: number },
): { source: Tensor; place: Tensor } {
  const source = ctx.empty([numExperts * capacity], 'int32')
  const place = ctx.empty(experts.shape, 'int32')
  native.expertSlots(ctx.stream.id, source.handle, place.handle, experts.handle, numExperts, capacity)
  return { source, place }
}
