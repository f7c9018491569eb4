// Main gradients of a model: float32, in one buffer; their sums over ranks and their global norm. Gradients are sums over tokens;
// the division by the number of tokens happens in the optimizer's gradient factor. Each data-parallel rank counts its own range of
// each bucket only, whether it has the sums of that range alone (reduce-scatter) or of all (all-reduce): the same bits either way.
import { native } from '../addon/load.js'
import { assert } from '../base/errors.js'
import type { Parameter } from '../nn/parameter.js'
import type { TrainableWeight } from '../ops/weight.js'
import { allReduce, reduceScatterInPlace } from '../parallel/collectives.js'
import { sharedAxes, sumSharedGradients } from '../parallel/gradientSums.js'
import { tensorParallelAxis } from '../parallel/productPieces.js'
import type { Ctx } from '../tensor/ctx.js'
import { volume } from '../tensor/region.js'
import { withScope } from '../tensor/scope.js'
import { Tensor } from '../tensor/tensor.js'
import { type Bucket, type FlatLayout, intersect, type Range } from './flatLayout.js'

/** The communication stream of sums and gathers over data-parallel ranks, those of experts too; and the axis of all other parameters. */
export const dataParallelAxis = 'dp_cp'

export interface GradientOptions {
  /** Each data-parallel rank gets the sums of its own ranges only. */
  readonly sharded: boolean
  /** Buckets are summed beside the backward pass, on the axis's communication stream. */
  readonly overlap: boolean
}

/** Main gradients as a training step and the optimizer see them. */
export interface StepGradients {
  readonly layout: FlatLayout
  /** Before the first micro-batch of a step. */
  zero(ctx: Ctx): void
  /** What is told of each weight in the backward passes of the last micro-batch; undefined: nothing needs to be. */
  listener(ctx: Ctx): ((weight: TrainableWeight) => void) | undefined
  /** After the last micro-batch: what this rank updates is summed, for what is enqueued from here on. */
  reduce(ctx: Ctx): void
  /** A run of what this rank updates, owned by `ctx.scope`. */
  range(ctx: Ctx, range: Range): Tensor
  /** Sum of squares of the gradients that this rank owns, in float64. */
  sumOfSquares(ctx: Ctx): Promise<number>
  /** Names of parameters whose gradient has a value that is not finite on this rank; before data-parallel ranks were added. */
  notFinite(ctx: Ctx): Promise<string[]>
  dispose(): void
}

export class Gradients implements StepGradients {
  readonly #options: GradientOptions
  /** Some bucket's gradients are summed over ranks. */
  readonly #several: boolean
  readonly #flat: Tensor
  readonly #owned: readonly Range[]
  /** float64 [parameters]: sums of squares on this rank before data-parallel ones are added: which rank made a NaN. */
  readonly #squares: Tensor
  /** Place in layout.parameters, and of the bucket. */
  readonly #places: ReadonlyMap<TrainableWeight, { readonly index: number; readonly bucket: number }>
  /** How often each gradient is added to in a backward pass, as the first one showed. */
  #expected: ReadonlyMap<TrainableWeight, number> | null = null
  #added = new Map<TrainableWeight, number>()
  /** Parameters of each bucket whose gradients are not complete. */
  #missing: number[] = []
  /** The bucket that is summed next; from the last to the first, the same on all ranks. */
  #next: number

