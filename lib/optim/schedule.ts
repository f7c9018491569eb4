// The learning rate over the steps, by Megatron-Core's formulas. Pure functions of the number of steps done before.
import type { OptimizerSection, SchedulerSection } from '../config/sections.js'

/** What a schedule needs; `resolve` fills warm-up and decay in. */
export interface Schedule
  extends Pick<OptimizerSection, 'lr' | 'minLr'>,
    Pick<SchedulerSection, 'lrDecayStyle' | 'lrWarmupInit' | 'lrWsdDecayIters' | 'lrWsdDecayStyle'> {
  readonly lrWarmupIters: number
  readonly lrDecayIters: number
}

/**
 * Learning rate of a step. During warm-up it rises linearly from lrWarmupInit; then it falls from lr to minLr, which is reached
 * at lrDecayIters and kept. As in Megatron-Core the first step is number 0: with a warm-up from 0 it changes nothing.
 * @param done - steps that were taken before this one.
 */
export function learningRate(schedule: Schedule, done: number): number {
  const { lr, minLr, lrWarmupInit, lrWarmupIters: warmup, lrDecayIters: end, lrDecayStyle: style } = schedule
  if (warmup > 0 && done <= warmup) return lrWarmupInit + ((lr - lrWarmupInit) * done) / warmup
  if (style === 'constant') return lr
  if (done > end) return minLr
  if (style === 'inverse-square-root') {
    return Math.max(minLr, (lr * Math.sqrt(Math.max(warmup, 1))) / Math.sqrt(Math.max(done, 1)))
  }
  const ratio = end > warmup ? (done - warmup) / (end - warmup) : 0
  return minLr + share(schedule, style, ratio, done) * (lr - minLr)
}

/** What is left of the way from minLr to lr. */
function share(schedule: Schedule, style: 'linear' | 'cosine' | 'WSD', ratio: number, done: number): number {
  if (style === 'linear') return 1 - ratio
  if (style === 'cosine') return 0.5 * (Math.cos(Math.PI * ratio) + 1)
  const length = schedule.lrWsdDecayIters ?? 0
  const start = schedule.lrDecayIters - length
  if (done <= start || length === 0) return 1
  const part = (done - start) / length
  switch (schedule.lrWsdDecayStyle) {
    case 'linear':
      return 1 - part
    case 'cosine':
      return 0.5 * (Math.cos(Math.PI * part) + 1)
    case 'exponential':
      return 2 * 0.5 ** part - 1
    case 'minus_sqrt':
      return 1 - Math.sqrt(part)
  }
}
