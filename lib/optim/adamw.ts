// AdamW with float32 moments. bfloat16 parameters have float32 master weights, which are what is optimised; float32 parameters
// are changed in place. Sharded over data-parallel ranks, a rank has the state of its ranges only (flatLayout.ts). What changes
// per step travels in one device slot. The host may have a part of each range (hostUpdates.ts). State is named `optimizer.<slot>.<parameter>`.
import { native } from '../addon/load.js'
import type { DType } from '../base/dtype.js'
import { contiguousStrides } from '../base/shape.js'
import { type DdpSection, defaults } from '../config/sections.js'
import type { Parameter } from '../nn/parameter.js'
import type { Ctx } from '../tensor/ctx.js'
import { volume } from '../tensor/region.js'
import { type CopiesAxis, flatRanges, type ShardSpec } from '../tensor/shardSpec.js'
import { Tensor } from '../tensor/tensor.js'
import { Arrivals } from './arrivals.js'
import { type Bucket, FlatLayout, type Range, type Segment } from './flatLayout.js'
import { dataParallelAxis, Gradients, type StepGradients } from './gradients.js'
import { HostUpdates, type Staging } from './hostUpdates.js'
import { ParameterBuckets } from './parameterBuckets.js'
import { UnitGradients } from './unitGradients.js'
import { WeightUnits } from './weightUnits.js'

export interface AdamWOptions {
  readonly adamBeta1: number
  readonly adamBeta2: number
  readonly adamEps: number
  /** Decoupled; matrices only. */
  readonly weightDecay: number
  /** As in OptimizerSection. Default: false, and 1. */
  readonly optimizerCpuOffload?: boolean
  readonly optimizerOffloadFraction?: number
}

/** A piece of optimizer state in the coordinates of its parameter. */
export interface OptimizerTensor {
  /** `optimizer.exp_avg.<name>`, `optimizer.exp_avg_sq.<name>`, `optimizer.master.<name>`. */
  readonly name: string
  readonly dtype: DType
  readonly tensor: Tensor
  readonly shard: ShardSpec
}

/** How data-parallel ranks share the work; see DdpSection. */
export type Sharing = Omit<DdpSection, 'gradReduceInFp32'>

/** Which parameters are gathered, and whose gradients are summed, together where they are fully sharded. */
export interface ShardingUnits {
  unitOf(parameter: Parameter): string
  /** Of a unit that more than one part of the model uses. */
  isShared(unit: string): boolean
}

/** What AdamW of one step needs from outside. */
export interface AdamWStep {
  readonly lr: number
  /** Multiplies the gradients: clipping and the division by the number of tokens. */
  readonly factor: number
}

/** The state of a parameter, or of the part of it that lies in this rank's range of a bucket. */
interface Slots {
  readonly segment: Segment
  /** Where the host has the state and makes the update, what travels; null: the device does. */
  readonly staging: Staging | null
  /** Of `data`'s local shape, or flat for a part. */
  readonly expAvg: Tensor
  readonly expAvgSq: Tensor
  /** float32 weights of a bfloat16 parameter; null for float32 parameters. */
  readonly master: Tensor | null
  /** The part of the main gradient and of the parameter; null: all of them. */
  readonly part: { readonly gradient: Tensor; readonly data: Tensor } | null
}

const slotNames = { exp_avg: 'expAvg', exp_avg_sq: 'expAvgSq', master: 'master' } as const

export class AdamW {
  /** Updates so far: t of the bias corrections. */
  updates = 0
  readonly gradients: StepGradients
  /** True when this rank has the state of its data-parallel ranges only. */
  readonly isSharded: boolean
  readonly #sharing: Sharing
  /** Where the parameters lie when the optimizer is sharded. */
  readonly #parameters: ParameterBuckets | null
  /** The weights, where a rank has its ranges of them only. */
  readonly units: WeightUnits | null
  readonly #arrivals = new Arrivals()
  readonly #host: HostUpdates | null
  readonly #flat: Tensor[] = []
  /** By bucket. */
  readonly #slots: readonly (readonly Slots[])[]
  readonly #step: Tensor

