// Main gradients of fully sharded parameters, float32: this rank's ranges in one buffer. A unit's gradients are whole from the first to
// the last addition of a micro-batch's backward pass; then a reduce-scatter on the communication stream gives each rank the sum of its
// range, which is added to what earlier micro-batches gave.
import { native } from '../addon/load.js'
import { assert } from '../base/errors.js'
import { contiguousStrides } from '../base/shape.js'
import type { Parameter } from '../nn/parameter.js'
import { reduceScatterInPlace } from '../parallel/collectives.js'
import { sumSharedGradients } from '../parallel/gradientSums.js'
import { tensorParallelAxis } from '../parallel/productPieces.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope, withScope } from '../tensor/scope.js'
import type { Event } from '../tensor/stream.js'
import { Tensor } from '../tensor/tensor.js'
import type { ShardingUnits } from './adamw.js'
import { type Bucket, type FlatLayout, intersect, type Range } from './flatLayout.js'
import { dataParallelAxis, type StepGradients, sumEarly } from './gradients.js'

export interface UnitGradientsOptions {
  /** Sums run beside the backward pass. */
  readonly overlap: boolean
}

/** A unit whose gradients are added to. */
interface Open {
  /** By bucket of the unit. */
  readonly tensors: readonly Tensor[]
}

export class UnitGradients implements StepGradients {
  /** Called before a unit's gradients are made. */
  beforeOpen: ((unit: string) => void) | null = null
  readonly #ctx: Ctx
  readonly #options: UnitGradientsOptions
  /** Of a unit that more than one part of the model adds to: it is complete when the pass ends. */
  readonly #isShared: (unit: string) => boolean
  readonly #flat: Tensor
  /** This rank's range of each bucket, and where it lies in the buffer. */
  readonly #ranges: readonly (Range & { readonly at: number })[]
  readonly #squares: Tensor
  readonly #places: ReadonlyMap<Parameter, number>
  readonly #buckets = new Map<string, number[]>()
  readonly #open = new Map<string, Open>()
  /** Whose sums are under way. */
  #leaving: { readonly tensors: readonly Tensor[]; readonly summed: readonly Event[] } | null = null

