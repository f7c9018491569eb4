// What the parts of a layer have in common: what they are built from, and the stream between them.
import type { NormConfig } from '../nn/norm.js'
import type { Init } from '../nn/parameter.js'
import type { RouterTotals } from '../parallel/routerTotals.js'
import type { Group, Groups } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import type { RecomputeModule } from './recomputeSettings.js'
import type { TransformerConfig } from './transformerConfig.js'

/** What a block needs to know to be built. */
export interface BlockSpec {
  readonly config: TransformerConfig
  readonly tp: Group
  readonly tpCommOverlap: boolean
  /** Where experts are. */
  readonly groups: Groups
  /** Losses of routers are told here. */
  readonly routerTotals: RouterTotals
  /** Index in the whole model. */
  readonly layer: number
  /** Parts that run again in the backward pass instead of keeping their activations. */
  readonly again: ReadonlySet<RecomputeModule>
  /** The shard of a parameter, by its name in the whole model; null where the model has none. */
  shard(name: string): ShardSpec | null
}

/** The stream between layers; its value is x + residual. */
export interface Hidden {
  readonly x: Tensor
  readonly residual: Tensor | null
}

/** Weights that write into the residual stream start smaller, as Megatron-Core initialises them. */
export function inits({ initMethodStd: std, numLayers }: TransformerConfig): { input: Init; output: Init } {
  return { input: { kind: 'normal', std }, output: { kind: 'normal', std: std / Math.sqrt(2 * numLayers) } }
}

/** The norm before a block. */
export const normConfig = (config: TransformerConfig, shard: ShardSpec): NormConfig => ({
  kind: config.normalization,
  channels: config.hiddenSize,
  eps: config.layernormEpsilon,
  dtype: config.paramsDtype,
  shard,
})
