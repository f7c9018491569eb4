// Cross entropy over logits whose columns may be sharded. How statistics of the shards meet is injected (`gather`): ops know no
// groups. The backward pass writes the gradient over the logits: no second copy is ever held. V: local columns.
import { native } from '../addon/load.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { checkShape, defineOp } from './define.js'
import { isExclusive } from './tape.js'

export interface CrossEntropyArgs {
  /** [T, V]: columns vocabStart to vocabStart + V. */
  readonly logits: Tensor
  /** int32 [T]; -100 is ignored. */
  readonly labels: Tensor
  readonly vocabStart?: number
  /** Logical columns; those at or past it are padding. */
  readonly vocabSize: number
  /** Statistics [3, T] of this shard to those of all, [P, 3, T] in rank order. Absent: one shard. */
  readonly gather?: (ctx: Ctx, stats: Tensor) => Tensor
}

/** `loss` float32 [T], 0 where ignored; `lossSum` float32 [1]; `lse` float32 [T]. */
export const crossEntropy = defineOp<CrossEntropyArgs, { loss: Tensor; lossSum: Tensor; lse: Tensor }>({
  name: 'crossEntropy',
  shapes({ logits, labels }) {
    const [tokens = 0] = logits.shape
    checkShape(
      logits.shape.length === 2 && labels.shape[0] === tokens,
      'crossEntropy',
      'logits [T, V] and labels [T]',
      logits,
      labels,
    )
    const perToken = { shape: [tokens], dtype: 'float32' } as const
    return { loss: perToken, lossSum: { shape: [1], dtype: 'float32' }, lse: perToken }
  },
  forward(ctx, { logits, labels, vocabStart, vocabSize, gather }, { loss, lossSum, lse }) {
    const tokens = labels.shape[0] as number
    const own = ctx.empty([3, tokens], 'float32')
    native.crossEntropyStats(ctx.stream.id, own.handle, logits.handle, labels.handle, vocabStart ?? 0, vocabSize)
    const all = gather ? gather(ctx, own) : own.reshape(ctx, [1, 3, tokens])
    native.crossEntropyCombine(ctx.stream.id, lse.handle, loss.handle, all.handle, labels.handle)
    native.sum(ctx.stream.id, lossSum.handle, loss.handle)
  },
  inputs: ({ logits }) => [logits],
  saves: ({ logits, labels }, { lse }) => [logits, labels, lse],
  backwardInput(ctx, { logits, labels, vocabStart, vocabSize }, { lse }, { loss: dLoss, lossSum: dSum }) {
    const d = dLoss !== null && dSum !== null ? addToAll(ctx, dLoss, dSum) : (dLoss ?? dSum)
    if (d === null) return [null]
    const dLogits = isExclusive(logits) ? logits : ctx.empty(logits.shape, logits.dtype)
    native.crossEntropyBackward(
      ctx.stream.id,
      dLogits.handle,
      logits.handle,
      lse.handle,
      labels.handle,
      d.handle,
      vocabStart ?? 0,
      vocabSize,
    )
    return [dLogits]
  },
})

/** perToken[T] + all[1]. */
function addToAll(ctx: Ctx, perToken: Tensor, all: Tensor): Tensor {
  const tokens = perToken.shape[0] as number
  const sum = ctx.empty([tokens], 'float32')
  native.addBias(
    ctx.stream.id,
    sum.reshape(ctx, [tokens, 1]).handle,
    perToken.reshape(ctx, [tokens, 1]).handle,
    all.handle,
  )
  return sum
}
