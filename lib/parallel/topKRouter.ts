// Chooses each token's experts. Every rank of tp has the whole weight: with sequence parallelism it routes its own run of tokens, else
// all of them, like every other rank.
import type { DType } from '../base/dtype.js'
import { Module } from '../nn/module.js'
import { type Init, Parameter } from '../nn/parameter.js'
import { linear } from '../ops/linear.js'
import { balance, expertCounts, route } from '../ops/routing.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { allReduce } from './collectives.js'
import { gatherShared, sharedRows } from './sharedRows.js'

export interface RouterConfig {
  readonly numExperts: number
  readonly topk: number
  /** Softmax over all experts, then the highest without another normalisation; else softmax over the chosen ones. */
  readonly preSoftmax: boolean
  /** Over which tokens experts are to be used alike: those of a micro-batch, or of each sequence. */
  readonly loadBalancing: 'aux_loss' | 'seq_aux_loss' | 'none'
  readonly auxLossCoeff: number
}

export interface RouterOptions {
  readonly config: RouterConfig
  readonly tp: Group
  readonly weight: ShardSpec
  readonly dtype: DType
  readonly init: Init
}

export class TopKRouter extends Module {
  readonly weight: Parameter
  readonly config: RouterConfig
  readonly #tp: Group

  constructor({ config, tp, weight, dtype, init }: RouterOptions) {
    super()
    this.config = config
    this.#tp = tp
    this.weight = this.parameter('weight', new Parameter(weight, dtype, init))
  }

  /**
   * x [rows, H] to weights float32 [rows, K] and experts int32 [rows, K].
   * @param balanced - sequences of the batch: adds the gradient of the balance loss; null: none.
   */
  forward(ctx: Ctx, x: Tensor, balanced: number | null): { weights: Tensor; experts: Tensor } {
    const { topk, preSoftmax } = this.config
    const logits = linear(ctx, { x, weight: this.weight }).y
    const { weights, experts, scores } = route(ctx, { logits, topk, normalize: !preSoftmax })
    logits.dispose()
    if (balanced === null || ctx.tape === null) return { weights, experts }
    return { weights: this.#balance(ctx, { weights, experts, scores }, balanced), experts }
  }

  /**
   * Megatron's loss: auxLossCoeff · E · sum over experts of (share of the choices) · (mean score), times the tokens, because a step's
   * gradient is divided by all its tokens.
   */
  #balance(ctx: Ctx, routed: { weights: Tensor; experts: Tensor; scores: Tensor }, sequences: number): Tensor {
    const { loadBalancing, auxLossCoeff, numExperts, topk } = this.config
    if (loadBalancing === 'none' || auxLossCoeff === 0) return routed.weights
    const { weights, experts, scores } = routed
    const [rows = 0] = experts.shape
    const tokens = ctx.batch?.sharedTokens ?? rows
    const shared = ctx.batch?.sharedTokens !== undefined
    const all = shared ? gatherShared(ctx, experts, tokens, this.#tp) : experts
    const runs = loadBalancing === 'seq_aux_loss' ? sequences : 1
    // Of sequences that ranks share: all of their tokens.
    const cp = ctx.groups.get('cp')
    const counts = allReduce(ctx, expertCounts(ctx, all, numExperts, runs), cp)
    const factor = (auxLossCoeff * numExperts) / (((cp.size * tokens) / runs) * topk)
    const first = shared ? this.#tp.rank * sharedRows(tokens, this.#tp) : 0
    return balance(ctx, { weights, scores, counts, factor, first, tokens }).weights
  }
}
