// Linear layers over tp whose collectives run beside their products (tpCommOverlap): the same results as gatheredLinear.ts and
// regions.ts, to the bit, with the same collectives. Where a weight's gradient is computed at once, the input's gradient is summed beside it.
import { defineOp, type OpRule } from '../ops/define.js'
import { type LinearArgs, linear } from '../ops/linear.js'
import type { TapeRecord } from '../ops/tape.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { allReduce } from './collectives.js'
import { type GatheredLinearArgs, gatheredLinear } from './gatheredLinear.js'
import { ArrivingRows, type Factor, multiplyAndShareOut, multiplyAndSum, tensorParallelAxis } from './productPieces.js'
import { reduceScatterSharedInto } from './sharedRows.js'

interface SummedArgs extends LinearArgs {
  readonly group: Group
}

const { rule } = linear

const forwardFactor = ({ weight, bias }: LinearArgs): Factor => ({
  weight: weight.data,
  transposed: true,
  bias: bias?.data ?? null,
})
const backwardFactor = ({ weight }: LinearArgs): Factor => ({ weight: weight.data, transposed: false })

/** The input's gradient by this rank's columns alone: a term of the sum. */
function ownTerm<A extends LinearArgs>(
  ctx: Ctx,
  args: A,
  out: { y: Tensor },
  d: { readonly y: Tensor | null },
): Tensor | null {
  return rule.backwardInput?.(ctx, args, out, d, [true])[0] ?? null
}

/** As gatheredLinear. */
export const overlappedGatheredLinear = defineOp<GatheredLinearArgs, { y: Tensor }>({
  ...gatheredLinear.rule,
  forward(ctx, args, { y }) {
    const arriving = new ArrivingRows(ctx, args.x, args.tokens, args.group)
    arriving.multiply(ctx, y, forwardFactor(args))
    arriving.dispose()
  },
  backwardInput(ctx, args, _, { y: dy }, [wanted]) {
    return [wanted && dy !== null ? multiplyAndShareOut(ctx, dy, backwardFactor(args), args.group) : null]
  },
  backward(ctx, args, out, d, [wanted]) {
    if (d.y === null) return [null]
    const { x, weight, tokens, group } = args
    const arriving = weight.requiresGrad ? new ArrivingRows(ctx, x, tokens, group) : null
    const term = wanted ? ownTerm(ctx, args, out, d) : null
    const dx = term && ctx.empty(x.shape, x.dtype)
    const comm = ctx.comm(tensorParallelAxis)
    if (dx !== null) reduceScatterSharedInto(comm, dx, term as Tensor, group)
    arriving?.wait(ctx)
    rule.backwardWeight?.(ctx, { ...args, x: arriving?.rows ?? x }, out, d)
    ctx.stream.wait(comm.stream)
    term?.dispose()
    arriving?.dispose()
    return [dx]
  },
})

/** y[T, N] = x · weightᵀ + bias of an x that each rank has; its gradient is summed over the group. */
export const overlappedCopiedLinear = defineOp<SummedArgs, { y: Tensor }>({
  ...(rule as OpRule<SummedArgs, { y: Tensor }>),
  name: 'copiedLinear',
  backwardInput(ctx, args, _, { y: dy }, [wanted]) {
    if (!wanted || dy === null) return [null]
    const dx = ctx.empty([dy.shape[0] as number, args.weight.data.shape[1] as number], args.x.dtype)
    multiplyAndSum(ctx, dx, dy, backwardFactor(args), args.group)
    return [dx]
  },
  backward(ctx, args, out, d, [wanted]) {
    if (d.y === null) return [null]
    const dx = wanted ? ownTerm(ctx, args, out, d) : null
    const comm = ctx.comm(tensorParallelAxis)
    if (dx !== null) allReduce(comm, dx, args.group)
    rule.backwardWeight?.(ctx, args, out, d)
    ctx.stream.wait(comm.stream)
    return [dx]
  },
})

/** y[T, N] = the sum over the group of x · weightᵀ, whole on each rank. */
export const overlappedSummedLinear = defineOp<SummedArgs, { y: Tensor }>({
  ...(rule as OpRule<SummedArgs, { y: Tensor }>),
  name: 'summedLinear',
  forward: (ctx, args, { y }) => multiplyAndSum(ctx, y, args.x, forwardFactor(args), args.group),
})

/** This rank's run of the rows of that sum, [sharedRows(T), N]. */
export function overlappedScatteredLinear(ctx: Ctx, args: SummedArgs): Tensor {
  rule.shapes(args) // checks
  const y = multiplyAndShareOut(ctx, args.x, forwardFactor(args), args.group)
  if (ctx.tape !== null) ctx.tape.record(new ScatteredLinearRecord(args, y))
  return y
}

/** Keeps the gathered gradient of y from the input's gradient to the weight's, so that it travels once. */
class ScatteredLinearRecord implements TapeRecord {
  readonly name = 'scatteredLinear'
  readonly inputs: readonly Tensor[]
  readonly outputs: readonly Tensor[]
  readonly saved: readonly Tensor[]
  readonly weights: readonly LinearArgs['weight'][]
  #gathered: Tensor | null = null

  constructor(
    readonly args: SummedArgs,
    readonly y: Tensor,
  ) {
    const { x, weight } = args
    this.inputs = [x]
    this.outputs = [y]
    this.saved = weight.requiresGrad ? [x, weight.data] : [weight.data]
    this.weights = [weight]
  }

  backwardInput(ctx: Ctx, [dy]: readonly (Tensor | null)[], [wanted]: readonly boolean[]): readonly (Tensor | null)[] {
    if (!dy) return [null]
    const { x, weight, group } = this.args
    const arriving = new ArrivingRows(ctx, dy, x.shape[0] as number, group)
    const dx = wanted ? ctx.empty(x.shape, x.dtype) : null
    if (dx !== null) arriving.multiply(ctx, dx, backwardFactor(this.args))
    else arriving.wait(ctx)
    if (weight.requiresGrad) this.#gathered = arriving.rows.keep()
    else arriving.dispose()
    return [dx]
  }

  backwardWeight(ctx: Ctx): void {
    rule.backwardWeight?.(ctx, this.args, { y: this.y }, { y: this.#gathered })
    this.dispose()
  }

  dispose(): void {
    this.#gathered?.dispose()
    this.#gathered = null
  }
}
