// Chooses each token's experts. Every rank of tp has the whole weight: with sequence parallelism it routes its own run of tokens, else
// all of them, like every other rank. Balance and size of logits are trained by losses of their own (ops/routerLosses.ts).
import { native } from '../addon/load.js'
import type { DType } from '../base/dtype.js'
import { nameHash } from '../base/nameHash.js'
import { Module } from '../nn/module.js'
import { type Init, Parameter } from '../nn/parameter.js'
import { linear, linearFloat32 } from '../ops/linear.js'
import { balance, jitter, type RowPlace, zLoss } from '../ops/routerLosses.js'
import { expertCounts, route } from '../ops/routing.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import { Tensor } from '../tensor/tensor.js'
import { allReduce } from './collectives.js'
import type { RouterTotals } from './routerTotals.js'
import { gatherShared, sharedRows } from './sharedRows.js'

/** What the log calls a balance loss. */
export const balanceNames = {
  aux_loss: 'load_balancing_loss',
  seq_aux_loss: 'seq_load_balancing_loss',
  global_aux_loss: 'global_load_balancing_loss',
} as const

/** Over which tokens experts are to be used alike. */
export type BalanceType = keyof typeof balanceNames

export interface RouterConfig {
  readonly numExperts: number
  readonly topk: number
  /** Softmax over all experts, then the highest without another normalisation; else softmax over the chosen ones. */
  readonly preSoftmax: boolean
  readonly scoreFunction: 'softmax' | 'sigmoid'
  /** Neighbouring experts in so many groups, of which a token's experts come from the best groupTopk. */
  readonly groups: number
  readonly groupTopk: number
  /** Factor of the weights. */
  readonly scaling: number
  /** Experts have a bias that is moved by this after each step; null: they have none. */
  readonly biasUpdateRate: number | null
  /** The product is in float32. */
  readonly float32: boolean
  /**
   * Of each balance loss its coefficient: over the tokens of a micro-batch; of each sequence; of the micro-batches of all ranks so far in
   * the step, on average. Those that are trained together add up.
   */
  readonly auxLossCoeffs: Readonly<Partial<Record<BalanceType, number>>>
  readonly zLossCoeff: number
  readonly jitterEps: number
  /** Random logits, alike in every step. */
  readonly forceBalance: boolean
}

/** A router that does nothing out of the ordinary. */
export const plainRouter = {
  scoreFunction: 'softmax',
  groups: 1,
  groupTopk: 1,
  scaling: 1,
  biasUpdateRate: null,
  float32: false,
  auxLossCoeffs: {},
  zLossCoeff: 0,
  jitterEps: 0,
  forceBalance: false,
} as const satisfies Partial<RouterConfig>

export interface RouterOptions {
  readonly config: RouterConfig
  readonly tp: Group
  readonly weight: ShardSpec
  /** Of the experts' bias, where they have one. */
  readonly bias: ShardSpec | null
  readonly dtype: DType
  readonly init: Init
  /** Index in the whole model: for randomness. */
  readonly layer: number
  /** Losses are told here. */
  readonly totals: RouterTotals
}

export class TopKRouter extends Module {
  readonly weight: Parameter
  /** float32 [E], moved by `updateExpertBias`; no gradient. */
  readonly expertBias: Parameter | null
  readonly config: RouterConfig
  readonly #tp: Group
  readonly #layer: number
  readonly #totals: RouterTotals
  /** float32 [E]: how often this rank's tokens chose each expert. */
  #chosen: Tensor | null = null
  /** float32 [1, E]: how often all ranks' tokens chose each expert in the step, for global_aux_loss. */
  #global: { readonly sum: Tensor; microBatches: number } | null = null

  constructor({ config, tp, weight, bias, dtype, init, layer, totals }: RouterOptions) {
    super()
    this.config = config
    this.#tp = tp
    this.#layer = layer
    this.#totals = totals
    this.weight = this.parameter('weight', new Parameter(weight, dtype, init))
    if (config.biasUpdateRate === null || bias === null) this.expertBias = null
    else {
      this.expertBias = this.parameter('expert_bias', new Parameter(bias, 'float32', { kind: 'constant', value: 0 }))
      this.expertBias.requiresGrad = false
    }
  }

