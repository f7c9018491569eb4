// Parameters of a sharded optimizer: one tensor a bucket, laid out as the gradients are, so that each data-parallel rank updates
// its range in place and gives it to the others in the parameters' own dtype. Parameter.data are views of these tensors.
import { native } from '../addon/load.js'
import { allGatherInPlace } from '../parallel/collectives.js'
import type { Ctx } from '../tensor/ctx.js'
import { volume } from '../tensor/region.js'
import { Tensor } from '../tensor/tensor.js'
import type { Arrivals } from './arrivals.js'
import type { Bucket, FlatLayout } from './flatLayout.js'
import { dataParallelAxis } from './gradients.js'

export class ParameterBuckets {
  readonly #tensors: readonly Tensor[]
  readonly #arrivals: Arrivals

  /** Moves the parameters; views of their former memory do not follow. */
  constructor(
    ctx: Ctx,
    readonly layout: FlatLayout,
    arrivals: Arrivals,
  ) {
    this.#arrivals = arrivals
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

  /**
   * Gives this rank's range of a bucket to all and takes theirs, beside compute on the axis's communication stream. Whoever asks
   * for one of the parameters next makes the compute stream wait.
   */
  gather(ctx: Ctx, index: number): void {
    const bucket = this.layout.buckets[index] as Bucket
    const comm = ctx.comm(dataParallelAxis)
    allGatherInPlace(comm, this.#tensors[index] as Tensor, ctx.groups.get(bucket.axis))
    this.#arrivals.expect(bucket.parameters, comm.stream.record(), ctx.device.stream)
  }

  /** The parameters keep their memory. */
  dispose(): void {
    for (const tensor of this.#tensors) tensor.dispose()
  }
}
