// An embedding whose rows are shared out over tp. A rank looks up its own ids and gives zeros for others; the sum is whole.
import type { DType } from '../base/dtype.js'
import { Module } from '../nn/module.js'
import { type Init, Parameter } from '../nn/parameter.js'
import { embedding } from '../ops/embedding.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { sumParts } from './regions.js'

export class VocabParallelEmbedding extends Module {
  readonly weight: Parameter
  readonly #tp: Group
  readonly #vocabStart: number

  constructor(tp: Group, shard: ShardSpec, dtype: DType, init: Init) {
    super()
    this.#tp = tp
    this.weight = this.parameter('weight', new Parameter(shard, dtype, init))
    this.#vocabStart = tp.rank * (shard.localShape[0] as number)
  }

  /** ids int32 [T] to [T, H], whole on each rank; with sequence parallelism to its rows, [T / tp, H]. */
  async forward(ctx: Ctx, ids: Tensor): Promise<Tensor> {
    const y = embedding(ctx, { ids, weight: this.weight, vocabStart: this.#vocabStart }).y
    return sumParts(ctx, y, this.#tp)
  }
}
