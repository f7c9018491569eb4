// One line a step, in fixed columns, and the same as JSON lines. Numbers are of the whole run; peak memory is rank 0's.
import { appendFileSync, mkdirSync } from 'node:fs'
import { dirname } from 'node:path'
import { trainingFlopsPerToken } from '../plan/cost.js'
import { measurePeakFlops } from '../plan/price.js'
import type { EvaluationReport } from './evaluate.js'
import type { TrainState } from './state.js'
import type { StepReport } from './step.js'

/** Rates of a step. */
export interface Throughput {
  /** Tokens of the global batch a second. */
  readonly tokensPerSecond: number
  /** Model TFLOP/s of one rank. */
  readonly teraflops: number
  /** Share of the rank's measured matmul rate; null where the step was faster than that: it was measured on a busy machine. */
  readonly mfu: number | null
}

export function throughputOf(state: TrainState, ms: number): Throughput {
  const { resolved, peakFlops } = state
  const tokens = resolved.config.train.globalBatchSize * resolved.seqLength
  const flops = trainingFlopsPerToken(resolved.config.model, resolved.seqLength, resolved.paddedVocabSize) * tokens
  const rate = flops / (ms / 1000) / resolved.worldSize
  return {
    tokensPerSecond: tokens / (ms / 1000),
    teraflops: rate / 1e12,
    mfu: rate > peakFlops ? null : rate / peakFlops,
  }
}

/** Measures the matmul rate again where a step was faster than it can be. */
export async function correctPeak(state: TrainState, ms: number): Promise<void> {
  if (throughputOf(state, ms).mfu !== null) return
  const { model, resolved } = state
  const again = await measurePeakFlops(model.device, resolved.paramsDtype === 'float32' ? 'float32' : 'bfloat16')
  state.peakFlops = Math.max(state.peakFlops, again)
}

const columns = [
  ['step', 8],
  ['loss', 10],
  ['grad norm', 10],
  ['lr', 10],
  ['ms', 8],
  ['tokens/s', 10],
  ['TFLOP/s', 9],
  ['MFU', 7],
  ['peak MB', 9],
] as const

const row = (cells: readonly string[]) => cells.map((cell, i) => cell.padStart(columns[i]?.[1] ?? 0)).join('')

/** The titles of `stepLine`'s columns. */
export const stepHeader: string = row(columns.map(([title]) => title))

/** A step as one line. */
export function stepLine(state: TrainState, report: StepReport): string {
  const { tokensPerSecond, teraflops, mfu } = throughputOf(state, report.ms)
  const line = row([
    String(report.step),
    report.loss.toFixed(5),
    Number.isFinite(report.gradNorm) ? report.gradNorm.toFixed(4) : String(report.gradNorm),
    report.lr.toExponential(2),
    report.ms.toFixed(0),
    tokensPerSecond.toFixed(0),
    teraflops.toFixed(4),
    mfu === null ? '-' : `${(100 * mfu).toFixed(0)}%`,
    (report.peakMemory / 1e6).toFixed(0),
  ])
  const told = Object.entries(report.metrics).map(([name, value]) => `  ${name} ${value.toPrecision(5)}`)
  return line + told.join('')
}

/** Appends records to logger.metricsFile, on rank 0. */
export class MetricsFile {
  readonly #path: string | null

  constructor(state: TrainState) {
    this.#path = state.world.rank === 0 ? state.resolved.config.logger.metricsFile : null
    if (this.#path !== null) mkdirSync(dirname(this.#path), { recursive: true })
  }

  step(state: TrainState, report: StepReport): void {
    this.#append({ kind: 'step', ...report, ...throughputOf(state, report.ms) })
  }

  evaluation(step: number, report: EvaluationReport): void {
    this.#append({ kind: 'evaluation', step, ...report })
  }

  #append(record: object): void {
    if (this.#path !== null) appendFileSync(this.#path, `${JSON.stringify(record)}\n`)
  }
}
