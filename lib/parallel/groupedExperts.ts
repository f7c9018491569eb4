// The experts of a layer as two grouped linears: fc1, activation, fc2, each expert with rows of its own. Rows come sorted by expert.
// With expert tensor parallelism each rank has a slice of every expert, as a dense layer's; what it gives is a part of the sum.
import type { DType } from '../base/dtype.js'
import { Module } from '../nn/module.js'
import { type Init, Parameter } from '../nn/parameter.js'
import { type Activation, activation, gatedActivation } from '../ops/activation.js'
import { groupedLinear } from '../ops/routing.js'
import type { Ctx } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'

export interface GroupedExpertsOptions {
  /** The experts of this rank, in order: index in the whole layer, and the shard of its logical [M, K]. */
  readonly fc1: readonly (readonly [expert: number, shard: ShardSpec])[]
  readonly fc2: readonly (readonly [expert: number, shard: ShardSpec])[]
  readonly dtype: DType
  readonly inits: { readonly input: Init; readonly output: Init }
  readonly activation: Activation
  readonly gated: boolean
}

/** `experts`: parameters `linear_fc1.weight0`, …, `linear_fc2.weight0`, …, numbered over all ranks. */
export class GroupedExperts extends Module {
  readonly fc1: readonly Parameter[]
  readonly fc2: readonly Parameter[]
  readonly #act: typeof activation
  readonly #kind: Activation

  constructor({ fc1, fc2, dtype, inits, activation: kind, gated }: GroupedExpertsOptions) {
    super()
    const make = (name: string, shards: GroupedExpertsOptions['fc1'], init: Init) =>
      shards.map(([e, shard]) => this.parameter(`${name}.weight${e}`, new Parameter(shard, dtype, init)))
    this.fc1 = make('linear_fc1', fc1, inits.input)
    this.fc2 = make('linear_fc2', fc2, inits.output)
    this.#act = gated ? gatedActivation : activation
    this.#kind = kind
  }

  /** Rows [N, H] of expert 0, then of expert 1, …, so many of each, to [N, H]. What is between, and the rows, are freed: a tape has its own. */
  forward(ctx: Ctx, x: Tensor, counts: readonly number[]): Tensor {
    const inner = groupedLinear(ctx, { x, weights: this.fc1, counts }).y
    x.dispose()
    const acted = this.#act(ctx, { x: inner, kind: this.#kind }).y
    inner.dispose()
    const { y } = groupedLinear(ctx, { x: acted, weights: this.fc2, counts })
    acted.dispose()
    return y
  }
}
