// A rank of a training run for tests: the fixture's model on the fixture's data, as the JSON argument says; a list is done one
// after the other. Rank 0 appends every step to `metrics` and prints it.

import type { DdpSection, OptimizerSection } from '../../lib/config/sections.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { forwardStep, pretrain } from '../../lib/train/index.js'
import { fixtureConfig, fixtureData } from './fixtureRun.js'

/** What the test asks for. */
export interface Work {
  readonly tp?: number
  readonly sequenceParallel?: boolean
  readonly trainIters: number
  readonly microBatchSize?: number
  readonly hiddenDropout?: number
  /** Default 3e-3. */
  readonly lr?: number
  readonly save?: string
  /** Where the run starts from; default: `save`. */
  readonly load?: string
  readonly saveInterval?: number
  readonly mostRecentK?: number
  readonly mixedPrecision?: 'bf16_mixed' | 'fp32'
  readonly metrics?: string
  readonly recompute?: boolean
  readonly ddp?: Partial<DdpSection>
  readonly optimizer?: Partial<OptimizerSection>
  /** Default: cpu. */
  readonly device?: 'cpu' | 'cuda'
  /** More fields of the model. */
  readonly model?: Partial<ProviderInit>
  /** Puts a NaN into a gradient on one rank at one step. */
  readonly poison?: { readonly step: number; readonly rank: number; readonly parameter: string }
}

/** Runs it in this process, as one of the launcher's ranks or alone. */
export async function work(task: Work, log?: (line: string) => void) {
  const config = await fixtureConfig(task)
  config.model.hiddenDropout = task.hiddenDropout ?? 0
  config.mixedPrecision = task.mixedPrecision ?? 'fp32'
  config.model.sequenceParallel = task.sequenceParallel ?? false
  config.optimizer.lr = task.lr ?? 3e-3
  config.scheduler.lrDecayStyle = 'cosine'
  config.scheduler.lrWarmupIters = 3
  config.scheduler.lrDecayIters = 40
  config.checkpoint.save = task.save ?? null
  config.checkpoint.load = task.load ?? task.save ?? null
  config.checkpoint.saveInterval = task.save ? (task.saveInterval ?? null) : null
  config.checkpoint.mostRecentK = task.mostRecentK ?? null
  config.logger.metricsFile = task.metrics ?? null
  if (task.recompute) config.model.recomputeGranularity = 'full'
  Object.assign(config.model, task.model)
  Object.assign(config.ddp, task.ddp)
  Object.assign(config.optimizer, task.optimizer)
  const { poison } = task
  return await pretrain(
    config,
    async (ctx, model, batch) => {
      const result = await forwardStep(ctx, model, batch)
      if (poison?.step === ctx.rng.step && ctx.groups.get('world').rank === poison.rank) {
        const { native } = await import('../../lib/addon/load.js')
        const parameter = [...model.namedParameters()].find(([name]) => name === poison.parameter)?.[1]
        if (parameter?.mainGrad) native.fill(ctx.stream.id, parameter.mainGrad.slice(ctx, 0, 0, 1).handle, Number.NaN)
      }
      return result
    },
    { data: fixtureData, device: task.device ?? 'cpu', ...(log ? { log } : {}) },
  )
}

const argument = process.argv[2]
if (process.argv[1]?.endsWith('worker.ts') && argument !== undefined) {
  for (const task of [JSON.parse(argument) as Work | Work[]].flat()) {
    const result = await work(task)
    if (result.exitCode !== 0) process.exitCode = result.exitCode
  }
  await (await initDistributed()).dispose()
}
