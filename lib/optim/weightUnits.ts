// Parameters of fully sharded data parallelism: each rank keeps its range of each bucket; a unit (unitPasses.ts) is whole from its
// gather to its release alone. What is asked for next is gathered on the communication stream beside compute. A parameter that is asked
// for brings its unit, so nothing that reads parameters knows of this.
import { native } from '../addon/load.js'
import { assert } from '../base/errors.js'
import { contiguousStrides } from '../base/shape.js'
import type { ShardedWeights, UnitStep } from '../models/unitPasses.js'
import type { Parameter } from '../nn/parameter.js'
import { gatherRowsInto } from '../parallel/collectives.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Event } from '../tensor/stream.js'
import { Tensor } from '../tensor/tensor.js'
import type { ShardingUnits } from './adamw.js'
import type { Bucket, FlatLayout, Range, Segment } from './flatLayout.js'
import { dataParallelAxis } from './gradients.js'
import type { UnitGradients } from './unitGradients.js'

export interface WeightUnitsOptions {
  /** The next unit is gathered beside the compute of this one. */
  readonly prefetches: boolean
  readonly keepsForBackward: boolean
}

/** A unit that is whole, or will be. */
interface Whole {
  /** By bucket of the unit. */
  readonly tensors: readonly Tensor[]
  /** Stands behind the gather, until the parameters have the memory. */
  arrival: Event | null
}

/** A step of a pass that has weights, and whether they stay behind it. */
type Turn = Pick<UnitStep, 'unit' | 'stays'>

export class WeightUnits implements ShardedWeights {
  readonly keepsForBackward: boolean
  readonly #ctx: Ctx
  readonly #prefetches: boolean
  /** This rank's range of each bucket. */
  readonly #shards: readonly Tensor[]
  /** Places of a unit's buckets. */
  readonly #buckets = new Map<string, number[]>()
  readonly #whole = new Map<string, Whole>()
  /** Whose weights are read at present. */
  #current: Turn | null = null
  /** What is read next, the next one first; null outside of passes: whoever asks gets a unit, without looking ahead. */
  #turns: readonly Turn[] | null = null
  #next = 0
  #passes: readonly (readonly UnitStep[])[] = []
  #pass = 0
  /** All units stay, whoever asks. */
  #holdsAll = false

