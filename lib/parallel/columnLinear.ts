// Linear layers whose output channels are shared out over tp: each rank has rows of the weight and its columns of the output.
// The input's gradient is summed over tp; with sequence parallelism the input is gathered from all ranks and its gradient's rows
// are shared out. NormColumnParallelLinear has the block's norm in it, as in Megatron-Core.
import type { DType } from '../base/dtype.js'
import type { LinearLike } from '../nn/linear.js'
import { Module } from '../nn/module.js'
import { type NormConfig, NormCore } from '../nn/norm.js'
import { type Init, Parameter } from '../nn/parameter.js'
import { type Activation, activation } from '../ops/activation.js'
import { linear, linearActivation } from '../ops/linear.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { gatheredLinear } from './gatheredLinear.js'
import { overlappedCopiedLinear, overlappedGatheredLinear } from './overlappedLinear.js'
import { copyForwardReduceBackward } from './regions.js'

export interface ParallelLinearOptions {
  /** The ranks that share the layer. */
  readonly tp: Group
  /** Logical [out, in]: how this rank's rows or columns lie in it. */
  readonly weight: ShardSpec
  /** Null: no bias. */
  readonly bias: ShardSpec | null
  readonly dtype: DType
  readonly init: Init
  /** Collectives run beside the products (overlappedLinear.ts). */
  readonly tpCommOverlap: boolean
}

const zeros: Init = { kind: 'constant', value: 0 }

export class ColumnParallelLinear extends Module implements LinearLike {
  readonly weight: Parameter
  readonly bias: Parameter | null
  readonly #tp: Group
  readonly #overlap: boolean

  /** @param shared - a weight of another module to use instead of an own one: tied embeddings. */
  constructor(options: ParallelLinearOptions, shared?: Parameter) {
    super()
    this.#tp = options.tp
    this.#overlap = options.tpCommOverlap && options.tp.size > 1
    this.weight = this.parameter('weight', shared ?? new Parameter(options.weight, options.dtype, options.init))
    this.bias = options.bias ? this.parameter('bias', new Parameter(options.bias, options.dtype, zeros)) : null
  }

  /**
   * x [T, in], whole, or with sequence parallelism this rank's rows of it, to this rank's columns [T, out / tp].
   * @param kind - a function that the columns go through.
   */
  async forward(ctx: Ctx, x: Tensor, kind?: Activation): Promise<Tensor> {
    const { weight, bias } = this
    if (kind !== undefined && ctx.batch?.sharedTokens === undefined && !this.#overlap)
      return linearActivation(ctx, { x: copyForwardReduceBackward(ctx, x, this.#tp), weight, bias, kind })
    const y = this.#columns(ctx, x)
    return kind === undefined ? y : activation(ctx, { x: y, kind }).y
  }

  #columns(ctx: Ctx, x: Tensor): Tensor {
    const { weight, bias } = this
    const tokens = ctx.batch?.sharedTokens
    const group = this.#tp
    if (tokens !== undefined)
      return (this.#overlap ? overlappedGatheredLinear : gatheredLinear)(ctx, { x, weight, bias, tokens, group }).y
    if (this.#overlap) return overlappedCopiedLinear(ctx, { x, weight, bias, group }).y
    return linear(ctx, { x: copyForwardReduceBackward(ctx, x, group), weight, bias }).y
  }
}

/** Norm of x + residual, then a column-parallel linear; parameters `layer_norm_weight`, `weight`, `bias`. */
export class NormColumnParallelLinear extends ColumnParallelLinear {
  readonly norm: NormCore

  constructor(options: ParallelLinearOptions, norm: NormConfig) {
    super(options)
    this.norm = new NormCore(norm)
    this.parameter('layer_norm_weight', this.norm.weight)
    if (this.norm.bias) this.parameter('layer_norm_bias', this.norm.bias)
  }

  /** The normalised input and the residual stream that goes on past the block. */
  normalize(ctx: Ctx, x: Tensor, residual: Tensor | null): { y: Tensor; residual: Tensor } {
    return this.norm.apply(ctx, x, residual)
  }
}