  constructor(
    ctx: Ctx,
    readonly layout: FlatLayout,
    { unitOf, isShared }: ShardingUnits,
    options: UnitGradientsOptions,
  ) {
    this.#ctx = ctx.with({ tape: null, scope: new Scope(), stream: ctx.device.stream })
    this.#options = options
    this.#isShared = isShared
    let at = 0
    this.#ranges = layout.buckets.map((bucket, index) => {
      const unit = unitOf(bucket.parameters[0] as Parameter)
      this.#buckets.set(unit, [...(this.#buckets.get(unit) ?? []), index])
      const range = layout.part(bucket, ctx.groups.get(bucket.axis).rank)
      at += range.length
      return { ...range, at: at - range.length }
    })
    this.#flat = Tensor.zeros(ctx, [Math.max(at, 1)], 'float32').keep()
    this.#places = new Map(layout.parameters.map((parameter, i) => [parameter, i]))
    this.#squares = Tensor.zeros(ctx, [Math.max(1, layout.parameters.length)], 'float64').keep()
    for (const parameter of layout.parameters) parameter.beforeGradient = () => this.open(unitOf(parameter))
  }

  zero(ctx: Ctx): void {
    native.fill(ctx.stream.id, this.#flat.handle, 0)
    native.fill(ctx.stream.id, this.#squares.handle, 0)
  }

  range(ctx: Ctx, { start, length }: Range): Tensor {
    const own = this.#ranges.find((range) => start >= range.start && start + length <= range.start + range.length)
    assert(own !== undefined, `elements ${start} to ${start + length} are gradients of another rank`)
    return this.#flat.view(ctx, [length], [1], own.at + start - own.start)
  }

  listener(): undefined {
    return undefined
  }

  /** Gives a unit's parameters main gradients of zeros; what is complete by that is summed. */
  open(unit: string): void {
    if (this.#open.has(unit) || !this.#buckets.has(unit)) return
    this.beforeOpen?.(unit)
    const complete = [...this.#open.keys()].filter((other) => !this.#isShared(other))
    // The first of a pass: what the pass before left has had a forward pass's time.
    if (complete.length === 0) this.#settle(this.#ctx)
    for (const other of complete) this.#close(other)
    const ctx = this.#ctx
    const tensors = (this.#buckets.get(unit) ?? []).map((index) => {
      const bucket = this.layout.buckets[index] as Bucket
      const flat = Tensor.zeros(ctx, [bucket.length], 'float32').keep()
      for (const parameter of bucket.parameters) {
        const { localShape } = parameter.shard
        const begin = (this.layout.offsets.get(parameter) as number) - bucket.start
        parameter.mainGrad = flat.view(ctx, localShape, contiguousStrides(localShape), begin).keep()
      }
      return flat
    })
    this.#open.set(unit, { tensors })
  }

  /** The pass that added to gradients is over. */
  closeAll(): void {
    for (const unit of [...this.#open.keys()]) this.#close(unit)
    this.#ctx.scope.drain()
  }

  /** Waits for the last sums. */
  reduce(ctx: Ctx): void {
    this.closeAll()
    this.#settle(ctx)
  }

  #close(unit: string): void {
    const { tensors } = this.#open.get(unit) as Open
    this.#open.delete(unit)
    this.#settle(this.#ctx)
    const compute = this.#ctx
    const { overlap } = this.#options
    const ctx = overlap ? compute.comm(dataParallelAxis) : compute
    let sumsEarly = false
    for (const [i, index] of (this.#buckets.get(unit) as number[]).entries()) {
      const bucket = this.layout.buckets[index] as Bucket
      const { parameters } = bucket
      const measure = (inner: Ctx, which: readonly Parameter[]) => this.#measure(inner, which)
      const early = overlap ? sumEarly(compute, ctx, parameters, measure) : []
      sumsEarly ||= early.length > 0
      const rest = parameters.filter((parameter) => !early.includes(parameter))
      this.#measure(ctx, rest)
      sumSharedGradients(ctx, rest)
      const group = ctx.groups.get(bucket.axis)
      const whole = tensors[i] as Tensor
      reduceScatterInPlace(ctx, whole, group)
      const range = this.#ranges[index] as Range
      using sum = this.range(ctx, range)
      using part = whole.view(ctx, [range.length], [1], range.start - bucket.start)
      native.add(ctx.stream.id, sum.handle, sum.handle, part.handle)
      for (const parameter of parameters) {
        parameter.mainGrad?.dispose()
        parameter.mainGrad = null
      }
    }
    // Memory comes back at once from streams that were waited for themselves.
    const streams = [ctx.stream, ...(sumsEarly ? [compute.device.communication(tensorParallelAxis)] : [])]
    this.#leaving = { tensors, summed: streams.map((stream) => stream.record()) }
    if (!overlap) this.#settle(compute)
  }

  /** The memory of the unit that was summed last is free for what `ctx` computes next. */
  #settle(ctx: Ctx): void {
    if (this.#leaving === null) return
    const { tensors, summed } = this.#leaving
    this.#leaving = null
    for (const event of summed) {
      ctx.stream.wait(event)
      event.dispose()
    }
    for (const tensor of tensors) tensor.dispose()
  }

  #measure(ctx: Ctx, parameters: readonly Parameter[]): void {
    for (const parameter of parameters) {
      using sum = this.#squares.slice(ctx, 0, this.#places.get(parameter) as number, 1)
      native.sumSquares(ctx.stream.id, sum.handle, (parameter.mainGrad as Tensor).handle)
    }
  }

  async sumOfSquares(ctx: Ctx): Promise<number> {
    const owned = intersect(this.layout.ownedRanges(), this.#ranges)
    return await withScope(ctx, async (inner) => {
      const acc = Tensor.zeros(inner, [1], 'float64')
      for (const range of owned) native.sumSquares(ctx.stream.id, acc.handle, this.range(inner, range).handle)
      return await acc.item()
    })
  }

  async notFinite(): Promise<string[]> {
    const sums = new Float64Array((await this.#squares.bytes()).slice().buffer)
    return this.layout.parameters.flatMap(({ name }, i) => (Number.isFinite(sums[i]) ? [] : [name]))
  }

  dispose(): void {
    for (const parameter of this.layout.parameters) parameter.beforeGradient = null
    for (const { tensors } of this.#open.values()) for (const tensor of tensors) tensor.dispose()
    this.#open.clear()
    this.#settle(this.#ctx)
    for (const parameter of this.layout.parameters) {
      parameter.mainGrad?.dispose()
      parameter.mainGrad = null
    }
    this.#squares.dispose()
    this.#flat.dispose()
    this.#ctx.scope.close()
  }
}
