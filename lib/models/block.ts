// One transformer layer: attention and feed-forward, each norm → linear → mix → linear. The residual stream is not added at the
// end of a block but inside the next norm: a layer takes and gives (x, residual), and its value is their sum.

import { CoreAttention, type LayerCache } from '../nn/coreAttention.js'
import { Module } from '../nn/module.js'
import { Norm } from '../nn/norm.js'
import { type Init, Parameter } from '../nn/parameter.js'
import { gatedActivation } from '../ops/activation.js'
import type { AttentionShape } from '../ops/attention.js'
import { dropout } from '../ops/dropout.js'
import { clip } from '../ops/elementwise.js'
import { qkNorm } from '../ops/qkNorm.js'
import { recompute, recomputeOutput } from '../ops/recompute.js'
import { NormColumnParallelLinear } from '../parallel/columnLinear.js'
import { contextAttention, type SharedAttentionContext } from '../parallel/contextAttention.js'
import { RowParallelLinear } from '../parallel/rowLinear.js'
import { spanningNorm } from '../parallel/spanningNorm.js'
import type { Ctx } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { type BlockSpec, type Hidden, inits, normConfig } from './blockSpec.js'
import { MoELayer } from './moeLayer.js'
import { hasExperts, type QkLayernorm, type TransformerConfig } from './transformerConfig.js'

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
  const norm = normConfig(config, shard)
  return {
    first: new NormColumnParallelLinear(options(input, init.input), norm),
    second: new RowParallelLinear(options(output, init.output)),
  }
}

type QkNorm = (ctx: Ctx, qkv: Tensor) => Tensor

/** A norm's weight under its own name; the norm is applied elsewhere. */
class NormWeight extends Module {
  readonly weight: Parameter
  constructor(weight: Parameter) {
    super()
    this.weight = this.parameter('weight', weight)
  }
}

/** `self_attention`: linear_qkv (with norm), attention, linear_proj. */
export class SelfAttention extends Module {
  linearQkv: NormColumnParallelLinear
  linearProj: RowParallelLinear
  readonly core: CoreAttention
  readonly #again: BlockSpec['again']
  readonly #qkNorm: QkNorm | null
  readonly #clip: number | null

  constructor(spec: BlockSpec) {
    super()
    const { config, tp } = spec
    this.#again = spec.again
    const { first, second } = linears(spec, `decoder.layers.${spec.layer}.self_attention`, 'linear_qkv', 'linear_proj')
    // With fewer key-value heads than ranks, each rank has one of them and a part of its queries.
    const groups = Math.max(1, config.numQueryGroups / tp.size)
    const queriesPerGroup = config.numAttentionHeads / tp.size / groups
    const shape = { groups, queriesPerGroup, channels: config.kvChannels }
    this.linearQkv = this.child('linear_qkv', first)
    this.#qkNorm = config.qkLayernorm === null ? null : this.#makeQkNorm(spec, config.qkLayernorm, shape)
    this.linearProj = this.child('linear_proj', second)
    const sink = spec.shard(`decoder.layers.${spec.layer}.self_attention.core_attention.softmax_offset`)
    const offset = sink && new Parameter(sink, config.paramsDtype, inits(config).input)
    this.core = this.child('core_attention', new CoreAttention({ ...shape, window: config.windowSize ?? 0 }, offset))
    this.#clip = config.clipQkv
  }

