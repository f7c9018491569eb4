// Rows of an embedding. The weight may be a shard of the vocabulary: rows of other shards come out as zeros.
import { native } from '../addon/load.js'
import type { Tensor } from '../tensor/tensor.js'
import { checkShape, defineOp } from './define.js'
import { mainGradOf, type TrainableWeight } from './weight.js'

export interface EmbeddingArgs {
  /** int32 [T], checked on the host. */
  readonly ids: Tensor
  /** [V, H]: rows vocabStart to vocabStart + V. */
  readonly weight: TrainableWeight
  readonly vocabStart?: number
}

/** y[T, H] = weight[ids]. */
export const embedding = defineOp<EmbeddingArgs, { y: Tensor }>({
  name: 'embedding',
  shapes({ ids, weight }) {
    const w = weight.data
    checkShape(ids.shape.length === 1 && w.shape.length === 2, 'embedding', 'ids [T] and weight [V, H]', ids, w)
    return { y: { shape: [ids.shape[0] as number, w.shape[1] as number], dtype: w.dtype } }
  },
  forward(ctx, { ids, weight, vocabStart }, { y }) {
    native.embeddingForward(ctx.stream.id, y.handle, weight.data.handle, ids.handle, vocabStart ?? 0)
  },
  weights: ({ weight }) => [weight],
  saves: ({ ids }) => [ids],
  backwardWeight(ctx, { ids, weight, vocabStart }, _, { y: dy }) {
    if (dy === null) return
    native.embeddingBackward(ctx.stream.id, mainGradOf(ctx, weight).handle, dy.handle, ids.handle, vocabStart ?? 0)
  },
})
