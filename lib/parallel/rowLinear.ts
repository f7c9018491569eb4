// A linear layer whose input channels are shared out over tp: each rank has columns of the weight and its part of the input.
// Outputs are summed over tp, then the bias is added once. With sequence parallelism a rank gets its rows of the sum.

import type { LinearLike } from '../nn/linear.js'
import { Module } from '../nn/module.js'
import { Parameter } from '../nn/parameter.js'
import { addBias, linear } from '../ops/linear.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import type { ParallelLinearOptions } from './columnLinear.js'
import { overlappedScatteredLinear, overlappedSummedLinear } from './overlappedLinear.js'
import { sumParts } from './regions.js'

export class RowParallelLinear extends Module implements LinearLike {
  readonly weight: Parameter
  readonly bias: Parameter | null
  readonly #tp: Group
  readonly #overlap: boolean

  constructor({ tp, weight, bias, dtype, init, tpCommOverlap }: ParallelLinearOptions) {
    super()
    this.#tp = tp
    this.#overlap = tpCommOverlap && tp.size > 1
    this.weight = this.parameter('weight', new Parameter(weight, dtype, init))
    this.bias = bias ? this.parameter('bias', new Parameter(bias, dtype, { kind: 'constant', value: 0 })) : null
  }

  /** This rank's columns [T, in / tp] to the whole [T, out]; with sequence parallelism to its rows, [T / tp, out]. */
  async forward(ctx: Ctx, x: Tensor): Promise<Tensor> {
    const { weight, bias } = this
    if (this.#tp.size === 1) return linear(ctx, { x, weight, bias }).y
    const y = this.#overlap ? this.#overlapped(ctx, x) : sumParts(ctx, linear(ctx, { x, weight }).y, this.#tp)
    return bias ? addBias(ctx, { x: y, bias }).y : y
  }

  #overlapped(ctx: Ctx, x: Tensor): Tensor {
    const args = { x, weight: this.weight, group: this.#tp }
    return ctx.batch?.sharedTokens === undefined
      ? overlappedSummedLinear(ctx, args).y
      : overlappedScatteredLinear(ctx, args)
  }
}
