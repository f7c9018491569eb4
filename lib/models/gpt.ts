// The one decoder-only model: embedding, layers, final norm, output layer, by Megatron-Core's names. Tokens are flattened:
// T = B·S, row b·S+s. Shards come from layoutShards.ts; this file knows how the parts are joined and nothing of files.
import { ViaductError } from '../base/errors.js'
import type { AttentionContext } from '../nn/coreAttention.js'
import { Module } from '../nn/module.js'
import { Norm } from '../nn/norm.js'
import { RotaryEmbedding } from '../nn/rotaryEmbedding.js'
import { dropout } from '../ops/dropout.js'
import { recompute } from '../ops/recompute.js'
import { allGather } from '../parallel/collectives.js'
import { ColumnParallelLinear } from '../parallel/columnLinear.js'
import { vocabParallelCrossEntropy } from '../parallel/vocabParallelCrossEntropy.js'
import { VocabParallelEmbedding } from '../parallel/vocabParallelEmbedding.js'
import type { BatchCoordinates, Ctx, Group, Groups } from '../tensor/ctx.js'
import { withScope } from '../tensor/scope.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import type { DeviceBatch } from './batch.js'
import { type Hidden, TransformerLayer } from './block.js'
import { KvCache } from './kvCache.js'
import { shardOf } from './layoutShards.js'
import { parameterTable } from './parameterTable.js'
import type { TransformerConfig } from './transformerConfig.js'

/** What GPTModel takes besides the transformer's description. */
export interface GPTOptions {
  readonly groups: Groups
  /** Rows of the vocabulary in memory, over all ranks; default: the least multiple of tp. */
  readonly paddedVocabSize?: number
  /** 'full': each layer runs again in the backward pass instead of saving its activations. Default null. */
  readonly recomputeGranularity?: 'full' | null
  /** Where tp > 1, norms and dropout see an equal run of the tokens on each rank. Default false. */
  readonly sequenceParallel?: boolean
}

/**
 * Sees what each part of a forward pass gives, awaited before the next one runs. `hidden` is the caller's to read, not to keep: its
 * value is x + residual, [T, H]; with sequence parallelism this rank's rows of it.
 * @param place - `embedding`, `decoder.layers.N`, `decoder.final_layernorm`.
 */
export type ForwardObserver = (place: string, hidden: Hidden) => Promise<void>

/** `embedding`: the module whose child is `word_embeddings`. */
class LanguageModelEmbedding extends Module {
  readonly wordEmbeddings: VocabParallelEmbedding
  constructor(words: VocabParallelEmbedding) {
    super()
    this.wordEmbeddings = this.child('word_embeddings', words)
  }
}

/** `decoder`: layers and the norm after them. */
class Decoder extends Module {
  readonly layers: readonly TransformerLayer[]
  readonly finalLayernorm: Norm
  constructor(layers: readonly TransformerLayer[], finalLayernorm: Norm) {
    super()
    this.layers = layers.map((layer, i) => this.child(`layers.${i}`, layer))
    this.finalLayernorm = this.child('final_layernorm', finalLayernorm)
  }
}

export class GPTModel extends Module {
  readonly embedding: LanguageModelEmbedding
  readonly decoder: Decoder
  readonly outputLayer: ColumnParallelLinear
  /** True: dropout is on. */
  training = true
  readonly #tp: Group
  readonly #rotary: RotaryEmbedding
  readonly #recompute: boolean
  readonly #sequenceParallel: boolean

