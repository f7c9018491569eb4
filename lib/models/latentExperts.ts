// Experts at a width of their own, Megatron's latent experts: `fc1_latent_proj` takes a token to it before it goes to its experts,
// `fc2_latent_proj` takes the sum of what they gave back. Whole on each rank, like the router's weight; the router and shared experts
// keep the full width.
import { Module } from '../nn/module.js'
import { Parameter } from '../nn/parameter.js'
import { linear } from '../ops/linear.js'
import type { Ctx } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { type BlockSpec, inits } from './blockSpec.js'
import type { TransformerConfig } from './transformerConfig.js'

/** Everything about latent experts that cannot be. */
export function latentExpertProblems({ moeLatentSize: size, numMoeExperts }: TransformerConfig): string[] {
  if (size === null) return []
  if (!Number.isSafeInteger(size) || size < 1)
    return [`moeLatentSize must be a whole number of at least 1, or null, got ${size}`]
  return numMoeExperts === null ? [`moeLatentSize=${size} needs numMoeExperts: it is the width of experts`] : []
}

/** Parameter `weight`: [latent, H] of fc1, [H, latent] of fc2. */
export class LatentProjection extends Module {
  readonly weight: Parameter

  constructor(spec: BlockSpec, name: 'fc1_latent_proj' | 'fc2_latent_proj') {
    super()
    const { config } = spec
    const { input, output } = inits(config)
    const shard = spec.shard(`decoder.layers.${spec.layer}.mlp.${name}.weight`) as ShardSpec
    const init = name === 'fc1_latent_proj' ? input : output
    this.weight = this.parameter('weight', new Parameter(shard, config.paramsDtype, init))
  }

  /** Rows of this rank from one width to the other. */
  forward(ctx: Ctx, x: Tensor): Tensor {
    return linear(ctx, { x, weight: this.weight }).y
  }
}
