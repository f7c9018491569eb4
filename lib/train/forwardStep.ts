// The joint between the loop and a model: what a user's own forward step looks like, and the default for language models.
import type { DeviceBatch } from '../models/batch.js'
import type { GPTModel } from '../models/gpt.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'

/** What a forward step returns. */
export interface ForwardResult {
  /** float32 [1]: sum of the losses of the tokens that count, not divided by their number. Its backward pass is run. */
  readonly lossSum: Tensor
  /** Tokens that count; 0 where every label is masked. */
  readonly numTokens: number
  /** More sums over tokens to be told, float32 [1] each, by name. */
  readonly metrics?: Readonly<Record<string, Tensor>>
}

/** Forward pass of one micro-batch. `ctx.tape` records in training and is null in evaluation. */
export type ForwardStep = (ctx: Ctx, model: GPTModel, batch: DeviceBatch) => Promise<ForwardResult>

/** Next-token cross entropy: the forward step of pretraining. */
export const forwardStep: ForwardStep = async (ctx, model, batch) => {
  const { lossSum } = await model.loss(ctx, batch)
  return { lossSum, numTokens: batch.numTokens }
}
