// The one decoder-only model: embedding, layers, final norm, output layer, by Megatron-Core's names, or the part of it that a chunk of a
// pipeline stage holds. Tokens are flattened: T = B·S, row b·S+s. Shards come from layoutShards.ts; this file knows how the parts are
// joined and nothing of files.
import { ViaductError } from '../base/errors.js'
import { Module } from '../nn/module.js'
import { Norm } from '../nn/norm.js'
import { RotaryEmbedding } from '../nn/rotaryEmbedding.js'
import { dropout } from '../ops/dropout.js'
import { add } from '../ops/elementwise.js'
import { ActivationOffload } from '../ops/offload.js'
import { recompute } from '../ops/recompute.js'
import type { Tape } from '../ops/tape.js'
import { allGather } from '../parallel/collectives.js'
import { ColumnParallelLinear } from '../parallel/columnLinear.js'
import type { SharedAttentionContext } from '../parallel/contextAttention.js'
import type { PipelinePart } from '../parallel/pipelineStages.js'
import { RouterTotals } from '../parallel/routerTotals.js'
import { ownRun, sharedRows } from '../parallel/sharedRows.js'
import type { TopKRouter } from '../parallel/topKRouter.js'
import { vocabParallelCrossEntropy } from '../parallel/vocabParallelCrossEntropy.js'
import { VocabParallelEmbedding } from '../parallel/vocabParallelEmbedding.js'
import type { BatchCoordinates, Ctx, Group, Groups } from '../tensor/ctx.js'
import { withScope } from '../tensor/scope.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import type { DeviceBatch } from './batch.js'
import { TransformerLayer } from './block.js'
import type { Hidden } from './blockSpec.js'
import { KvCache } from './kvCache.js'
import { type RowCutter, shardOf } from './layoutShards.js'
import { MoELayer } from './moeLayer.js'
import { parameterTable } from './parameterTable.js'
import {
  defaultRecompute,
  type LayerRun,
  layerRuns,
  type RecomputeSettings,
  selectedModules,
} from './recomputeSettings.js'
import type { TransformerConfig } from './transformerConfig.js'

/** What GPTModel takes besides the transformer's description. */
export interface GPTOptions {
  readonly groups: Groups
  /** Rows of the vocabulary in memory, over all ranks; default: the least multiple of tp. */
  readonly paddedVocabSize?: number
  /** Which activations are computed again in the backward pass; what is left out has its default: none. */
  readonly recompute?: Partial<RecomputeSettings>
  /** Layers, from the first on, whose activations wait in the host's memory. Default 0; not with `recompute`. */
  readonly offloadedLayers?: number
  /** Where tp > 1, norms and dropout see a run of the tokens on each rank. Default false. */
  readonly sequenceParallel?: boolean
  /** Where tp > 1, its collectives run beside the products of the linears. Default false. */
  readonly tpCommOverlap?: boolean
  /** What this chunk of a pipeline stage holds; default: the whole model. */
  readonly part?: PipelinePart
  /** How this rank's shards are cut; default: over tp alone, as one stage has them. */
  readonly cut?: RowCutter
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

/** `decoder`: layers, by their index in the whole model, and the norm after the last. */
class Decoder extends Module {
  readonly layers: ReadonlyMap<number, TransformerLayer>
  readonly finalLayernorm: Norm | null
  constructor(layers: ReadonlyMap<number, TransformerLayer>, finalLayernorm: Norm | null) {
    super()
    this.layers = layers
    for (const [index, layer] of layers) this.child(`layers.${index}`, layer)
    this.finalLayernorm = finalLayernorm && this.child('final_layernorm', finalLayernorm)
  }
}

export class GPTModel extends Module {
  /** Where the model begins; also on the last stage where embeddings are tied: the output layer's copy of the weight. */
  readonly embedding: LanguageModelEmbedding | null
  readonly decoder: Decoder
  /** Where the model ends. */
  readonly outputLayer: ColumnParallelLinear | null
  readonly part: PipelinePart
  /** True: dropout is on. */
  training = true
  /** What the routers of these layers told in a step. */
  readonly routerTotals = new RouterTotals()
  readonly #tp: Group
  readonly #rotary: RotaryEmbedding
  /** How the layers run under a tape, in order. */
  readonly runs: readonly LayerRun[]
  readonly #sequenceParallel: boolean
  /** Index of the first layer whose activations stay. */
  readonly #offloadedTo: number