  /**
   * x [rows, H] to weights float32 [rows, K] and experts int32 [rows, K].
   * @param balanced - in training the sequences of the batch: gradients of the router's own losses are added, what it reads has noise.
   * Else null.
   */
  forward(ctx: Ctx, x: Tensor, balanced: number | null): { weights: Tensor; experts: Tensor } {
    const { topk, preSoftmax, scoreFunction, groups, groupTopk, scaling, float32, jitterEps, forceBalance } =
      this.config
    const noisy = balanced !== null && jitterEps > 0
    const read = noisy ? jitter(ctx, { x, eps: jitterEps, site: this.#layer }) : x
    const logits = (float32 ? linearFloat32 : linear)(ctx, { x: read, weight: this.weight }).y
    if (noisy) read.dispose()
    if (forceBalance) this.#randomize(ctx, logits)
    const losses = balanced !== null && ctx.tape !== null
    const passed = losses ? this.#limitLogits(ctx, logits) : logits
    const sigmoid = scoreFunction === 'sigmoid'
    const normalize = sigmoid ? topk > 1 : !preSoftmax
    const bias = this.expertBias?.data ?? null
    const how = { logits: passed, topk, sigmoid, normalize, groups, groupTopk, scaling, bias }
    const { weights, experts, scores } = route(ctx, how)
    if (passed !== logits) passed.dispose()
    logits.dispose()
    if (!losses) return { weights, experts }
    if (bias !== null) this.#count(ctx, experts)
    return { weights: this.#balance(ctx, { weights, experts, scores }, balanced), experts }
  }

  /** Where this rank's rows are among the tokens that its ranks of tp share. */
  #place(ctx: Ctx, rows: number): RowPlace & { readonly shared: boolean } {
    const shared = ctx.batch?.sharedTokens
    if (shared === undefined) return { first: 0, tokens: rows, shared: false }
    return { first: this.#tp.rank * sharedRows(shared, this.#tp), tokens: shared, shared: true }
  }

  /**
   * Megatron's losses: each is its coefficient · E · sum over experts of (share of the choices) · (mean score), times the tokens, because
   * a step's gradient is divided by all its tokens. Sigmoid scores count over their sum.
   */
  #balance(ctx: Ctx, routed: { weights: Tensor; experts: Tensor; scores: Tensor }, sequences: number): Tensor {
    const { auxLossCoeffs, numExperts, topk, scoreFunction } = this.config
    const wanted = (Object.entries(auxLossCoeffs) as [BalanceType, number][]).filter(([, coeff]) => coeff > 0)
    if (wanted.length === 0) return routed.weights
    const { experts, scores } = routed
    const { first, tokens, shared } = this.#place(ctx, experts.shape[0] as number)
    const chosen = this.#highest(ctx, scores, experts)
    const all = shared ? gatherShared(ctx, chosen, tokens, this.#tp) : chosen
    // Of sequences that ranks share: all of their tokens.
    const cp = ctx.groups.get('cp')
    const normalize = scoreFunction === 'sigmoid'
    let { weights } = routed
    for (const [type, coeff] of wanted) {
      const runs = type === 'seq_aux_loss' ? sequences : 1
      const group = type === 'global_aux_loss' ? ctx.groups.get('dp_cp') : cp
      const own = allReduce(ctx, expertCounts(ctx, all, numExperts, runs), group)
      const counts = type === 'global_aux_loss' ? this.#averaged(ctx, own) : own
      const factor = (coeff * numExperts) / (((group.size * tokens) / runs) * topk)
      const told = this.#totals.told(ctx, balanceNames[type], 1 / (coeff * cp.size * tokens))
      weights = balance(ctx, { weights, scores, counts, factor, first, tokens, normalize, told }).weights
    }
    return weights
  }

  /** The mean of these counts and those of the step's micro-batches before. */
  #averaged(ctx: Ctx, counts: Tensor): Tensor {
    const { id } = ctx.stream
    this.#global ??= { sum: Tensor.zeros(ctx, counts.shape, 'float32').keep(), microBatches: 0 }
    const { sum } = this.#global
    native.accumulate(id, sum.handle, counts.handle)
    const mean = ctx.empty(counts.shape, 'float32')
    native.copy(id, mean.handle, sum.handle)
    native.scale(id, mean.handle, Tensor.full(ctx, [1], 'float32', 1 / ++this.#global.microBatches).handle)
    return mean
  }

  /** The experts with the highest scores, as the balance loss counts them: whatever groups and bias say. */
  #highest(ctx: Ctx, scores: Tensor, experts: Tensor): Tensor {
    const { topk, groups } = this.config
    if (groups === 1 && this.expertBias === null) return experts
    // Scores themselves as logits: their order is all that is asked.
    return route(ctx.with({ tape: null }), { logits: scores, topk, normalize: false }).experts
  }

  /** Adds to the choices since the last update. */
  #count(ctx: Ctx, experts: Tensor): void {
    const { first, tokens } = this.#place(ctx, experts.shape[0] as number)
    const rows = Math.max(0, Math.min(experts.shape[0] as number, tokens - first))
    const { numExperts } = this.config
    this.#chosen ??= Tensor.zeros(ctx, [numExperts], 'float32').keep()
    if (rows === 0) return
    const counts = expertCounts(ctx, experts.slice(ctx, 0, 0, rows), numExperts)
    native.accumulate(ctx.stream.id, this.#chosen.handle, counts.reshape(ctx, [numExperts]).handle)
  }

  beginStep(ctx: Ctx): void {
    if (this.#chosen !== null) native.fill(ctx.stream.id, this.#chosen.handle, 0)
    if (this.#global === null) return
    native.fill(ctx.stream.id, this.#global.sum.handle, 0)
    this.#global.microBatches = 0
  }

  /**
   * Moves the experts' bias by how often they were chosen in this step, over all ranks that have this layer, all of which call
   * it. The same numbers on each of them.
   */
  async updateExpertBias(ctx: Ctx): Promise<void> {
    const { biasUpdateRate: rate, numExperts: E } = this.config
    if (this.expertBias === null || rate === null) return
    const counts = ctx.empty([E], 'float32')
    if (this.#chosen === null) native.fill(ctx.stream.id, counts.handle, 0)
    else native.copy(ctx.stream.id, counts.handle, this.#chosen.handle)
    // Without sequence parallelism each rank of tp counted all tokens: a factor that no sign depends on.
    for (const axis of ['tp', 'dp_cp']) allReduce(ctx, counts, ctx.groups.get(axis))
    const [chosen, bias] = [await counts.toFloat32Array(), await this.expertBias.data.toFloat32Array()]
    const mean = chosen.reduce((a, b) => a + b, 0) / E
    const moved = bias.map((value, e) => value + rate * Math.sign(mean - (chosen[e] as number)))
    native.copy(ctx.stream.id, this.expertBias.data.handle, Tensor.fromHost(ctx, moved, [E], 'float32').handle)
  }

  override dispose(): void {
    this.#chosen?.dispose()
    this.#chosen = null
    this.#global?.sum.dispose()
    this.#global = null
    super.dispose()
  }

  /** Megatron's loss: zLossCoeff · mean of the squared log-sum-exps, times the tokens. */
  #limitLogits(ctx: Ctx, logits: Tensor): Tensor {
    const coefficient = this.config.zLossCoeff
    if (coefficient === 0) return logits
    const { first, tokens } = this.#place(ctx, logits.shape[0] as number)
    const told = this.#totals.told(ctx, 'z_loss', 1 / (ctx.groups.get('cp').size * tokens))
    return zLoss(ctx, { logits, coefficient, first, tokens, told }).logits
  }

  /** Which experts tokens go to no longer depends on what they are; gradients pass as if the numbers were the product's. */
  #randomize(ctx: Ctx, logits: Tensor): void {
    const [, E = 0] = logits.shape
    const hash = nameHash(`router of layer ${this.#layer}`)
    native.randomNormal(ctx.stream.id, logits.handle, ctx.rng.seed, hash, [0, 0], [E, 1], 0, 1)
  }
}
