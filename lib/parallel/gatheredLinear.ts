// A linear layer whose input's rows are shared out over the ranks: it gathers them, multiplies, and shares out the rows of the
// input's gradient, summed. The gathered input is not saved: for the weight's gradient it is gathered again, as in Megatron-Core.
import { defineOp } from '../ops/define.js'
import { type LinearArgs, linear } from '../ops/linear.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { gatherShared, reduceScatterShared } from './sharedRows.js'

export interface GatheredLinearArgs extends LinearArgs {
  /** This rank's run of the rows, [sharedRows(T), K]. */
  readonly x: Tensor
  /** T, the rows of all ranks. */
  readonly tokens: number
  readonly group: Group
}

const { rule } = linear

/** Calls f with the rows of all ranks, which are freed behind it. */
function withRows(ctx: Ctx, args: GatheredLinearArgs, f: (whole: LinearArgs) => void): void {
  const x = gatherShared(ctx, args.x, args.tokens, args.group)
  f({ ...args, x })
  x.dispose()
}

/** y[T, N] = rows of all ranks · weightᵀ + bias, in x's dtype. */
export const gatheredLinear = defineOp<GatheredLinearArgs, { y: Tensor }>({
  name: 'gatheredLinear',
  shapes(args) {
    rule.shapes(args) // checks
    const { x, weight, tokens } = args
    return { y: { shape: [tokens, weight.data.shape[0] as number], dtype: x.dtype } }
  },
  forward: (ctx, args, out) => withRows(ctx, args, (whole) => rule.forward(ctx, whole, out)),
  inputs: ({ x }) => [x],
  weights: ({ weight, bias }) => [weight, bias],
  saves: ({ x, weight }) => [weight.requiresGrad ? x : null, weight.data],
  backwardInput(ctx, args, out, d, wanted) {
    const [whole = null] = rule.backwardInput?.(ctx, args, out, d, wanted) ?? []
    if (whole === null) return [null]
    const dx = reduceScatterShared(ctx, whole, args.group)
    whole.dispose()
    return [dx]
  },
  backwardWeight(ctx, args, out, d) {
    if (args.weight.requiresGrad) withRows(ctx, args, (whole) => rule.backwardWeight?.(ctx, whole, out, d))
    else rule.backwardWeight?.(ctx, args, out, d)
  },
})
