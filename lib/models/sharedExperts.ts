// `shared_experts` of a layer with experts: a feed-forward part that every token passes, beside those that the router chooses. It is cut
// over tp as a dense layer's, and what it gives may be weighed by a sigmoid of its own gate. No norm: the layer's is before it.
import { Module } from '../nn/module.js'
import { type Init, Parameter } from '../nn/parameter.js'
import { activation, gatedActivation } from '../ops/activation.js'
import { cast } from '../ops/elementwise.js'
import { linear } from '../ops/linear.js'
import { combine, expertOrder } from '../ops/routing.js'
import { ColumnParallelLinear } from '../parallel/columnLinear.js'
import { RowParallelLinear } from '../parallel/rowLinear.js'
import type { Ctx } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import { Tensor } from '../tensor/tensor.js'
import { type BlockSpec, inits } from './blockSpec.js'
import type { TransformerConfig } from './transformerConfig.js'

/** Everything about shared experts that cannot be. */
export function sharedExpertProblems(config: TransformerConfig): string[] {
  const { numMoeExperts, moeSharedExpertIntermediateSize: size, moeSharedExpertGate: gate } = config
  if (size === null)
    return gate ? ['moeSharedExpertGate=true needs moeSharedExpertIntermediateSize: set that, or false here'] : []
  if (!Number.isSafeInteger(size) || size < 1)
    return [`moeSharedExpertIntermediateSize must be a whole number of at least 1, got ${size}`]
  return numMoeExperts === null
    ? [`moeSharedExpertIntermediateSize=${size} needs numMoeExperts: shared experts stand beside routed ones`]
    : []
}

/** Parameters `linear_fc1.weight`, `linear_fc2.weight` and, with a gate, `gate_weight` [1, H]. */
export class SharedExperts extends Module {
  linearFc1: ColumnParallelLinear
  linearFc2: RowParallelLinear
  readonly gateWeight: Parameter | null
  readonly #config: TransformerConfig

  constructor(spec: BlockSpec) {
    super()
    const { config, tp, tpCommOverlap } = spec
    const { paramsDtype: dtype } = config
    const prefix = `decoder.layers.${spec.layer}.mlp.shared_experts`
    const options = (name: string, init: Init) => ({
      tp,
      tpCommOverlap,
      weight: spec.shard(`${prefix}.${name}.weight`) as ShardSpec,
      bias: null,
      dtype,
      init,
    })
    const { input, output } = inits(config)
    this.#config = config
    this.linearFc1 = this.child('linear_fc1', new ColumnParallelLinear(options('linear_fc1', input)))
    this.linearFc2 = this.child('linear_fc2', new RowParallelLinear(options('linear_fc2', output)))
    const gate = spec.shard(`${prefix}.gate_weight`)
    this.gateWeight = gate && this.parameter('gate_weight', new Parameter(gate, dtype, input))
  }

  /** x [rows, H], normalised, to what is added to the routed experts' output, [rows, H]. */
  async forward(ctx: Ctx, x: Tensor): Promise<Tensor> {
    const { gatedLinearUnit, activation: kind } = this.#config
    const inner = await this.linearFc1.forward(ctx, x)
    const acted = (gatedLinearUnit ? gatedActivation : activation)(ctx, { x: inner, kind }).y
    inner.dispose()
    const made = await this.linearFc2.forward(ctx, acted)
    acted.dispose()
    if (this.gateWeight === null) return made
    const y = this.#weigh(ctx, made, linear(ctx, { x, weight: this.gateWeight }).y)
    made.dispose()
    return y
  }

  /** sigmoid(gate) · made in float32: each row is a token's only choice. @param gate - [rows, 1]. */
  #weigh(ctx: Ctx, made: Tensor, gate: Tensor): Tensor {
    const logits = gate.dtype === 'float32' ? gate : cast(ctx, { x: gate, dtype: 'float32' }).y
    const weights = activation(ctx, { x: logits, kind: 'sigmoid' }).y
    const { source, place } = expertOrder(ctx, Tensor.zeros(ctx, gate.shape, 'int32'), 1)
    return combine(ctx, { x: made, weights, source, place }).y
  }
}
