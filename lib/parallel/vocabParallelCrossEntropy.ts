// Cross entropy over logits whose columns are shared out over tp: ranks exchange three numbers a token, never logits.

import { crossEntropy } from '../ops/crossEntropy.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { allGather } from './collectives.js'

/**
 * @param logits - [T, Vlocal], this rank's columns.
 * @param labels - int32 [T], -100 ignored.
 * @param vocabSize - logical columns; later ones are padding.
 * @returns loss float32 [T], 0 where ignored, and its sum [1]; both equal on each rank.
 */
export function vocabParallelCrossEntropy(
  ctx: Ctx,
  logits: Tensor,
  labels: Tensor,
  vocabSize: number,
  tp: Group,
): { loss: Tensor; lossSum: Tensor } {
  const vocabStart = tp.rank * (logits.shape[1] as number)
  const gather = tp.size === 1 ? {} : { gather: (c: Ctx, stats: Tensor) => allGather(c, stats, tp) }
  const { loss, lossSum } = crossEntropy(ctx, { logits, labels, vocabStart, vocabSize, ...gather })
  return { loss, lossSum }
}
