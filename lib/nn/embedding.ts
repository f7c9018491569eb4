// A table of vectors on one device, looked up by id.
import type { DType } from '../base/dtype.js'
import { embedding } from '../ops/embedding.js'
import type { Ctx } from '../tensor/ctx.js'
import { replicated } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { Module } from './module.js'
import { type Init, Parameter } from './parameter.js'

export class Embedding extends Module {
  readonly weight: Parameter

  constructor(rows: number, channels: number, dtype: DType, init: Init) {
    super()
    this.weight = this.parameter('weight', new Parameter(replicated([rows, channels]), dtype, init))
  }

  /** ids int32 [T] to [T, channels]. */
  async forward(ctx: Ctx, ids: Tensor): Promise<Tensor> {
    return embedding(ctx, { ids, weight: this.weight }).y
  }
}
