// `mlp` of a layer with experts: router, rows to their experts, experts, rows back. An expert takes all that come, or as many as its
// capacity. The number of rows of each is read on the host in the middle of the pass, unless rows are filled up to it.
import { Module } from '../nn/module.js'
import { add } from '../ops/elementwise.js'
import { capExperts, combine, expertCounts, expertOrder, expertSlots, spread } from '../ops/routing.js'
import { gatherRows } from '../parallel/collectives.js'
import { ExpertExchange, exchangePlan } from '../parallel/expertExchange.js'
import { GroupedExperts } from '../parallel/groupedExperts.js'
import { gatherForwardReduceScatterBackward, reduceScatterForwardGatherBackward } from '../parallel/regions.js'
import { TopKRouter } from '../parallel/topKRouter.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { type BlockSpec, inits } from './blockSpec.js'
import { LatentProjection } from './latentExperts.js'
import { expertCapacity, routerConfig } from './routerSettings.js'
import { SharedExperts } from './sharedExperts.js'

const total = (counts: ArrayLike<number>): number => Array.from(counts).reduce((sum, n) => sum + n, 0)

/** Of each token the weights, float32 [rows, K], and the experts, int32 [rows, K], that it goes to. */
interface Routed {
  readonly weights: Tensor
  readonly experts: Tensor
}

/** Rows by expert, where they stand, and of each rank how many go to each expert. */
interface Ordered {
  readonly source: Tensor
  readonly place: Tensor
  readonly rows: Float32Array
}

export class MoELayer extends Module {
  readonly router: TopKRouter
  readonly experts: GroupedExperts
  readonly sharedExperts: SharedExperts | null
  /** To the experts' width and back, where it is not the model's. */
  readonly fc1LatentProj: LatentProjection | null
  readonly fc2LatentProj: LatentProjection | null
  readonly #ep: Group
  readonly #etp: Group
  /** The ranks that hold one copy of the experts. */
  readonly #holders: Group
  /** Each of them gets all tokens. */
  readonly #gathers: boolean
  readonly #capacityFactor: number | null
  /** Experts have as many rows of each rank as their capacity, some of them zeros. */
  readonly #pads: boolean
  /** Else the last. */
  readonly #dropsLightest: boolean

  constructor(spec: BlockSpec) {
    super()
    const { config, tp } = spec
    const { paramsDtype: dtype } = config
    const numExperts = config.numMoeExperts as number
    const ep = spec.groups.get('ep')
    const perRank = numExperts / ep.size
    const prefix = `decoder.layers.${spec.layer}.mlp`
    const shards = (name: string) =>
      Array.from({ length: perRank }, (_, i) => ep.rank * perRank + i).map(
        (e) => [e, spec.shard(`${prefix}.experts.${name}.weight${e}`) as ShardSpec] as const,
      )
    this.#ep = ep
    this.#etp = spec.groups.get('etp')
    this.#holders = spec.groups.get('etp_ep')
    this.#gathers = config.moeTokenDispatcherType === 'allgather' && this.#holders.size > 1
    this.#capacityFactor = config.moeExpertCapacityFactor
    this.#pads = config.moePadExpertInputToCapacity
    this.#dropsLightest = config.moeTokenDropPolicy === 'probs'
    this.router = this.child(
      'router',
      new TopKRouter({
        config: routerConfig(config),
        tp,
        weight: spec.shard(`${prefix}.router.weight`) as ShardSpec,
        bias: spec.shard(`${prefix}.router.expert_bias`),
        dtype,
        init: inits(config).input,
        layer: spec.layer,
        totals: spec.routerTotals,
      }),
    )
    this.experts = this.child(
      'experts',
      new GroupedExperts({
        fc1: shards('linear_fc1'),
        fc2: shards('linear_fc2'),
        dtype,
        inits: inits(config),
        activation: config.activation,
        gated: config.gatedLinearUnit,
      }),
    )
    const latent = config.moeLatentSize !== null
    const fc1 = 'fc1_latent_proj'
    const fc2 = 'fc2_latent_proj'
    this.fc1LatentProj = latent ? this.child(fc1, new LatentProjection(spec, fc1)) : null
    this.fc2LatentProj = latent ? this.child(fc2, new LatentProjection(spec, fc2)) : null
    this.sharedExperts =
      config.moeSharedExpertIntermediateSize === null ? null : this.child('shared_experts', new SharedExperts(spec))
  }

