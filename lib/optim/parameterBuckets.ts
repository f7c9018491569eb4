// Parameters of a sharded optimizer: one tensor a bucket, laid out as the gradients are, so that each data-parallel rank updates
// its range in place and gives it to the others in the parameters' own dtype. Parameter.data are views of these tensors.
import { native } from '../addon/load.js'
import { allGatherInPlace } from '../parallel/collectives.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import { volume } from '../tensor/region.js'
import { Tensor } from '../tensor/tensor.js'
import type { Bucket, FlatLayout } from './flatLayout.js'
import { dataParallelAxis } from './gradients.js'

export class ParameterBuckets {
  readonly #tensors: readonly Tensor[]
  readonly #group: Group
  /** By bucket: makes the compute stream wait for a gather that runs beside it. */
  readonly #arrivals = new Map<Bucket, () => void>()

  /** Moves the parameters; views of their former memory do not follow. */
  constructor(
    ctx: Ctx,
    readonly layout: FlatLayout,
  ) {
    this.#group = ctx.groups.get(dataParallelAxis)
    this.#tensors = layout.buckets.map((bucket) => {
      const flat = Tensor.zeros(ctx, [bucket.length], bucket.dtype).keep()
      for (const parameter of bucket.parameters) {
        const { localShape } = parameter.shard
        const begin = (layout.offsets.get(parameter) as number) - bucket.start
        using place = flat.slice(ctx, 0, begin, volume(localShape))
        const data = place.reshape(ctx, localShape).keep()
        native.copy(ctx.stream.id, data.handle, parameter.data.handle)
        parameter.data = data
      }
      return flat
    })
  }

  /** This rank's range of a bucket, owned by `ctx.scope`. */
  own(ctx: Ctx, bucket: number): Tensor {
    const tensor = this.#tensors[bucket] as Tensor
    const length = tensor.numel / this.layout.parts
    return tensor.slice(ctx, 0, this.#group.rank * length, length)
  }

  /**
   * Gives this rank's range of a bucket to all and takes theirs, beside compute on the axis's communication stream. Whoever asks
   * for one of the parameters next makes the compute stream wait.
   */
  gather(ctx: Ctx, index: number): void {
    const bucket = this.layout.buckets[index] as Bucket
    const comm = ctx.comm(dataParallelAxis)
    allGatherInPlace(comm, this.#tensors[index] as Tensor, this.#group)
    const event = comm.stream.record()
    const arrive = () => {
      if (!this.#arrivals.delete(bucket)) return
      for (const parameter of bucket.parameters) parameter.beforeUse = null
      ctx.device.stream.wait(event)
      event.dispose()
    }
    this.#arrivals.set(bucket, arrive)
    for (const parameter of bucket.parameters) parameter.beforeUse = arrive
  }

  /** What is enqueued on the compute stream from here on sees all gathered parameters. */
  arrive(): void {
    for (const arrive of [...this.#arrivals.values()]) arrive()
  }

  /** Resolves when every rank has what was gathered last. @throws the communication stream's error */
  async settle(ctx: Ctx): Promise<void> {
    if (this.#arrivals.size === 0) return
    this.arrive()
    await ctx.device.communication(dataParallelAxis).sync()
  }

  /** The parameters keep their memory. */
  dispose(): void {
    this.arrive()
    for (const tensor of this.#tensors) tensor.dispose()
  }
}