  /** Builds the model's structure; parameters have no memory yet. */
  constructor(
    readonly config: TransformerConfig,
    options: GPTOptions,
  ) {
    super()
    const tp = options.groups.get('tp')
    const { paddedVocabSize: paddedVocab, sequenceParallel = false } = options
    const dtype = config.paramsDtype
    const init = { kind: 'normal', std: config.initMethodStd } as const
    const rows = new Map(parameterTable(config).map((row) => [row.name, row]))
    const shard = (name: string): ShardSpec | null => {
      const row = rows.get(name)
      return row ? shardOf(row, config, tp, { paddedVocab, sequenceParallel }) : null
    }
    const needed = (name: string): ShardSpec => {
      const found = shard(name)
      if (found === null)
        throw new ViaductError('ERR_ASSERT', 'gpt', `expected a parameter ${name} in the table, got none`)
      return found
    }
    const words = 'embedding.word_embeddings.weight'
    const embedding = new VocabParallelEmbedding(tp, needed(words), dtype, init)
    const layers = Array.from(
      { length: config.numLayers },
      (_, layer) => new TransformerLayer({ config, tp, layer, shard }),
    )
    const norm = new Norm({
      kind: config.normalization,
      channels: config.hiddenSize,
      eps: config.layernormEpsilon,
      dtype,
      shard: needed('decoder.final_layernorm.weight'),
    })
    const tied = config.shareEmbeddingsAndOutputWeights
    const output = { tp, weight: needed(tied ? words : 'output_layer.weight'), bias: null, dtype, init }

    this.embedding = this.child('embedding', new LanguageModelEmbedding(embedding))
    this.decoder = this.child('decoder', new Decoder(layers, norm))
    this.outputLayer = this.child('output_layer', new ColumnParallelLinear(output, tied ? embedding.weight : undefined))
    this.#tp = tp
    this.#recompute = options.recomputeGranularity === 'full'
    this.#sequenceParallel = sequenceParallel && tp.size > 1
    this.#rotary = new RotaryEmbedding({
      channels: Math.floor(config.kvChannels * config.rotaryPercent),
      base: config.rotaryBase,
      maxPositionEmbeddings: config.maxPositionEmbeddings,
      scaling: config.ropeScaling,
    })
    for (const [name, parameter] of this.namedParameters()) parameter.name = name
  }

  /** Ranks that share this model's matrices. */
  get tp(): Group {
    return this.#tp
  }

  /**
   * Logits [T, Vlocal] of this rank's columns, in paramsDtype; columns at or past vocabSize are padding. A pass with a cache runs
   * without sequence parallelism, and so does one without a tape whose tokens tp does not divide.
   * @param cache - holds the keys before this batch; this call's are appended.
   * @param observe - sees the hidden states between the parts; without one nothing is kept for it.
   * @throws ERR_LAYOUT_INVALID under a tape with sequence parallelism when tp does not divide the batch's tokens.
   */
  async forward(ctx: Ctx, batch: DeviceBatch, cache?: KvCache, observe?: ForwardObserver): Promise<Tensor> {
    if (this.config.paramsDtype === 'float16') {
      throw new ViaductError(
        'ERR_UNSUPPORTED',
        'gpt',
        'float16 models are carried, not computed: load with paramsDtype float32 (exact) or bfloat16',
      )
    }
    return await withScope(ctx, async (scoped) => {
      const inner = scoped.with({ batch: this.#coordinates(scoped, batch, cache) })
      const at = this.#attentionContext(inner, batch)
      const drops = this.training && cache === undefined
      if (drops && this.config.attentionDropout > 0)
        throw new ViaductError(
          'ERR_UNSUPPORTED',
          'gpt',
          `expected attentionDropout 0 in training, got ${this.config.attentionDropout}: use hiddenDropout, or set training to false`,
        )
      const p = drops ? this.config.hiddenDropout : 0
      inner.stream.setPlace('embedding')
      const embedded = await this.embedding.wordEmbeddings.forward(inner, batch.tokens)
      let hidden: Hidden = { x: dropout(inner, { x: embedded, p, site: 0 }), residual: null }
      await observe?.('embedding', hidden)
      for (const [i, layer] of this.decoder.layers.entries()) {
        inner.stream.setPlace(`decoder.layers.${i}`)
        const next = await this.#layer(inner, layer, hidden, at, cache?.layer(i))
        // Without a tape nobody needs what the layer read; with one, the tape holds what it saved.
        for (const t of [hidden.x, hidden.residual]) if (t && t !== next.x && t !== next.residual) t.dispose()
        hidden = next
        await observe?.(`decoder.layers.${i}`, hidden)
      }
      cache?.advance(batch.seqLength)
      inner.stream.setPlace('output_layer')
      const normed = await this.decoder.finalLayernorm.forward(inner, hidden.x, hidden.residual)
      await observe?.('decoder.final_layernorm', { x: normed.y, residual: null })
      return await this.outputLayer.forward(inner, normed.y)
    })
  }

  /**
   * Cross entropy of the batch's labels.
   * @returns loss float32 [T], 0 where the label is ignored, and lossSum float32 [1]; not divided by the number of tokens.
   * @throws ERR_DATA when the batch has no labels.
   */
  async loss(ctx: Ctx, batch: DeviceBatch): Promise<{ loss: Tensor; lossSum: Tensor }> {
    const { labels } = batch
    if (labels === null)
      throw new ViaductError('ERR_DATA', 'gpt', 'expected a batch with labels, got none: upload labels for a loss')
    return await withScope(ctx, async (inner) => {
      const logits = await this.forward(inner, batch)
      return vocabParallelCrossEntropy(inner, logits, labels, this.config.vocabSize, this.#tp)
    })
  }

  /** All ranks' columns of `forward`'s logits without the padding, on the host: float32 [T, vocabSize]. Every rank of tp calls it. */
  async gatherLogits(ctx: Ctx, logits: Tensor): Promise<Float32Array> {
    const { vocabSize } = this.config
    const [tokens = 0, local = 0] = logits.shape
    const parts = await withScope(ctx, (inner) =>
      (this.#tp.size === 1 ? logits : allGather(inner, logits, this.#tp)).toFloat32Array(),
    )
    if (this.#tp.size === 1 && local === vocabSize) return parts
    const whole = new Float32Array(tokens * vocabSize)
    for (let rank = 0; rank < this.#tp.size; rank++) {
      const width = Math.min(local, vocabSize - rank * local)
      if (width <= 0) break // only padding from here on
      for (let t = 0; t < tokens; t++) {
        const from = (rank * tokens + t) * local
        whole.set(parts.subarray(from, from + width), t * vocabSize + rank * local)
      }
    }
    return whole
  }

  /** A cache for generation with this model; the caller disposes it. */
  createCache(ctx: Ctx, batchSize: number, maxLength: number): KvCache {
    const { numLayers, numQueryGroups, kvChannels, paramsDtype } = this.config
    const groups = Math.max(1, numQueryGroups / this.#tp.size)
    return KvCache.create(ctx, { numLayers, batchSize, maxLength, groups, channels: kvChannels, dtype: paramsDtype })
  }

  override dispose(): void {
    this.#rotary.dispose()
    super.dispose()
  }

  /** Coordinates of the rows that this rank has between the linears: of all tokens, or with sequence parallelism of its run. */
  #coordinates(ctx: Ctx, { sampleIds, positions }: DeviceBatch, cache?: KvCache): BatchCoordinates {
    const tokens = positions.shape[0] as number
    const { rank, size } = this.#tp
    const divides = tokens % size === 0
    // Without a tape no gradient tells the two ways apart.
    if (!this.#sequenceParallel || cache !== undefined || (!divides && ctx.tape === null))
      return { sampleIds, positions }
    if (!divides)
      throw new ViaductError(
        'ERR_LAYOUT_INVALID',
        'gpt',
        `expected a batch whose tokens tensorModelParallelSize=${size} divides for sequence parallelism, got ${tokens}: pad it, or set sequenceParallel to false`,
      )
    const count = tokens / size
    const mine = (t: Tensor) => t.slice(ctx, 0, rank * count, count)
    return { sampleIds: mine(sampleIds), positions: mine(positions), sequenceParallel: true }
  }

  #attentionContext(ctx: Ctx, batch: DeviceBatch): AttentionContext {
    const { batchSize, positions, firstKey, keyEnd, maxPosition } = batch
    const tables = this.#rotary.tables(ctx, maxPosition)
    return { batchSize, rotary: { ...tables, positions, interleaved: this.config.rotaryInterleaved }, firstKey, keyEnd }
  }

  async #layer(
    ctx: Ctx,
    layer: TransformerLayer,
    hidden: Hidden,
    at: AttentionContext,
    cache?: KvCacheLayer,
  ): Promise<Hidden> {
    if (!this.#recompute || ctx.tape === null) {
      return await withScope(ctx, (inner) => layer.forward(inner, hidden, at, this.training, cache))
    }
    const inputs = hidden.residual ? [hidden.x, hidden.residual] : [hidden.x]
    const f = async (inner: Ctx, [again, rest]: readonly Tensor[]) => {
      const out = await layer.forward(inner, { x: again as Tensor, residual: rest ?? null }, at, this.training)
      return [out.x, out.residual] as const
    }
    const { rotary, firstKey, keyEnd } = at
    const reads = [rotary?.cos ?? null, rotary?.sin ?? null, rotary?.positions ?? null, firstKey, keyEnd]
    const [x, residual] = await recompute(ctx, inputs, f, reads)
    return { x, residual }
  }
}

type KvCacheLayer = ReturnType<KvCache['layer']>
