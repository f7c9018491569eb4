// What trains a router besides the loss of the model: balance of its experts, size of its logits; and noise on what it reads. These
// losses have no value in the pass: their gradients join those that pass by, and the value is told to an accumulator then, so that it
// counts once where a layer runs again. Legend: E experts, K of a token, rows: this rank's tokens, some of which fill up.
import { native } from '../addon/load.js'
import { ViaductError } from '../base/errors.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { defineOp } from './define.js'

/** Where a loss is summed up: float32 [1], and the factor of what is added. */
export interface Told {
  readonly into: Tensor
  readonly factor: number
}

/** Which token the first row is, and how many tokens there are: rows past the last one count nowhere. */
export interface RowPlace {
  readonly first: number
  readonly tokens: number
}

function slotOf(ctx: Ctx, value: number): Tensor {
  const slot = ctx.empty([1], 'float32')
  native.fill(ctx.stream.id, slot.handle, value)
  return slot
}

/** Adds the sum of float32 numbers to an accumulator. */
function tell(ctx: Ctx, { into, factor }: Told, values: Tensor): void {
  const sum = ctx.empty([1], 'float32')
  native.sum(ctx.stream.id, sum.handle, values.handle)
  native.scale(ctx.stream.id, sum.handle, slotOf(ctx, factor).handle)
  native.accumulate(ctx.stream.id, into.handle, sum.handle)
}

export interface BalanceArgs extends RowPlace {
  /** float32 [rows, K], passed through: where the gradient of the loss gets into the backward pass. */
  readonly weights: Tensor
  /** float32 [rows, E] */
  readonly scores: Tensor
  /** float32 [R, E]: how often each expert was chosen, of each of R equal runs of all tokens. */
  readonly counts: Tensor
  /** Gradient of a score, per choice of its expert among its run. */
  readonly factor: number
  /** The loss looks at scores over their sum. Default false. */
  readonly normalize?: boolean
  readonly told?: Told | null
}

/**
 * Adds the gradient of a balance loss to that of the scores. The loss is factor · sum over tokens and experts of counts · scores, of
 * the run of the token; the choice has no gradient.
 */
export const balance = defineOp<BalanceArgs, { weights: Tensor }>({
  name: 'balance',
  shapes: ({ weights }) => ({ weights: { inPlace: weights } }),
  forward() {},
  inputs: ({ weights, scores }) => [weights, scores],
  saves: ({ counts, scores }) => [counts, scores],
  backwardInput(ctx, args, _, { weights: dWeights }, [, wanted]) {
    if (!wanted) return [dWeights, null]
    const { scores, counts, factor, first, tokens, normalize = false, told } = args
    const dScores = ctx.empty(scores.shape, 'float32')
    const losses = ctx.empty([scores.shape[0] as number], 'float32')
    native.balanceScores(
      ctx.stream.id,
      dScores.handle,
      losses.handle,
      scores.handle,
      counts.handle,
      first,
      tokens,
      factor,
      normalize,
    )
    if (told) tell(ctx, told, losses)
    return [dWeights, dScores]
  },
})

export interface ZLossArgs extends RowPlace {
  /** [rows, E], passed through. */
  readonly logits: Tensor
  /** The loss is this times the square of each token's log-sum-exp. */
  readonly coefficient: number
  readonly told?: Told | null
}

/** Adds the gradient of the loss that keeps a router's logits small. */
export const zLoss = defineOp<ZLossArgs, { logits: Tensor }>({
  name: 'zLoss',
  shapes: ({ logits }) => ({ logits: { inPlace: logits } }),
  forward() {},
  inputs: ({ logits }) => [logits],
  saves: ({ logits }) => [logits],
  backwardInput(ctx, { logits, coefficient, first, tokens, told }, _, { logits: d }) {
    if (d === null) return [null]
    const [rows = 0, E = 0] = logits.shape
    const { id } = ctx.stream
    const row = () => ctx.empty([rows], 'float32')
    const [stats, lse, none] = [ctx.empty([1, 3, rows], 'float32'), row(), row()]
    const labels = ctx.empty([rows], 'int32')
    native.fill(id, labels.handle, 0)
    // Expert 0 stands outside of these columns: no label is subtracted.
    const [start, end] = [E, 2 * E]
    native.crossEntropyStats(id, stats.reshape(ctx, [3, rows]).handle, logits.handle, labels.handle, start, end)
    native.crossEntropyCombine(id, lse.handle, none.handle, stats.handle, labels.handle)
    const slopes = row()
    native.copy(id, slopes.handle, lse.handle)
    const counting = Math.max(0, Math.min(rows, tokens - first))
    if (counting < rows) native.fill(id, slopes.slice(ctx, 0, counting, rows - counting).handle, 0)
    if (told) {
      native.mul(id, none.handle, slopes.handle, slopes.handle)
      tell(ctx, told, none)
    }
    native.scale(id, slopes.handle, slotOf(ctx, 2 * coefficient).handle)
    const own = ctx.empty(logits.shape, logits.dtype)
    native.crossEntropyBackward(id, own.handle, logits.handle, lse.handle, labels.handle, slopes.handle, start, end)
    native.add(id, own.handle, own.handle, d.handle)
    return [own]
  },
})

interface JitterArgs {
  /** [T, C] */
  readonly x: Tensor
  /** Numbers are from 1 - eps to 1 + eps. */
  readonly eps: number
  /** Which jitter of the model this is. */
  readonly site: number
}

interface Placed extends JitterArgs {
  readonly rng: Tensor
  readonly sampleIds: Tensor
  readonly positions: Tensor
}

const multiply = (ctx: Ctx, { rng, sampleIds, positions, site, eps }: Placed, y: Tensor, x: Tensor) =>
  native.jitter(ctx.stream.id, y.handle, x.handle, rng.handle, sampleIds.handle, positions.handle, site, eps)

const jitterOp = defineOp<Placed, { y: Tensor }>({
  name: 'jitter',
  shapes: ({ x }) => ({ y: { shape: x.shape, dtype: x.dtype } }),
  forward: (ctx, args, { y }) => multiply(ctx, args, y, args.x),
  inputs: ({ x }) => [x],
  saves: ({ rng, sampleIds, positions }) => [rng, sampleIds, positions],
  backwardInput(ctx, args, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = ctx.empty(dy.shape, dy.dtype)
    multiply(ctx, args, dx, dy)
    return [dx]
  },
})

/** x times random numbers by place, as dropout draws: the same in every layout. @throws ERR_CONFIG without rng or batch coordinates. */
export function jitter(ctx: Ctx, args: JitterArgs): Tensor {
  const rng = ctx.rng.rngSlot
  if (rng === null || ctx.batch === null)
    throw new ViaductError(
      'ERR_CONFIG',
      'jitter',
      'expected a context with a random slot and the coordinates of its batch, got none: pass rng and batch',
    )
  return jitterOp(ctx, { ...args, rng, sampleIds: ctx.batch.sampleIds, positions: ctx.batch.positions }).y
}