  /**
   * Takes memory for gradients and state of every parameter that requires a gradient; `dispose` gives it back. Sharded over
   * data-parallel ranks, it moves the parameters into memory of its own form.
   * @param axes - along which copies of the model's parameters lie, those of other stages included.
   * @param units - of the model, for useMegatronFsdp.
   */
  constructor(
    ctx: Ctx,
    parameters: Iterable<Parameter>,
    readonly options: AdamWOptions,
    sharing: Partial<Sharing> = {},
    axes: readonly CopiesAxis[] = [dataParallelAxis],
    units: ShardingUnits | null = null,
  ) {
    this.#sharing = { ...defaults.ddp, ...sharing }
    const { useDistributedOptimizer, overlapGradReduce, overlapParamGather, reshardAfterForward } = this.#sharing
    const { size } = ctx.groups.get(dataParallelAxis)
    // By the model's axes, not by the buckets here: a stage without parameters does what the others do.
    this.isSharded = useDistributedOptimizer && axes.some((axis) => ctx.groups.get(axis).size > 1)
    const cut = this.isSharded && this.#sharing.useMegatronFsdp ? units : null
    const layout = new FlatLayout(
      [...parameters].filter((parameter) => parameter.requiresGrad),
      {
        parts: (axis) => ctx.groups.get(axis).size,
        ...(cut === null
          ? { bucketSize: this.#sharing.bucketSize ?? Math.max(40_000_000, 1_000_000 * size) }
          : { unitOf: cut.unitOf }),
      },
    )
    if (cut === null) {
      this.units = null
      this.#parameters = this.isSharded ? new ParameterBuckets(ctx, layout, this.#arrivals) : null
      this.gradients = new Gradients(ctx, layout, { sharded: this.isSharded, overlap: overlapGradReduce })
    } else {
      const gradients = new UnitGradients(ctx, layout, cut, { overlap: overlapGradReduce })
      this.gradients = gradients
      this.#parameters = null
      this.units = new WeightUnits(ctx, layout, cut, gradients, {
        prefetches: overlapParamGather,
        keepsForBackward: !reshardAfterForward,
      })
    }
    const { optimizerCpuOffload: offloads = false, optimizerOffloadFraction = 1 } = options
    const fraction = offloads ? optimizerOffloadFraction : 0
    this.#host = fraction > 0 ? new HostUpdates(ctx) : null
    this.#slots = layout.buckets.map((bucket, index) => {
      const range = this.isSharded ? layout.part(bucket, ctx.groups.get(bucket.axis).rank) : bucket
      const [hosted, resident] = split(range, fraction)
      return [...this.#slotsOf(ctx, index, hosted, true), ...this.#slotsOf(ctx, index, resident, false)]
    })
    this.#step = Tensor.zeros(ctx, [4], 'float32').keep()
    this.masterFromModel(ctx)
  }

  /** True when the host has state of this rank. */
  get isOffloaded(): boolean {
    return this.#host !== null
  }

  /** State of what lies in a range of a bucket: flat tensors of zeros, and each parameter's part of them. */
  #slotsOf(ctx: Ctx, index: number, range: Range, onHost: boolean): Slots[] {
    const { layout } = this.gradients
    const bucket = layout.buckets[index] as Bucket
    const segments = layout.segments(bucket, range)
    if (segments.length === 0) return []
    const home = onHost ? (this.#host as HostUpdates).home(ctx) : ctx
    const flat = (dtype: DType = 'float32') => {
      const zeros = Tensor.zeros(home, [range.length], dtype).keep()
      this.#flat.push(zeros)
      return zeros
    }
    const [expAvg, expAvgSq, master] = [flat(), flat(), bucket.dtype === 'float32' ? null : flat()]
    const staging = onHost ? { gradient: flat(), data: flat(bucket.dtype) } : null
    return segments.map((segment) => {
      const { parameter, begin, offset, count } = segment
      const { localShape } = parameter.shard
      const isWhole = !this.isSharded && count === volume(localShape)
      const shape = isWhole ? localShape : [count]
      const view = (flat: Tensor) => flat.view(home, shape, contiguousStrides(shape), offset).keep()
      const part = () => ({
        gradient: this.gradients.range(ctx, { start: range.start + offset, length: count }).keep(),
        data:
          this.units?.part(index, range, segment) ??
          parameter.data.view(ctx, shape, contiguousStrides(shape), begin).keep(),
      })
      return {
        segment,
        staging: staging && { gradient: view(staging.gradient), data: view(staging.data) },
        expAvg: view(expAvg),
        expAvgSq: view(expAvgSq),
        master: master === null ? null : view(master),
        part: isWhole ? null : part(),
      }
    })
  }

  /** Master weights become the model's weights: after the model was loaded without optimizer state. */
  masterFromModel(ctx: Ctx): void {
    this.#arrivals.arrive()
    for (const { segment, staging, master, part } of this.#slots.flat()) {
      if (master === null) continue
      const { data } = part ?? segment.parameter
      if (staging !== null) this.#host?.takeMaster(ctx, { master, data, staging })
      else native.copy(ctx.stream.id, master.handle, data.handle)
    }
  }