  /** Builds the model's structure; parameters have no memory yet. */
  constructor(
    readonly config: TransformerConfig,
    options: GPTOptions,
  ) {
    super()
    const tp = options.groups.get('tp')
    const { paddedVocabSize: paddedVocab, sequenceParallel = false, tpCommOverlap = false } = options
    const part = options.part ?? { first: 0, end: config.numLayers, hasEmbedding: true, hasHead: true }
    const dtype = config.paramsDtype
    const init = { kind: 'normal', std: config.initMethodStd } as const
    const rows = new Map(parameterTable(config).map((row) => [row.name, row]))
    const alone: RowCutter = (row) =>
      row.expert === null
        ? shardOf(row, config, tp, { paddedVocab, sequenceParallel })
        : { ...shardOf(row, config, { rank: 0, size: 1 }), copies: 'edp' }
    const cut = options.cut ?? alone
    const shard = (name: string): ShardSpec | null => {
      const row = rows.get(name)
      return row ? cut(row) : null
    }
    const needed = (name: string): ShardSpec => {
      const found = shard(name)
      if (found === null)
        throw new ViaductError('ERR_ASSERT', 'gpt', `expected a parameter ${name} on this rank, got none`)
      return found
    }
    const words = 'embedding.word_embeddings.weight'
    const tied = config.shareEmbeddingsAndOutputWeights
    const holdsWords = part.hasEmbedding || (part.hasHead && tied)
    const embedding = holdsWords ? new VocabParallelEmbedding(tp, needed(words), dtype, init) : null
    const recompute = { ...defaultRecompute, ...options.recompute }
    const again = selectedModules(recompute)
    const layers = new Map<number, TransformerLayer>()
    for (let layer = part.first; layer < part.end; layer++)
      layers.set(
        layer,
        new TransformerLayer({
          config,
          tp,
          tpCommOverlap,
          groups: options.groups,
          routerTotals: this.routerTotals,
          layer,
          shard,
          again,
        }),
      )
    this.part = part
    this.embedding = embedding && this.child('embedding', new LanguageModelEmbedding(embedding))
    if (part.hasHead) {
      const norm = new Norm({
        kind: config.normalization,
        channels: config.hiddenSize,
        eps: config.layernormEpsilon,
        dtype,
        shard: needed('decoder.final_layernorm.weight'),
      })
      const weight = needed(tied ? words : 'output_layer.weight')
      const output = { tp, tpCommOverlap, weight, bias: null, dtype, init }
      this.decoder = this.child('decoder', new Decoder(layers, norm))
      const shared = tied ? embedding?.weight : undefined
      this.outputLayer = this.child('output_layer', new ColumnParallelLinear(output, shared))
    } else {
      this.decoder = this.child('decoder', new Decoder(layers, null))
      this.outputLayer = null
    }
    this.#tp = tp
    this.runs = layerRuns(recompute, part)
    this.#sequenceParallel = sequenceParallel && tp.size > 1
    this.#offloadedTo = part.first + (options.offloadedLayers ?? 0)
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
   * Logits [T, Vlocal] of this rank's columns, in paramsDtype; columns at or past vocabSize are padding. On a pipeline stage: of the
   * last chunk, from `batch.hidden`. A pass with a cache runs without sequence parallelism.
   * @param cache - holds the keys before this batch; this call's are appended.
   * @param observe - sees the hidden states between the parts; without one nothing is kept for it.
   */
  async forward(ctx: Ctx, batch: DeviceBatch, cache?: KvCache, observe?: ForwardObserver): Promise<Tensor> {
    const { finalLayernorm } = this.decoder
    const { outputLayer } = this
    if (finalLayernorm === null || outputLayer === null)
      throw new ViaductError(
        'ERR_ASSERT',
        'gpt',
        'expected the chunk with the output layer, got one before it: call pass',
      )
    return await withScope(ctx, async (scoped) => {
      const inner = scoped.with({ batch: this.#coordinates(scoped, batch, cache) })
      const hidden = await this.#body(inner, batch, cache, observe)
      inner.stream.setPlace('output_layer')
      const normed = await finalLayernorm.forward(inner, hidden.x, hidden.residual)
      await observe?.('decoder.final_layernorm', { x: normed.y, residual: null })
      return await outputLayer.forward(inner, normed.y)
    })
  }

  /**
   * What a chunk of a pipeline gives to the next one: the hidden states [hiddenRows, H] behind its last layer. The residual stream is
   * added here, as the next norm would: the same bits, and half as much to send.
   * @param cache - as of `forward`.
   */
  async pass(ctx: Ctx, batch: DeviceBatch, cache?: KvCache): Promise<Tensor> {
    return await withScope(ctx, async (scoped) => {
      const inner = scoped.with({ batch: this.#coordinates(scoped, batch, cache) })
      const { x, residual } = await this.#body(inner, batch, cache)
      return residual === null ? x : add(inner, { a: x, b: residual }).y
    })
  }

  /** Embedding, or the hidden states that came, and this chunk's layers. */
  async #body(ctx: Ctx, batch: DeviceBatch, cache?: KvCache, observe?: ForwardObserver): Promise<Hidden> {
    if (this.config.paramsDtype === 'float16') {
      throw new ViaductError(
        'ERR_UNSUPPORTED',
        'gpt',
        'float16 models are carried, not computed: load with paramsDtype float32 (exact) or bfloat16',
      )
    }
    const drops = this.training && cache === undefined
    if (drops && this.config.attentionDropout > 0)
      throw new ViaductError(
        'ERR_UNSUPPORTED',
        'gpt',
        `expected attentionDropout 0 in training, got ${this.config.attentionDropout}: use hiddenDropout, or set training to false`,
      )
    const at = this.#attentionContext(ctx, batch)
    let hidden: Hidden = { x: await this.#input(ctx, batch, drops ? this.config.hiddenDropout : 0), residual: null }
    if (this.part.hasEmbedding) await observe?.('embedding', hidden)
    for (const { layers, again } of this.runs) {
      hidden =
        again && ctx.tape !== null && observe === undefined
          ? await this.#runAgain(ctx, layers, hidden, at)
          : await this.#run(ctx, layers, hidden, at, { cache, observe })
    }
    cache?.advance(batch.seqLength)
    return hidden
  }

  /**
   * One layer after the other. Frees what each has read: without a tape nobody needs it; with one, the tape holds what it saved.
   * @param options - `kept` is not freed.
   */
  async #run(
    ctx: Ctx,
    layers: readonly number[],
    start: Hidden,
    at: SharedAttentionContext,
    options: { cache?: KvCache | undefined; observe?: ForwardObserver | undefined; kept?: Tensor | undefined },
  ): Promise<Hidden> {
    const { cache, observe, kept } = options
    const offloads = ctx.tape !== null && this.#offloadedTo > this.part.first
    using offload = offloads ? new ActivationOffload(ctx.tape as Tape) : null
    let hidden = start
    for (const i of layers) {
      ctx.stream.setPlace(`decoder.layers.${i}`)
      const layer = this.decoder.layers.get(i) as TransformerLayer
      const next = await withScope(ctx, (inner) => layer.forward(inner, hidden, at, this.training, cache?.layer(i)))
      for (const t of [hidden.x, hidden.residual])
        if (t && t !== kept && t !== next.x && t !== next.residual) t.dispose()
      hidden = next
      if (i < this.#offloadedTo) offload?.leave(ctx)
      else offload?.end(ctx)
      await observe?.(`decoder.layers.${i}`, hidden)
    }
    return hidden
  }

  /** As #run, and again in the backward pass: of all these layers the tape keeps their input, x + residual, alone. */
  async #runAgain(
    ctx: Ctx,
    layers: readonly number[],
    { x, residual }: Hidden,
    at: SharedAttentionContext,
  ): Promise<Hidden> {
    const input = residual === null ? x : add(ctx, { a: x, b: residual }).y
    const { rotary, firstKey, keyEnd } = at
    const reads = [rotary?.cos ?? null, rotary?.sin ?? null, rotary?.positions ?? null, firstKey, keyEnd]
    const run = async (inner: Ctx, [again]: readonly Tensor[]) => {
      const out = await this.#run(inner, layers, { x: again as Tensor, residual: null }, at, { kept: again })
      return [out.x, out.residual] as const
    }
    const [y, rest] = await recompute(ctx, [input], run, reads)
    for (const t of [x, residual, input]) t?.dispose()
    return { x: y, residual: rest }
  }

  /** Rows of hidden states between the linears for a batch of so many tokens: all, or with sequence parallelism this rank's run. */
  hiddenRows(tokens: number, cache?: KvCache): number {
    return this.#sequenceParallel && cache === undefined ? sharedRows(tokens, this.#tp) : tokens
  }

  /** [hiddenRows, H]: embedded tokens where the model begins, else what the chunk before gave. */
  async #input(ctx: Ctx, { tokens, hidden }: DeviceBatch, p: number): Promise<Tensor> {
    if (!this.part.hasEmbedding) {
      if (hidden) return hidden
      throw new ViaductError('ERR_ASSERT', 'gpt', 'expected hidden states from the chunk before this one, got none')
    }
    ctx.stream.setPlace('embedding')
    const { wordEmbeddings } = this.embedding as LanguageModelEmbedding
    const embedded = await wordEmbeddings.forward(ctx, tokens)
    const x = dropout(ctx, { x: embedded, p, site: 0 })
    if (x !== embedded) embedded.dispose()
    return x
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

  /** A cache for generation with this model, or of a chunk's own layers; the caller disposes it. */
  createCache(ctx: Ctx, batchSize: number, maxLength: number): KvCache {
    const { numQueryGroups, kvChannels: channels, paramsDtype: dtype } = this.config
    const { first: firstLayer, end } = this.part
    const groups = Math.max(1, numQueryGroups / this.#tp.size)
    return KvCache.create(ctx, {
      firstLayer,
      numLayers: end - firstLayer,
      batchSize,
      maxLength,
      groups,
      channels,
      dtype,
    })
  }

  /** Of the layers with experts, in their order. */
  get routers(): TopKRouter[] {
    return [...this.decoder.layers.values()].flatMap(({ mlp }) => (mlp instanceof MoELayer ? [mlp.router] : []))
  }

  override dispose(): void {
    this.#rotary.dispose()
    this.routerTotals.dispose()
    super.dispose()
  }

  /** Coordinates of the rows that this rank has between the linears: of all tokens, or with sequence parallelism of its run. */
  #coordinates(ctx: Ctx, { sampleIds, positions }: DeviceBatch, cache?: KvCache): BatchCoordinates {
    if (!this.#sequenceParallel || cache !== undefined) return { sampleIds, positions }
    const [own, places] = [sampleIds, positions].map((t) => ownRun(ctx, t, this.#tp)) as [Tensor, Tensor]
    return { sampleIds: own, positions: places, sharedTokens: positions.shape[0] as number }
  }

  #attentionContext(ctx: Ctx, batch: DeviceBatch): SharedAttentionContext {
    const { batchSize, positions, firstKey, keyEnd, maxPosition, context = null } = batch
    const tables = this.#rotary.tables(ctx, maxPosition)
    return {
      batchSize,
      rotary: { ...tables, positions, interleaved: this.config.rotaryInterleaved },
      firstKey,
      keyEnd,
      context,
    }
  }
}