  /** Gives each parameter its main gradient: a view of one buffer of zeros. */
  constructor(
    ctx: Ctx,
    readonly layout: FlatLayout,
    options: Partial<GradientOptions> = {},
  ) {
    const several = layout.buckets.some((bucket) => ctx.groups.get(bucket.axis).size > 1)
    this.#several = several
    this.#options = { sharded: several && options.sharded === true, overlap: several && options.overlap === true }
    this.#flat = Tensor.zeros(ctx, [layout.length], 'float32').keep()
    this.#squares = Tensor.zeros(ctx, [Math.max(1, layout.parameters.length)], 'float64').keep()
    const own = layout.buckets.map((bucket) =>
      bucket.parts > 1 ? layout.part(bucket, ctx.groups.get(bucket.axis).rank) : bucket,
    )
    this.#owned = several ? intersect(layout.ownedRanges(), own) : layout.ownedRanges()
    this.#places = new Map(
      layout.buckets
        .flatMap(({ parameters }, bucket) => parameters.map((parameter) => ({ parameter, bucket })))
        .map(({ parameter, bucket }, index) => [parameter, { index, bucket }]),
    )
    this.#next = layout.buckets.length - 1
    for (const parameter of layout.parameters) parameter.mainGrad = this.#view(ctx, parameter).keep()
  }

  /** Before the first micro-batch of a step. */
  zero(ctx: Ctx): void {
    native.fill(ctx.stream.id, this.#flat.handle, 0)
    if (this.#several) native.fill(ctx.stream.id, this.#squares.handle, 0)
    const expected = this.#expected
    this.#added = new Map()
    this.#next = this.layout.buckets.length - 1
    this.#missing = this.layout.buckets.map(({ parameters }) => parameters.filter((p) => expected?.has(p)).length)
  }

  /** A run of the buffer, owned by `ctx.scope`. */
  range(ctx: Ctx, { start, length }: Range): Tensor {
    return this.#flat.view(ctx, [length], [1], start)
  }

  /**
   * What the backward passes of the last micro-batch tell of each weight (BackwardOptions.onWeight): a bucket whose gradients are
   * complete is summed beside the rest of the pass. Undefined where sums wait for `reduce`. The first step only counts.
   */
  listener(ctx: Ctx): ((weight: TrainableWeight) => void) | undefined {
    if (!this.#options.overlap) return undefined
    return (weight) => {
      const bucket = this.#places.get(weight)?.bucket
      if (bucket === undefined) return
      assert(
        bucket <= this.#next,
        `the gradient of ${weight.name} was added to more often than in the first step, after its sum had begun: set ddp.overlapGradReduce=false`,
      )
      const count = (this.#added.get(weight) ?? 0) + 1
      this.#added.set(weight, count)
      if (count !== this.#expected?.get(weight)) return
      this.#missing[bucket] = (this.#missing[bucket] as number) - 1
      while (this.#next >= 0 && this.#missing[this.#next] === 0) this.#sumNext(ctx)
    }
  }

  /** After the last micro-batch: sums what is left, over the axes that shards name, then over data-parallel ranks, in float32. */
  reduce(ctx: Ctx): void {
    if (this.#added.size > 0) this.#expected ??= this.#added
    if (!this.#several) return sumSharedGradients(ctx, this.layout.parameters)
    while (this.#next >= 0) this.#sumNext(ctx)
    if (this.#options.overlap) ctx.stream.wait(ctx.device.communication(dataParallelAxis))
  }

  #sumNext(compute: Ctx): void {
    const bucket = this.layout.buckets[this.#next--] as Bucket
    const ctx = this.#options.overlap ? compute.comm(dataParallelAxis) : compute
    const { parameters } = bucket
    const early = this.#options.overlap
      ? sumEarly(compute, ctx, parameters, (inner, which) => this.#measure(inner, which))
      : []
    const rest = parameters.filter((parameter) => !early.includes(parameter))
    this.#measure(ctx, rest)
    sumSharedGradients(ctx, rest)
    using range = this.range(ctx, bucket)
    const group = ctx.groups.get(bucket.axis)
    if (this.#options.sharded) reduceScatterInPlace(ctx, range, group)
    else allReduce(ctx, range, group)
  }

  #measure(ctx: Ctx, parameters: readonly Parameter[]): void {
    for (const parameter of parameters) {
      using sum = this.#squares.slice(ctx, 0, this.#places.get(parameter)?.index as number, 1)
      native.sumSquares(ctx.stream.id, sum.handle, (parameter.mainGrad as Tensor).handle)
    }
  }

  /** Sum of squares of the gradients as they are on this rank: of owned blocks in its own ranges only, in float64. */
  async sumOfSquares(ctx: Ctx): Promise<number> {
    return await withScope(ctx, async (inner) => {
      const acc = Tensor.zeros(inner, [1], 'float64')
      for (const range of this.#owned) native.sumSquares(ctx.stream.id, acc.handle, this.range(inner, range).handle)
      return await acc.item()
    })
  }

  /** Names of parameters whose gradient has a value that is not finite on this rank; before data-parallel ranks were added. */
  async notFinite(ctx: Ctx): Promise<string[]> {
    const { parameters } = this.layout
    if (!this.#several) {
      native.fill(ctx.stream.id, this.#squares.handle, 0)
      this.#measure(ctx, parameters)
    }
    const sums = new Float64Array((await this.#squares.bytes()).slice().buffer)
    return parameters.flatMap(({ name }, i) => (Number.isFinite(sums[i]) ? [] : [name]))
  }

  #view(ctx: Ctx, parameter: Parameter): Tensor {
    const { localShape } = parameter.shard
    using flat = this.#flat.slice(ctx, 0, this.layout.offsets.get(parameter) as number, volume(localShape))
    return flat.reshape(ctx, localShape)
  }

  dispose(): void {
    for (const parameter of this.layout.parameters) {
      parameter.mainGrad?.dispose()
      parameter.mainGrad = null
    }
    this.#squares.dispose()
    this.#flat.dispose()
  }
}

/**
 * Sums over tp, on tp's stream, for what `ctx` does next. Not behind the data-parallel sums of earlier buckets on `ctx`: what tp does
 * next would wait for its turn until these are done.
 * @param measure - reads gradients before they are summed.
 * @returns the parameters that are summed over tp alone; the others are left.
 */
export function sumEarly(
  compute: Ctx,
  ctx: Ctx,
  parameters: readonly Parameter[],
  measure: (inner: Ctx, which: readonly Parameter[]) => void,
): Parameter[] {
  const early = parameters.filter((parameter) => {
    const axes = sharedAxes(ctx, parameter)
    return axes.length > 0 && axes.every((axis) => axis === tensorParallelAxis || axis === 'tp_kv')
  })
  if (early.length === 0) return early
  const tp = compute.comm(tensorParallelAxis)
  measure(tp, early)
  sumSharedGradients(tp, early)
  ctx.stream.wait(tp.stream)
  return early
}