  /** Takes the parameters' memory. Every rank calls it. */
  constructor(
    ctx: Ctx,
    readonly layout: FlatLayout,
    { unitOf }: ShardingUnits,
    readonly gradients: UnitGradients,
    { prefetches, keepsForBackward }: WeightUnitsOptions,
  ) {
    this.#ctx = ctx.with({ tape: null, scope: new Scope(), stream: ctx.device.stream })
    this.#prefetches = prefetches
    this.keepsForBackward = keepsForBackward
    this.#shards = layout.buckets.map((bucket, index) => {
      const unit = unitOf(bucket.parameters[0] as Parameter)
      this.#buckets.set(unit, [...(this.#buckets.get(unit) ?? []), index])
      const shard = this.#take(bucket)
      for (const parameter of bucket.parameters) {
        parameter.data.evict(() => this.need(unit))
        parameter.beforeUse = () => this.need(unit)
      }
      return shard
    })
    gradients.beforeOpen = (unit) => {
      if (this.#turns?.[this.#next]?.unit === unit) this.need(unit)
    }
  }

  /** What this rank has of a parameter in a range of a bucket, flat; the caller's. */
  part(index: number, { start }: Range, { offset, count }: Segment): Tensor {
    const bucket = this.layout.buckets[index] as Bucket
    const own = this.layout.part(bucket, this.#ctx.groups.get(bucket.axis).rank)
    return (this.#shards[index] as Tensor).view(this.#ctx, [count], [1], start - own.start + offset).keep()
  }

  begin(passes: readonly (readonly UnitStep[])[]): void {
    this.end()
    const turns: Turn[] = []
    for (const { unit, weights, stays } of passes.flat()) {
      if (!weights || this.#bucketsOf(unit).length === 0) continue
      if (turns.at(-1)?.unit === unit) turns.pop()
      turns.push({ unit, stays })
    }
    this.#passes = passes
    this.#pass = 0
    this.#turns = turns
    this.#next = 0
  }

  endPass(): void {
    this.gradients.closeAll()
    this.#pass++
  }

  skipPass(): void {
    for (const { unit, weights, gradients } of this.#passes[this.#pass] ?? []) {
      if (weights && this.#bucketsOf(unit).length > 0) this.need(unit)
      if (gradients) this.gradients.open(unit)
    }
    this.endPass()
  }

  end(): void {
    this.#turns = null
    this.#current = null
    this.#ctx.scope.drain()
    if (!this.#holdsAll) for (const unit of [...this.#whole.keys()]) this.#release(unit)
  }

  /** Makes a unit whole for what is enqueued on the compute stream from here on. Every rank that has parts of it calls. */
  need(unit: string): void {
    if (this.#current?.unit === unit || (this.#holdsAll && this.#whole.has(unit))) return
    const turn =
      this.#turns === null ? { unit, stays: this.#holdsAll } : (this.#turns[this.#next++] as Turn | undefined)
    assert(
      turn?.unit === unit,
      `${unit} was asked for where ${turn?.unit ?? 'nothing'} comes next: a pass of sharded parameters runs each unit in its order`,
    )
    if (this.#current !== null && !this.#current.stays) this.#release(this.#current.unit)
    this.#current = turn
    this.#arrive(unit)
    const after = this.#turns?.[this.#next]
    if (this.#prefetches && after !== undefined && !this.#whole.has(after.unit)) this.#gather(after.unit)
  }

  /** All parameters are whole while `body` runs; what it writes into them stays. Every rank calls it. */
  async whole(body: () => Promise<void>): Promise<void> {
    this.end()
    this.#holdsAll = true
    try {
      for (const unit of this.#buckets.keys()) this.need(unit)
      await body()
      for (const [unit, { tensors }] of this.#whole) {
        for (const [i, index] of this.#bucketsOf(unit).entries()) {
          using own = this.#ownRange(this.layout.buckets[index] as Bucket, tensors[i] as Tensor)
          native.copy(this.#ctx.stream.id, (this.#shards[index] as Tensor).handle, own.handle)
        }
      }
    } finally {
      this.#holdsAll = false
      this.end()
    }
  }

  dispose(): void {
    this.end()
    for (const parameter of this.layout.parameters) parameter.beforeUse = null
    for (const shard of this.#shards) shard.dispose()
    this.#ctx.scope.close()
  }

  /** This rank's range of the bucket, with the values that its parameters have. */
  #take(bucket: Bucket): Tensor {
    const ctx = this.#ctx
    const range = this.layout.part(bucket, ctx.groups.get(bucket.axis).rank)
    const shard = Tensor.zeros(ctx, [range.length], bucket.dtype).keep()
    for (const { parameter, begin, count, offset } of this.layout.segments(bucket, range)) {
      using to = shard.view(ctx, [count], [1], offset)
      using from = parameter.data.view(ctx, [count], [1], begin)
      native.copy(ctx.stream.id, to.handle, from.handle)
    }
    return shard
  }

  /** None of a unit whose parameters are not trained: those are whole, and nobody asks for it. */
  #bucketsOf(unit: string): readonly number[] {
    return this.#buckets.get(unit) ?? []
  }

  #ownRange(bucket: Bucket, whole: Tensor): Tensor {
    const { start, length } = this.layout.part(bucket, this.#ctx.groups.get(bucket.axis).rank)
    return whole.view(this.#ctx, [length], [1], start - bucket.start)
  }

  /** Begins to gather a unit, behind what the compute stream has been given so far. */
  #gather(unit: string): void {
    const ctx = this.#ctx
    const indices = this.#bucketsOf(unit)
    const tensors = indices.map((index) => {
      const { length, dtype } = this.layout.buckets[index] as Bucket
      return Tensor.empty(ctx, [length], dtype).keep()
    })
    const comm = ctx.comm(dataParallelAxis)
    for (const [i, index] of indices.entries()) {
      const group = ctx.groups.get((this.layout.buckets[index] as Bucket).axis)
      gatherRowsInto(comm, tensors[i] as Tensor, this.#shards[index] as Tensor, group)
    }
    this.#whole.set(unit, { tensors, arrival: comm.stream.record() })
  }

  /** The unit's parameters have their memory, for what the compute stream is given from here on. */
  #arrive(unit: string): void {
    if (!this.#whole.has(unit)) this.#gather(unit)
    const whole = this.#whole.get(unit) as Whole
    if (!this.#wait(whole)) return
    for (const [i, index] of this.#bucketsOf(unit).entries()) {
      const bucket = this.layout.buckets[index] as Bucket
      for (const parameter of bucket.parameters) {
        const { localShape } = parameter.shard
        const begin = (this.layout.offsets.get(parameter) as number) - bucket.start
        const place = (whole.tensors[i] as Tensor).view(this.#ctx, localShape, contiguousStrides(localShape), begin)
        parameter.stored.refill(place)
      }
    }
  }

  #wait(whole: Whole): boolean {
    if (whole.arrival === null) return false
    this.#ctx.stream.wait(whole.arrival)
    whole.arrival.dispose()
    whole.arrival = null
    return true
  }

  #release(unit: string): void {
    const whole = this.#whole.get(unit)
    if (whole === undefined) return
    this.#whole.delete(unit)
    if (!this.#wait(whole)) {
      for (const index of this.#bucketsOf(unit))
        for (const { stored } of (this.layout.buckets[index] as Bucket).parameters) stored.evict(() => this.need(unit))
    }
    for (const tensor of whole.tensors) tensor.dispose()
  }
}
