// A linear layer on one device. Weights are [outFeatures, inFeatures], as in PyTorch.
import type { DType } from '../base/dtype.js'
import { linear } from '../ops/linear.js'
import type { Ctx } from '../tensor/ctx.js'
import { replicated } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { Module } from './module.js'
import { type Init, Parameter } from './parameter.js'

/** What every linear layer offers, parallel ones too; adapters wrap this. */
export interface LinearLike extends Module {
  readonly weight: Parameter
  readonly bias: Parameter | null
  forward(ctx: Ctx, x: Tensor): Promise<Tensor>
}

export interface LinearOptions {
  readonly inFeatures: number
  readonly outFeatures: number
  readonly bias: boolean
  readonly dtype: DType
  readonly init: Init
}

export class Linear extends Module implements LinearLike {
  readonly weight: Parameter
  readonly bias: Parameter | null

  constructor({ inFeatures, outFeatures, bias, dtype, init }: LinearOptions) {
    super()
    this.weight = this.parameter('weight', new Parameter(replicated([outFeatures, inFeatures]), dtype, init))
    const zeros: Init = { kind: 'constant', value: 0 }
    this.bias = bias ? this.parameter('bias', new Parameter(replicated([outFeatures]), dtype, zeros)) : null
  }

  /** x [T, inFeatures] to [T, outFeatures]. */
  async forward(ctx: Ctx, x: Tensor): Promise<Tensor> {
    return linear(ctx, { x, weight: this.weight, bias: this.bias }).y
  }
}
