// Norms with the residual addition before them. A norm owns no names: it registers its parameters on the module that holds it,
// because Megatron-Core keeps a block's norm weight inside the linear that follows (`linear_qkv.layer_norm_weight`).
import type { DType } from '../base/dtype.js'
import { add } from '../ops/elementwise.js'
import { layerNorm, rmsNorm } from '../ops/norm.js'
import type { Ctx } from '../tensor/ctx.js'
import { replicated, type ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { Module } from './module.js'
import { Parameter } from './parameter.js'

export interface NormConfig {
  readonly kind: 'RMSNorm' | 'LayerNorm'
  readonly channels: number
  readonly eps: number
  readonly dtype: DType
  /** How the weight is shared out; default: whole on this rank. */
  readonly shard?: ShardSpec
}

/** y is the normalised sum; `residual` is the sum itself, which goes on to the next addition. */
export interface Normed {
  readonly y: Tensor
  readonly residual: Tensor
}

/** A norm's parameters and arithmetic, without names. */
export class NormCore {
  readonly weight: Parameter
  /** LayerNorm only. */
  readonly bias: Parameter | null

  constructor(private readonly config: NormConfig) {
    const shard = config.shard ?? replicated([config.channels])
    this.weight = new Parameter(shard, config.dtype, { kind: 'constant', value: 1 })
    this.bias = config.kind === 'LayerNorm' ? new Parameter(shard, config.dtype, { kind: 'constant', value: 0 }) : null
  }

  /** Normalises x + residual, [T, H]. */
  apply(ctx: Ctx, x: Tensor, residual: Tensor | null): Normed {
    const { weight, bias } = this
    const { eps } = this.config
    if (this.config.kind === 'RMSNorm') {
      const out = rmsNorm(ctx, { x, residual, weight, eps })
      return { y: out.y, residual: out.sum }
    }
    const h = residual ? add(ctx, { a: x, b: residual }).y : x
    return { y: layerNorm(ctx, { x: h, weight, bias, eps }).y, residual: h }
  }
}

/** A norm as a module of its own, with parameters `weight` and, for LayerNorm, `bias`. */
export class Norm extends Module {
  readonly core: NormCore

  constructor(config: NormConfig) {
    super()
    this.core = new NormCore(config)
    this.parameter('weight', this.core.weight)
    if (this.core.bias) this.parameter('bias', this.core.bias)
  }

  /** Normalises x + residual, [T, H]. */
  async forward(ctx: Ctx, x: Tensor, residual: Tensor | null = null): Promise<Normed> {
    return this.core.apply(ctx, x, residual)
  }
}