  /**
   * x [rows, H], normalised, to what is added to the stream, [rows, H].
   * @param balanced - sequences of the batch where the balance loss counts, else null.
   */
  async forward(ctx: Ctx, x: Tensor, balanced: number | null): Promise<Tensor> {
    const { weights, experts: chosen } = this.router.forward(ctx, x, balanced)
    const routed = { weights, experts: this.#capped(ctx, chosen, weights) }
    const y = await this.#routed(ctx, x, routed)
    if (this.sharedExperts === null) return y
    const shared = await this.sharedExperts.forward(ctx, x)
    const both = add(ctx, { a: y, b: shared }).y
    y.dispose()
    shared.dispose()
    return both
  }

  /** What the routed experts give, [rows, H]. */
  async #routed(ctx: Ctx, x: Tensor, routed: Routed): Promise<Tensor> {
    const summed = await (this.#gathers ? this.#onGathered(ctx, x, routed) : this.#onOwn(ctx, x, routed))
    if (this.fc2LatentProj === null) return summed
    const y = this.fc2LatentProj.forward(ctx, summed)
    summed.dispose()
    return y
  }

  /** This rank's tokens through their experts, wherever they are. */
  async #onOwn(ctx: Ctx, x: Tensor, { weights, experts }: Routed): Promise<Tensor> {
    const { source, place, rows } = this.#pads ? this.#slots(ctx, experts) : await this.#order(ctx, experts)
    const narrow = this.fc1LatentProj?.forward(ctx, x) ?? x
    const sent = spread(ctx, { x: narrow, source, place }).y
    if (narrow !== x) narrow.dispose()
    const made = await this.#feed(ctx, sent, rows)
    const { y } = combine(ctx, { x: made, weights, source, place })
    made.dispose()
    return y
  }

  /** This rank's rows by expert, and of each rank how many go to each expert. */
  async #order(ctx: Ctx, experts: Tensor): Promise<Ordered> {
    const { numExperts } = this.router.config
    const { source: all, place } = expertOrder(ctx, experts, numExperts + this.#dropped)
    const counts = expertCounts(ctx, experts, numExperts)
    const rows = await gatherRows(ctx, counts, this.#holders).toFloat32Array()
    // Dropped choices come last: a token has no row for them.
    const first = this.#holders.rank * numExperts
    const source = this.#dropped === 0 ? all : all.slice(ctx, 0, 0, total(rows.subarray(first, first + numExperts)))
    return { source, place, rows }
  }

  /** The same where each rank, with as many tokens, has as many rows for each expert: nothing is read. */
  #slots(ctx: Ctx, experts: Tensor): Ordered {
    const { numExperts } = this.router.config
    const capacity = this.#capacityOf(experts)
    const slots = expertSlots(ctx, experts, { numExperts, capacity })
    return { ...slots, rows: new Float32Array(this.#holders.size * numExperts).fill(capacity) }
  }

  #capacityOf(experts: Tensor): number {
    return expertCapacity(experts.numel, this.router.config.numExperts, this.#capacityFactor as number)
  }

  /** 1 where choices may be dropped: they go to an expert behind the last one. */
  get #dropped(): 0 | 1 {
    return this.#capacityFactor === null ? 0 : 1
  }

  /** The chosen experts, less what goes beyond their capacity of this rank's tokens. */
  #capped(ctx: Ctx, experts: Tensor, weights: Tensor): Tensor {
    if (this.#capacityFactor === null) return experts
    const { numExperts } = this.router.config
    const capacity = this.#capacityOf(experts)
    return capExperts(ctx, experts, { numExperts, capacity, weights: this.#dropsLightest ? weights : null })
  }

  /** All ranks' tokens through this rank's experts; each token's parts of the sum come back from the ranks that have its experts. */
  async #onGathered(ctx: Ctx, x: Tensor, routed: Routed): Promise<Tensor> {
    const group = this.#holders
    const { numExperts } = this.router.config
    const experts = gatherRows(ctx, routed.experts, group)
    const counts = Array.from(await expertCounts(ctx, experts, numExperts).toFloat32Array())
    const perRank = numExperts / this.#ep.size
    const begin = this.#ep.rank * perRank
    const own = counts.slice(begin, begin + perRank)
    // Rows are sorted by expert: those of this rank's lie together.
    const { source: all, place } = expertOrder(ctx, experts, numExperts + this.#dropped)
    const first = total(counts.slice(0, begin))
    const source = all.slice(ctx, 0, first, total(own))
    const narrow = this.fc1LatentProj?.forward(ctx, x) ?? x
    const tokens = gatherForwardReduceScatterBackward(ctx, narrow, group)
    if (narrow !== x) narrow.dispose()
    const sent = spread(ctx, { x: tokens, source, place, first }).y
    tokens.dispose()
    const made = this.experts.forward(ctx, sent, own)
    const weights = gatherForwardReduceScatterBackward(ctx, routed.weights, group)
    const { y } = combine(ctx, { x: made, weights, source, place, first })
    made.dispose()
    return reduceScatterForwardGatherBackward(ctx, y, group)
  }

  /** Rows by expert through the experts, wherever they are. @param counts - of each rank how many go to each expert. */
  async #feed(ctx: Ctx, sent: Tensor, counts: Float32Array): Promise<Tensor> {
    const group = this.#holders
    if (group.size === 1) return this.experts.forward(ctx, sent, Array.from(counts))
    const { numExperts } = this.router.config
    const rows = Array.from({ length: group.size }, (_, rank) =>
      Array.from(counts.subarray(rank * numExperts, (rank + 1) * numExperts)),
    )
    const [ep, etp] = [this.#ep, this.#etp]
    const plan = exchangePlan(rows, { ep: ep.rank, etp: etp.rank, epSize: ep.size, etpSize: etp.size })
    const exchange = new ExpertExchange(ctx, plan, ep, etp)
    const made = this.experts.forward(ctx, exchange.there(ctx, sent), exchange.counts)
    return exchange.back(ctx, made)
  }
}
