// Schedules of random sizes are proved, and the prover finds what is wrong with spoiled ones.
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { heldActivations, type Schedule, scheduleFaults } from '../../../lib/parallel/scheduleFaults.js'
import {
  forwardSchedule,
  mostActivations,
  type PipelineAction,
  pipelineSchedule,
  type ScheduleSizes,
  scheduleKinds,
} from '../../../lib/parallel/schedules.js'

const sizes: fc.Arbitrary<ScheduleSizes> = fc
  .record({
    kind: fc.constantFrom(...scheduleKinds),
    stages: fc.integer({ min: 1, max: 8 }),
    virtual: fc.integer({ min: 1, max: 5 }),
    microBatches: fc.integer({ min: 1, max: 24 }),
    more: fc.integer({ min: 0, max: 8 }),
  })
  .map(({ kind, stages, virtual, microBatches, more }) =>
    kind === 'interleaved'
      ? { kind, stages, chunks: virtual, microBatches, groupSize: stages + more }
      : { kind, stages, chunks: 1, microBatches },
  )

const scheduleOf = (given: ScheduleSizes): Schedule => ({ ...given, actions: pipelineSchedule(given) })
const short = (actions: readonly PipelineAction[]) =>
  actions
    .map(({ kind, microBatch, chunk }) => {
      const letter = { forward: 'F', backward: 'B', backwardInput: 'I', backwardWeight: 'W' }[kind]
      return `${letter}${microBatch}${'abcdef'[chunk]}`
    })
    .join(' ')

describe('every schedule', () => {
  it('does each pass once, never waits for ever, keeps the order of transfers and its bound of activations', () => {
    fc.assert(
      fc.property(sizes, (given) => {
        expect(scheduleFaults(scheduleOf(given), (stage) => mostActivations(given, stage))).toEqual([])
      }),
      { numRuns: 300 },
    )
  })

  it('reaches its bound of activations on every stage', () => {
    fc.assert(
      fc.property(sizes, (given) => {
        const held = pipelineSchedule(given).map(heldActivations)
        expect(held).toEqual(held.map((_, stage) => mostActivations(given, stage)))
      }),
      { numRuns: 100 },
    )
  })

  it('runs forward alone, each micro-batch once through each chunk', () => {
    fc.assert(
      fc.property(sizes, (given) => {
        for (const actions of forwardSchedule(given)) {
          const keys = actions.map(({ kind, microBatch, chunk }) => `${kind} ${microBatch} ${chunk}`)
          expect(new Set(keys).size).toBe(given.microBatches * given.chunks)
          expect(keys).toHaveLength(given.microBatches * given.chunks)
        }
      }),
      { numRuns: 50 },
    )
  })
})

describe('orders from the papers', () => {
  it.each([
    ['gpipe', 1, ['F0a F1a F2a B0a B1a B2a', 'F0a F1a F2a B0a B1a B2a']],
    ['1f1b', 1, ['F0a F1a B0a F2a B1a B2a', 'F0a B0a F1a B1a F2a B2a']],
    ['zb-h1', 1, ['F0a F1a I0a W0a F2a I1a W1a I2a W2a', 'F0a I0a F1a I1a W0a F2a I2a W1a W2a']],
  ] as const)('%s over 2 stages, 3 micro-batches', (kind, chunks, expected) => {
    expect(pipelineSchedule({ kind, stages: 2, chunks, microBatches: 3 }).map(short)).toEqual(expected)
  })

  it("interleaved over 2 stages of 2 chunks, 4 micro-batches, is Megatron's", () => {
    const actions = pipelineSchedule({ kind: 'interleaved', stages: 2, chunks: 2, microBatches: 4 })
    // Warm-up: 2 · (stages - 1 - stage) + (chunks - 1) · stages passes.
    expect(actions.map(short)).toEqual([
      'F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a',
      'F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a',
    ])
  })

  it('groups of more micro-batches than stages pass a chunk together', () => {
    const [first] = forwardSchedule({ kind: 'interleaved', stages: 2, chunks: 2, microBatches: 5, groupSize: 3 })
    expect(short(first as PipelineAction[])).toBe('F0a F1a F2a F0b F1b F2b F3a F4a F3b F4b')
    // A rest smaller than the pipeline joins the group before it.
    const [merged] = forwardSchedule({ kind: 'interleaved', stages: 3, chunks: 2, microBatches: 4 })
    expect(short(merged as PipelineAction[])).toBe('F0a F1a F2a F3a F0b F1b F2b F3b')
  })
})

describe('the prover', () => {
  const given = { kind: '1f1b', stages: 3, chunks: 1, microBatches: 4 } as const
  const spoiled = (change: (actions: PipelineAction[][]) => void) => {
    const actions = pipelineSchedule(given)
    change(actions)
    return scheduleFaults({ ...given, actions }, (stage) => mostActivations(given, stage)).join('; ')
  }
  it.each<[string, (actions: PipelineAction[][]) => void, string]>([
    ['a pass that is missing', (a) => a[1]?.splice(3, 1), 'stage 1, micro-batch'],
    ['a pass done twice', (a) => a[2]?.push({ kind: 'backward', microBatch: 0, chunk: 0 }), '1 forward, 2 backward'],
    ['a backward pass before its forward pass', (a) => a[2]?.reverse(), 'waits for ever for'],
    ['stages that wait for each other', (a) => a[0]?.sort((x, y) => x.microBatch - y.microBatch), 'waits for ever for'],
    [
      'transfers in another order',
      (a) => a[0]?.unshift(...(a[0]?.splice(1, 1) ?? [])),
      'between stages 0 and 1, forward: transfer 0',
    ],
    [
      'half a gradient',
      (a) => (a[0] as PipelineAction[]).push({ kind: 'backwardWeight', microBatch: 1, chunk: 0 }),
      '1 backwardWeight',
    ],
    [
      'a micro-batch too many',
      (a) => a[0]?.push({ kind: 'forward', microBatch: 9, chunk: 0 }),
      'there is no micro-batch',
    ],
    [
      'more activations than agreed',
      (a) => a[0]?.sort((x, y) => (x.kind === y.kind ? 0 : x.kind === 'forward' ? -1 : 1)),
      'holds 4 activations at once, expected at most 3',
    ],
  ])('finds %s', (_, change, expected) => {
    expect(spoiled(change)).toContain(expected)
  })
})

it('refuses sizes by name, all together', () => {
  expect(() => pipelineSchedule({ kind: '1f1b', stages: 0, chunks: 2, microBatches: 1.5 })).toThrow(
    /pipeline stages must be .* got 0\s+micro-batches must be .* got 1.5\s+schedule 1f1b has one chunk a stage, got 2/,
  )
  expect(() => pipelineSchedule({ kind: 'interleaved', stages: 4, chunks: 2, microBatches: 8, groupSize: 3 })).toThrow(
    /at least as many as there are stages, 4, got 3/,
  )
})
