// The loop: steps, evaluations, checkpoints, and ends. Exit code after SIGTERM: 143 (128 + 15), once the step in progress is done
// and the run is saved. Everything that it does is also there by itself: setup, trainStep, evaluate, saveCheckpoint.
import type { RunConfig } from '../config/runConfig.js'
import { saveCheckpoint } from './checkpoints.js'
import { type EvaluationReport, evaluate } from './evaluate.js'
import { type ForwardStep, forwardStep as languageModelStep } from './forwardStep.js'
import { correctPeak, MetricsFile, stepHeader, stepLine } from './log.js'
import { type SetupOptions, setup, type TrainState } from './state.js'
import { sumOverRanks } from './status.js'
import { type StepReport, trainStep } from './step.js'

/** Called on every rank; awaited. */
export interface TrainCallbacks {
  onTrainStart?(state: TrainState): void | Promise<void>
  onStepStart?(state: TrainState): void | Promise<void>
  onStepEnd?(state: TrainState, report: StepReport): void | Promise<void>
  onEvaluation?(state: TrainState, report: EvaluationReport): void | Promise<void>
  onCheckpointSave?(state: TrainState, folder: string): void | Promise<void>
  onTrainEnd?(state: TrainState, result: TrainResult): void | Promise<void>
}

export interface TrainOptions extends SetupOptions {
  readonly callbacks?: TrainCallbacks | readonly TrainCallbacks[]
  /** No line a step. Default false. */
  readonly quiet?: boolean
}

/** How a run ended. */
export interface TrainResult {
  /** Steps done. */
  readonly step: number
  /** Loss of each step of this process, in order. */
  readonly losses: readonly number[]
  /** Last step of this process, or null when there was none. */
  readonly last: StepReport | null
  readonly validation: EvaluationReport | null
  /** Last saved iter_* folder, or null. */
  readonly checkpoint: string | null
  /** Why the run ended. */
  readonly reason: 'done' | 'signal' | 'exitInterval' | 'exitDuration'
  /** 0, or 143 after SIGTERM. `pretrain` puts it into process.exitCode. */
  readonly exitCode: number
}

/**
 * Trains as the configuration says. Every rank calls it; alone it is a world of one.
 * @param forward - forward pass of a micro-batch. Default: next-token cross entropy.
 * @throws what setup and trainStep throw.
 */
export async function pretrain(
  config: RunConfig,
  forward: ForwardStep = languageModelStep,
  options: TrainOptions = {},
): Promise<TrainResult> {
  const state = await setup(config, options)
  const onSignal = () => {
    state.stopSignal = 'SIGTERM'
  }
  if (config.train.exitSignalHandler) process.on('SIGTERM', onSignal)
  try {
    const result = await loop(state, forward, options)
    if (result.exitCode !== 0) process.exitCode = result.exitCode
    return result
  } finally {
    process.off('SIGTERM', onSignal)
    await state.dispose()
  }
}

async function loop(state: TrainState, forward: ForwardStep, options: TrainOptions): Promise<TrainResult> {
  const { train, validation, checkpoint, logger } = state.resolved.config
  const callbacks = options.callbacks === undefined ? [] : [options.callbacks].flat()
  const metrics = new MetricsFile(state)
  const started = performance.now()
  const losses: number[] = []
  let last: StepReport | null = null
  let report: EvaluationReport | null = null
  let evaluatedAt = -1
  let folder: string | null = null
  let reason: TrainResult['reason'] = 'done'

  const measure = async () => {
    report = await evaluate(state, forward)
    evaluatedAt = state.step
    if (report === null) return
    metrics.evaluation(state.step, report)
    if (options.quiet !== true) {
      state.log(
        `validation  step ${state.step}, loss ${report.loss.toFixed(5)}, perplexity ${report.perplexity.toFixed(2)}, ${report.tokens} tokens`,
      )
    }
    for (const callback of callbacks) await callback.onEvaluation?.(state, report)
  }
  const save = async () => {
    folder = await saveCheckpoint(state)
    state.log(`saved       ${folder}`)
    for (const callback of callbacks) await callback.onCheckpointSave?.(state, folder)
  }

  for (const callback of callbacks) await callback.onTrainStart?.(state)
  if (options.quiet !== true && state.step < train.trainIters) state.log(stepHeader)
  let savedAt = state.step
  while (state.step < train.trainIters) {
    for (const callback of callbacks) await callback.onStepStart?.(state)
    last = await trainStep(state, state.loader.next(), forward)
    losses.push(last.loss)
    await correctPeak(state, last.ms)
    metrics.step(state, last)
    if (options.quiet !== true && last.step % logger.logInterval === 0) state.log(stepLine(state, last))
    for (const callback of callbacks) await callback.onStepEnd?.(state, last)
    if (validation.evalInterval !== null && state.step % validation.evalInterval === 0) await measure()
    if (last.stopRequested) reason = 'signal'
    else if (train.exitInterval !== null && state.step % train.exitInterval === 0) reason = 'exitInterval'
    else if (train.exitDurationInMins !== null && (await isOver(state, started, train.exitDurationInMins)))
      reason = 'exitDuration'
    const stops = reason !== 'done'
    const due = checkpoint.saveInterval !== null && state.step % checkpoint.saveInterval === 0
    if (checkpoint.save !== null && (due || stops)) {
      await save()
      savedAt = state.step
    }
    if (stops) break
  }
  if (checkpoint.save !== null && savedAt !== state.step) await save()
  if (reason === 'done' && validation.evalInterval !== null && evaluatedAt !== state.step) await measure()
  const result: TrainResult = {
    step: state.step,
    losses,
    last,
    validation: report,
    checkpoint: folder,
    reason,
    exitCode: reason === 'signal' ? 143 : 0,
  }
  if (reason !== 'done') state.log(`stopped     after step ${state.step}: ${reason === 'signal' ? 'SIGTERM' : reason}`)
  for (const callback of callbacks) await callback.onTrainEnd?.(state, result)
  return result
}

/** Clocks differ: the run is over when any rank says so. */
async function isOver(state: TrainState, started: number, minutes: number): Promise<boolean> {
  const over = performance.now() - started > minutes * 60_000 ? 1 : 0
  const [count] = (await sumOverRanks(state.model.ctx(), [over])) as [number]
  return count > 0
}
