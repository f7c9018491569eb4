// The bubble of a simulated schedule is the literature's formula, and the picture shows every action where it is.
import { describe, expect, it } from 'vitest'
import {
  bubbleFormula,
  pipelineSchedule,
  type ScheduleKind,
  type ScheduleSizes,
} from '../../../lib/parallel/schedules.js'
import { type PassCosts, simulate } from '../../../lib/plan/timeline.js'
import { timelineSvg } from '../../../lib/plan/timelineSvg.js'

const play = (sizes: ScheduleSizes, costs: PassCosts) => simulate({ ...sizes, actions: pipelineSchedule(sizes) }, costs)
const equal = { forward: 1, backwardInput: 1, backwardWeight: 1 }

describe('the bubble equals the formula', () => {
  const cases: [ScheduleKind, number, number, number][] = [
    ...[2, 3, 4, 8].flatMap((p) =>
      [1, p, 2 * p, 5 * p + 1].map((m) => ['gpipe', p, 1, m] as [ScheduleKind, number, number, number]),
    ),
    ...[2, 3, 4, 8].flatMap((p) =>
      [1, p, 2 * p, 5 * p + 1].map((m) => ['1f1b', p, 1, m] as [ScheduleKind, number, number, number]),
    ),
    ...[2, 3, 4, 8].flatMap((p) =>
      [2, 3, 4].flatMap((v) =>
        [p, 2 * p, 5 * p].map((m) => ['interleaved', p, v, m] as [ScheduleKind, number, number, number]),
      ),
    ),
    ...[2, 3, 4, 8].flatMap((p) =>
      [p, 2 * p, 5 * p + 1].map((m) => ['zb-h1', p, 1, m] as [ScheduleKind, number, number, number]),
    ),
  ]
  it.each(cases)('%s, pp %i, vpp %i, %i micro-batches', (kind, stages, chunks, microBatches) => {
    const sizes = { kind, stages, chunks, microBatches }
    const { bubble, duration, stages: rows } = play(sizes, equal)
    expect(bubble).toBeCloseTo(bubbleFormula(sizes, equal), 12)
    const fill = kind === 'zb-h1' ? (stages - 1) / (3 * microBatches) : (stages - 1) / (chunks * microBatches)
    expect(bubble).toBeCloseTo(fill, 12)
    for (const { work, idle } of rows) expect(work + idle).toBeCloseTo(duration, 9)
  })
})

it('unequal costs: 1F1B keeps its formula whatever backward takes; transfers widen the bubble', () => {
  const sizes = { kind: '1f1b', stages: 4, chunks: 1, microBatches: 8 } as const
  const costs = { forward: 1, backwardInput: 1.5, backwardWeight: 0.5 }
  expect(play(sizes, costs).bubble).toBeCloseTo(3 / 8, 12)
  expect(play(sizes, { ...costs, send: 0.25 }).bubble).toBeGreaterThan(3 / 8)
})

it('draws each action at its time, with its number', () => {
  const sizes = { kind: 'interleaved', stages: 2, chunks: 2, microBatches: 2 } as const
  const timeline = play(sizes, equal)
  const svg = timelineSvg(timeline, 'interleaved <2>', 2)
  expect(svg).toContain('interleaved &lt;2&gt;')
  expect(svg.match(/<g>/g)).toHaveLength(16)
  expect(svg).toContain('<title>backward, micro-batch 1, chunk 0, stage 0, ')
  expect(svg).toContain(`bubble ${(100 * timeline.bubble).toFixed(1)}% of the work`)
})
