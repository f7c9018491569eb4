// One transformer layer: attention and feed-forward, each norm → linear → mix → linear. The residual stream is not added at the
// end of a block but inside the next norm: a layer takes and gives (x, residual), and its value is their sum.

import { type AttentionContext, CoreAttention, type LayerCache } from '../nn/coreAttention.js'
import { Module } from '../nn/module.js'
import type { Init } from '../nn/parameter.js'
import { activation, gatedActivation } from '../ops/activation.js'
import { dropout } from '../ops/dropout.js'
import { recompute, recomputeOutput } from '../ops/recompute.js'
import { NormColumnParallelLinear } from '../parallel/columnLinear.js'
import { RowParallelLinear } from '../parallel/rowLinear.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import type { RecomputeModule } from './recomputeSettings.js'
import type { TransformerConfig } from './transformerConfig.js'

/** What a block needs to know to be built. */
export interface BlockSpec {
  readonly config: TransformerConfig
  readonly tp: Group
  readonly tpCommOverlap: boolean
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
function inits({ initMethodStd: std, numLayers }: TransformerConfig): { input: Init; output: Init } {
  return { input: { kind: 'normal', std }, output: { kind: 'normal', std: std / Math.sqrt(2 * numLayers) } }
}

function linears(spec: BlockSpec, prefix: string, input: string, output: string) {
  const { config, tp, tpCommOverlap } = spec
  const { paramsDtype: dtype } = config
  const options = (name: string, init: Init) => ({
    tp,
    tpCommOverlap,
    weight: spec.shard(`${prefix}.${name}.weight`) as ShardSpec,
    bias: spec.shard(`${prefix}.${name}.bias`),
    dtype,
    init,
  })
  const init = inits(config)
  const shard = spec.shard(`${prefix}.${input}.layer_norm_weight`) as ShardSpec
  const norm = { kind: config.normalization, channels: config.hiddenSize, eps: config.layernormEpsilon, dtype, shard }
  return {
    first: new NormColumnParallelLinear(options(input, init.input), norm),
    second: new RowParallelLinear(options(output, init.output)),
  }
}

/** `self_attention`: linear_qkv (with norm), attention, linear_proj. */
export class SelfAttention extends Module {
  linearQkv: NormColumnParallelLinear
  linearProj: RowParallelLinear
  readonly core: CoreAttention
  readonly #again: BlockSpec['again']

  constructor(spec: BlockSpec) {
    super()
    const { config, tp } = spec
    this.#again = spec.again
    const { first, second } = linears(spec, `decoder.layers.${spec.layer}.self_attention`, 'linear_qkv', 'linear_proj')
    this.linearQkv = this.child('linear_qkv', first)
    this.linearProj = this.child('linear_proj', second)
    // With fewer key-value heads than ranks, each rank has one of them and a part of its queries.
    const groups = Math.max(1, config.numQueryGroups / tp.size)
    const queriesPerGroup = config.numAttentionHeads / tp.size / groups
    this.core = new CoreAttention({ groups, queriesPerGroup, channels: config.kvChannels })
  }

  async forward(ctx: Ctx, { x, residual }: Hidden, at: AttentionContext, cache?: LayerCache): Promise<Hidden> {
    const normed = this.linearQkv.normalize(ctx, x, residual)
    const qkv = await this.linearQkv.forward(ctx, normed.y)
    if (this.#again.has('layernorm')) recomputeOutput(ctx, normed.y)
    const mixed = this.core.forward(ctx, qkv, at, cache)
    const y = await this.linearProj.forward(ctx, mixed)
    if (this.#again.has('core_attn')) recomputeOutput(ctx, mixed)
    return { x: y, residual: normed.residual }
  }
}

/** `mlp`: linear_fc1 (with norm), activation, linear_fc2. */
export class Mlp extends Module {
  linearFc1: NormColumnParallelLinear
  linearFc2: RowParallelLinear
  readonly #config: TransformerConfig
  readonly #again: BlockSpec['again']

  constructor(spec: BlockSpec) {
    super()
    this.#config = spec.config
    this.#again = spec.again
    const { first, second } = linears(spec, `decoder.layers.${spec.layer}.mlp`, 'linear_fc1', 'linear_fc2')
    this.linearFc1 = this.child('linear_fc1', first)
    this.linearFc2 = this.child('linear_fc2', second)
  }

  async forward(ctx: Ctx, hidden: Hidden): Promise<Hidden> {
    if (!this.#again.has('mlp')) return await this.#once(ctx, hidden)
    const inputs = hidden.residual ? [hidden.x, hidden.residual] : [hidden.x]
    const [x, residual] = await recompute(ctx, inputs, async (inner, [again, rest]) => {
      const out = await this.#once(inner, { x: again as Tensor, residual: rest ?? null })
      return [out.x, out.residual] as const
    })
    return { x, residual }
  }

  async #once(ctx: Ctx, { x, residual }: Hidden): Promise<Hidden> {
    const normed = this.linearFc1.normalize(ctx, x, residual)
    const inner = await this.linearFc1.forward(ctx, normed.y)
    if (this.#again.has('layernorm') && !this.#again.has('mlp')) recomputeOutput(ctx, normed.y)
    const { gatedLinearUnit, activation: kind } = this.#config
    const acted = (gatedLinearUnit ? gatedActivation : activation)(ctx, { x: inner, kind }).y
    return { x: await this.linearFc2.forward(ctx, acted), residual: normed.residual }
  }
}

/** `decoder.layers.N`. */
export class TransformerLayer extends Module {
  readonly selfAttention: SelfAttention
  readonly mlp: Mlp
  readonly #dropout: number
  readonly #layer: number

  constructor(spec: BlockSpec) {
    super()
    this.selfAttention = this.child('self_attention', new SelfAttention(spec))
    this.mlp = this.child('mlp', new Mlp(spec))
    this.#dropout = spec.config.hiddenDropout
    this.#layer = spec.layer
  }

  /** Dropout on what a block adds to the stream. Sites: 0 is the embedding's, then two a layer. */
  async forward(
    ctx: Ctx,
    hidden: Hidden,
    at: AttentionContext,
    training: boolean,
    cache?: LayerCache,
  ): Promise<Hidden> {
    const p = training ? this.#dropout : 0
    const site = 1 + 2 * this.#layer
    const attended = await this.selfAttention.forward(ctx, hidden, at, cache)
    const middle = { x: dropout(ctx, { x: attended.x, p, site }), residual: attended.residual }
    const fed = await this.mlp.forward(ctx, middle)
    return { x: dropout(ctx, { x: fed.x, p, site: site + 1 }), residual: fed.residual }
  }
}