  /**
   * One update from the summed main gradients, enqueued: of all parameters, or of this rank's ranges, which are then given to the
   * other data-parallel ranks, each bucket as soon as it is updated.
   */
  step(ctx: Ctx, { lr, factor }: AdamWStep): void {
    const { adamBeta1, adamBeta2, adamEps, weightDecay } = this.options
    this.updates++
    const step = Float32Array.of(lr, 1 - adamBeta1 ** this.updates, 1 - adamBeta2 ** this.updates, factor)
    native.upload(ctx.stream.id, this.#step.handle, step)
    this.#arrivals.arrive()
    this.units?.end()
    this.#host?.begin(ctx, step)
    for (const [bucket, slots] of this.#slots.entries()) {
      for (const { segment, staging, expAvg, expAvgSq, master, part } of slots) {
        const { parameter } = segment
        const { data } = part ?? parameter
        const gradient = part?.gradient ?? (parameter.mainGrad as Tensor)
        const decay = parameter.decays ? weightDecay : 0
        if (staging !== null) {
          this.#host?.update({ gradient, data, expAvg, expAvgSq, master, staging, weightDecay: decay }, this.options)
          continue
        }
        native.adamw(
          ctx.stream.id,
          (master ?? data).handle,
          expAvg.handle,
          expAvgSq.handle,
          master === null ? 0 : data.handle,
          gradient.handle,
          this.#step.handle,
          adamBeta1,
          adamBeta2,
          adamEps,
          decay,
        )
      }
      this.#publish(ctx, bucket)
    }
    this.#host?.end(ctx)
    if (this.isSharded && !this.#sharing.overlapParamGather) this.#arrivals.arrive()
  }

  /** What this rank has updated of a bucket, here or on the host, is given to the other data-parallel ranks and to later readers. */
  #publish(ctx: Ctx, index: number): void {
    if (this.#host === null) return this.#parameters?.gather(ctx, index)
    const arrived = this.#host.arrived(ctx)
    if (this.units !== null) return ctx.stream.wait(arrived.stream)
    arrived.stream.wait(ctx.stream)
    if (this.#parameters !== null) return this.#parameters.gather(arrived, index)
    const { parameters } = this.gradients.layout.buckets[index] as Bucket
    this.#arrivals.expect(parameters, arrived.stream.record(), ctx.stream)
  }

  /**
   * State for checkpoints, sharded as the parameters are; where this rank has a part of a parameter, its boxes, each by itself under
   * the same name. Whole tensors stay the optimizer's, boxes are views owned by `ctx.scope`.
   */
  *state(ctx: Ctx): Generator<OptimizerTensor> {
    for (const slots of this.#slots.flat()) {
      const { shard, name } = slots.segment.parameter
      for (const [slot, key] of Object.entries(slotNames)) {
        const tensor = slots[key]
        if (tensor === null) continue
        const row = { name: `optimizer.${slot}.${name}`, dtype: 'float32' } as const
        if (slots.part === null) yield { ...row, tensor, shard }
        else for (const box of boxesOf(ctx, slots.segment, tensor)) yield { ...row, ...box }
      }
    }
  }

  /** Fully sharded weights as checkpoints take and fill them: this rank's boxes, as `state` gives those of its state. */
  *weights(ctx: Ctx): Generator<OptimizerTensor> {
    if (this.units === null) return
    for (const { segment, part } of this.#slots.flat()) {
      if (part === null) continue
      const { name, dtype } = segment.parameter
      for (const box of boxesOf(ctx, segment, part.data)) yield { name, dtype, ...box }
    }
  }

  /** Resolves when all ranks have what the last step updated, and the host its state; a rank that leaves before takes it from them. */
  async settle(ctx: Ctx): Promise<void> {
    const isComing = this.#arrivals.size > 0
    this.#arrivals.arrive()
    await this.#host?.settle()
    if (isComing && this.isSharded) await ctx.device.communication(dataParallelAxis).sync()
  }

  dispose(): void {
    this.#arrivals.arrive()
    this.#host?.dispose()
    for (const { expAvg, expAvgSq, master, part, staging } of this.#slots.flat())
      for (const view of [expAvg, expAvgSq, master, part?.gradient, part?.data, staging?.gradient, staging?.data])
        view?.dispose()
    for (const flat of this.#flat) flat.dispose()
    this.#step.dispose()
    this.gradients.dispose()
    this.#parameters?.dispose()
    this.units?.dispose()
  }
}

/** The front and the rest of a range; the border lies where places of parameters may. */
function split({ start, length }: Range, fraction: number): [Range, Range] {
  const front = Math.min(length, Math.round((length * fraction) / 16) * 16)
  return [
    { start, length: front },
    { start: start + front, length: length - front },
  ]
}

/** A flat part of a local tensor as boxes of the logical one. */
function boxesOf(
  ctx: Ctx,
  { parameter, begin, count }: Segment,
  flat: Tensor,
): { readonly tensor: Tensor; readonly shard: ShardSpec }[] {
  const { logicalShape } = parameter.shard
  return flatRanges(parameter.shard, begin, begin + count).map(({ offset, block }) => ({
    tensor: flat.view(ctx, block.size, contiguousStrides(block.size), offset - begin),
    shard: {
      logicalShape,
      localShape: block.size,
      blocks: [{ ...block, localStart: block.size.map(() => 0) }],
    },
  }))
}

/**
 * The factor of the gradients: 1 / tokens, times maxNorm / (norm + 1e-6) where the norm of the mean gradient is larger than
 * maxNorm (torch.nn.utils.clip_grad_norm_'s rule).
 * @param sumOfSquares - of the summed gradients, over all ranks.
 * @returns the factor and the norm of the mean gradient before clipping.
 */
export function gradientFactor(
  sumOfSquares: number,
  tokens: number,
  maxNorm: number,
): { factor: number; norm: number } {
  const norm = Math.sqrt(sumOfSquares) / tokens
  const clip = maxNorm > 0 ? Math.min(1, maxNorm / (norm + 1e-6)) : 1
  return { factor: clip / tokens, norm }
}
