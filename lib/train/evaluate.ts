// Mean loss on held-out data: the same samples at each call and at any layout, no dropout, no tape.

import { ViaductError } from '../base/errors.js'
import { BatchLoader } from '../data/loader.js'
import type { TokenBatch } from '../models/batch.js'
import { type LastPass, runPipeline } from '../models/pipelineRun.js'
import { Scope } from '../tensor/scope.js'
import { type ForwardStep, forwardStep } from './forwardStep.js'
import type { TrainState } from './state.js'
import { speaksForModel, sumOverRanks } from './status.js'

/** What an evaluation found. */
export interface EvaluationReport {
  /** Mean cross entropy a token, nats. */
  readonly loss: number
  /** exp(loss) */
  readonly perplexity: number
  /** Tokens that counted, over all ranks. */
  readonly tokens: number
}

/**
 * The loss of this rank's batches, summed over all ranks; every rank calls it. Default: the first validation.evalIters global
 * batches of the validation data.
 * @returns null when there is no validation data.
 * @throws ERR_LABEL when no label counts.
 */
export async function evaluate(
  state: TrainState,
  forward: ForwardStep = forwardStep,
  batches: Iterable<TokenBatch> | null = validationBatches(state),
): Promise<EvaluationReport | null> {
  if (batches === null) return null
  const { model } = state
  model.training = false
  const scope = new Scope()
  try {
    const ctx = model.ctx({ scope, rng: { seed: state.resolved.config.rng.seed, step: 0, rngSlot: state.rngSlot } })
    const losses: Promise<number>[] = []
    let tokens = 0
    const last: LastPass = async (inner, chunk, batch) => {
      const { lossSum, numTokens } = await forward(inner, chunk, batch)
      const loss = lossSum.item()
      // Awaited behind the last batch; a failure before then is told by the pass that it stops.
      loss.catch(() => {})
      losses.push(loss)
      tokens += numTokens
      return { output: lossSum, seed: lossSum }
    }
    await runPipeline(ctx, model, [...batches], last, { backward: false })
    const loss = (await Promise.all(losses)).reduce((sum, value) => sum + value, 0)
    const counts = speaksForModel(ctx) ? 1 : 0
    const [sum, count] = (await sumOverRanks(ctx, [counts * loss, counts * tokens])) as [number, number]
    if (count === 0)
      throw new ViaductError('ERR_LABEL', 'evaluate', 'expected at least one label that counts, got none')
    return { loss: sum / count, perplexity: Math.exp(sum / count), tokens: count }
  } finally {
    scope.close()
    model.training = true
  }
}

/** This rank's batches of an evaluation; null without validation data. */
export function validationBatches(state: TrainState): TokenBatch[] | null {
  const { config } = state.resolved
  const dataset = state.data.validation
  if (dataset === null || config.validation.evalIters === 0) return null
  const dp = state.mesh.get('dp')
  const loader = new BatchLoader({
    dataset,
    globalBatchSize: config.train.globalBatchSize,
    microBatchSize: config.train.microBatchSize,
    dataParallelRank: dp.rank,
    dataParallelSize: dp.size,
    seed: null,
  })
  return Array.from({ length: config.validation.evalIters }, () => loader.next()).flat()
}
