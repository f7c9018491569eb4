// A layout is only a layout: ranks as real processes, and the losses of one. Checkpoints of one layout go on in another.
import { cpSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { run, type Step, start, steps } from './startRanks.js'
import { type Work, work } from './worker.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-layouts-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const place = (name: string) => join(folder, name)
const task = { trainIters: 20, microBatchSize: 2, hiddenDropout: 0.1, lr: 3e-4 }

let alone: Step[] = []
beforeAll(async () => {
  await work({ ...task, metrics: place('alone.jsonl') }, () => {})
  alone = steps(place('alone.jsonl'))
})

// Sums over ranks have another order: 1e-6 for ten steps, 1e-5 after; norms 1e-5 for five steps, then 1e-4.
function expectSame(got: readonly Step[], expected: readonly Step[]): void {
  expect(got.map(({ step }) => step)).toEqual(expected.map(({ step }) => step))
  got.forEach(({ step, loss, gradNorm, lr }, i) => {
    const peer = expected[i] as Step
    expect(Math.abs(loss / peer.loss - 1), `loss of step ${step}`).toBeLessThan(step <= 10 ? 1e-6 : 1e-5)
    expect(Math.abs(gradNorm / peer.gradNorm - 1), `norm of step ${step}`).toBeLessThan(step <= 5 ? 1e-5 : 1e-4)
    expect(lr).toBe(peer.lr)
  })
}

const shared = { tp: 2, sequenceParallel: true } as const

describe('ranks have the losses of one, dropout on', () => {
  it.each<[string, number, Partial<Work>]>([
    ['tp 2', 2, { tp: 2 }],
    ['dp 2', 2, {}],
    ['tp 2 with sequence parallelism', 2, shared],
    // Many buckets: sums of norms' gradients over tp go between the passes' own.
    ['tp 2 with sequence parallelism, dp 2', 4, { ...shared, ddp: { bucketSize: 5000 } }],
    // Two key-value heads.
    ['tp 4 with sequence parallelism', 4, { tp: 4, sequenceParallel: true }],
  ])(
    '%s',
    async (name, ranks, layout) => {
      await run({ ...task, ...layout, metrics: place(`${name}.jsonl`), save: place(name), saveInterval: 6 }, ranks)
      expectSame(steps(place(`${name}.jsonl`)), alone)
    },
    120_000,
  )
})

describe('a run goes on', () => {
  const files = (name: string) => ({ metrics: place(`${name}.jsonl`), save: place(name) })

  it('from sequence parallelism on one rank within the numbers, in the same layout bit for bit', async () => {
    await run({ ...task, ...shared, ...files('one'), trainIters: 8 }, 2)
    cpSync(place('one'), place('same'), { recursive: true })
    cpSync(place('one.jsonl'), place('same.jsonl'))
    await run({ ...task, ...files('one') })
    expectSame(steps(place('one.jsonl')), alone)
    await run({ ...task, ...shared, ...files('same') }, 2)
    const curve = (name: string) => steps(place(`${name}.jsonl`)).map(({ loss, gradNorm }) => [loss, gradNorm])
    expect(curve('same')).toEqual(curve('tp 2 with sequence parallelism'))
  }, 120_000)

  it('from one rank with sequence parallelism', async () => {
    await run({ ...task, ...files('two'), trainIters: 8 })
    await run({ ...task, ...shared, ...files('two') }, 2)
    expectSame(steps(place('two.jsonl')), alone)
  }, 120_000)
})

describe('faults', () => {
  it('a NaN on one of two data-parallel ranks stops both and names the rank and the parameter', async () => {
    const parameter = 'decoder.layers.0.self_attention.linear_proj.weight'
    const started = start({ ...task, poison: { step: 2, rank: 1, parameter } }, 2)
    expect(await started.end).not.toBe(0)
    const text = started.lines.join('\n')
    expect(text).toContain(`step 2: the gradient of ${parameter} on rank 1 is not finite`)
  }, 120_000)
})