  /** `q_layernorm`, `k_layernorm`. */
  #makeQkNorm(
    { config, tp, shard, layer }: BlockSpec,
    kind: QkLayernorm,
    shape: Omit<AttentionShape, 'batchSize'>,
  ): QkNorm {
    const [q, k] = (['q_layernorm', 'k_layernorm'] as const).map((name) => {
      const place = shard(`decoder.layers.${layer}.self_attention.${name}.weight`) as ShardSpec
      return this.child(name, new NormWeight(new Parameter(place, config.paramsDtype, { kind: 'constant', value: 1 })))
        .weight
    }) as [Parameter, Parameter]
    const args = { ...shape, q, k, eps: config.layernormEpsilon }
    if (kind === 'perHead') return (ctx, qkv) => qkNorm(ctx, { ...args, qkv }).y
    return (ctx, qkv) => spanningNorm(ctx, { ...args, qkv, group: tp }).y
  }

  async forward(ctx: Ctx, { x, residual }: Hidden, at: SharedAttentionContext, cache?: LayerCache): Promise<Hidden> {
    const normed = this.linearQkv.normalize(ctx, x, residual)
    const qkv = await this.linearQkv.forward(ctx, normed.y)
    if (this.#again.has('layernorm')) recomputeOutput(ctx, normed.y)
    const normalized = this.#qkNorm?.(ctx, qkv) ?? qkv
    const clipped = this.#clip === null ? normalized : clip(ctx, { x: normalized, limit: this.#clip }).y
    const mixed = at.context
      ? contextAttention(ctx, { ...this.core.args(clipped, at), context: at.context })
      : this.core.forward(ctx, clipped, at, cache)
    const y = await this.linearProj.forward(ctx, mixed)
    if (this.#again.has('core_attn')) recomputeOutput(ctx, mixed)
    return { x: y, residual: normed.residual }
  }
}

/** Runs a part now, and again in the backward pass instead of keeping its activations. */
async function runAgain(
  ctx: Ctx,
  { x, residual }: Hidden,
  part: (ctx: Ctx, hidden: Hidden) => Promise<Hidden>,
): Promise<Hidden> {
  const [y, rest] = await recompute(ctx, residual ? [x, residual] : [x], async (inner, [again, other]) => {
    const out = await part(inner, { x: again as Tensor, residual: other ?? null })
    return [out.x, out.residual] as const
  })
  return { x: y, residual: rest }
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
    return this.#again.has('mlp')
      ? await runAgain(ctx, hidden, (inner, again) => this.#once(inner, again))
      : await this.#once(ctx, hidden)
  }

  async #once(ctx: Ctx, { x, residual }: Hidden): Promise<Hidden> {
    const normed = this.linearFc1.normalize(ctx, x, residual)
    const { gatedLinearUnit, activation: kind } = this.#config
    const inner = await this.linearFc1.forward(ctx, normed.y, gatedLinearUnit ? undefined : kind)
    if (this.#again.has('layernorm') && !this.#again.has('mlp')) recomputeOutput(ctx, normed.y)
    const acted = gatedLinearUnit ? gatedActivation(ctx, { x: inner, kind }).y : inner
    const y = await this.linearFc2.forward(ctx, acted)
    if (gatedLinearUnit && this.#again.has('mlp_act') && !this.#again.has('mlp')) recomputeOutput(ctx, acted)
    return { x: y, residual: normed.residual }
  }
}

/** `decoder.layers.N`. */
export class TransformerLayer extends Module {
  readonly selfAttention: SelfAttention
  readonly mlp: Mlp | MoELayer
  /** Before experts; the norm of a dense `mlp` is in its linear_fc1. */
  readonly preMlpLayernorm: Norm | null
  readonly #dropout: number
  readonly #layer: number
  readonly #again: BlockSpec['again']

  constructor(spec: BlockSpec) {
    super()
    this.#again = spec.again
    this.selfAttention = this.child('self_attention', new SelfAttention(spec))
    const { config } = spec
    if (hasExperts(config, spec.layer)) {
      const shard = spec.shard(`decoder.layers.${spec.layer}.pre_mlp_layernorm.weight`) as ShardSpec
      this.preMlpLayernorm = this.child('pre_mlp_layernorm', new Norm(normConfig(config, shard)))
      this.mlp = this.child('mlp', new MoELayer(spec))
    } else {
      this.preMlpLayernorm = null
      this.mlp = this.child('mlp', new Mlp(spec))
    }
    this.#dropout = spec.config.hiddenDropout
    this.#layer = spec.layer
  }

  /** Dropout on what a block adds to the stream. Sites: 0 is the embedding's, then two a layer. */
  async forward(
    ctx: Ctx,
    hidden: Hidden,
    at: SharedAttentionContext,
    training: boolean,
    cache?: LayerCache,
  ): Promise<Hidden> {
    const p = training ? this.#dropout : 0
    const site = 1 + 2 * this.#layer
    const attended = await this.selfAttention.forward(ctx, hidden, at, cache)
    const middle = { x: dropout(ctx, { x: attended.x, p, site }), residual: attended.residual }
    const fed = await this.#feed(ctx, middle, training ? at.batchSize : null)
    return { x: dropout(ctx, { x: fed.x, p, site: site + 1 }), residual: fed.residual }
  }

  async #feed(ctx: Ctx, hidden: Hidden, balanced: number | null): Promise<Hidden> {
    const { mlp } = this
    if (mlp instanceof Mlp) return await mlp.forward(ctx, hidden)
    const again = this.#again
    const once = async (inner: Ctx, { x, residual }: Hidden) => {
      const normed = await (this.preMlpLayernorm as Norm).forward(inner, x, residual)
      const y = await mlp.forward(inner, normed.y, balanced)
      if (again.has('layernorm') && !again.has('moe')) recomputeOutput(inner, normed.y)
      return { x: y, residual: normed.residual }
    }
    return again.has('moe') ? await runAgain(ctx, hidden, once) : await once(ctx, hidden)
  }
}
