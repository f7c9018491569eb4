// A layout is only a layout: ranks as real processes, and the losses of one. Checkpoints of one layout go on in another.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { run, type Step, start, steps } from './startRanks.js'
import { work } from './worker.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-layouts-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const place = (name: string) => join(folder, name)
const task = { trainIters: 12, microBatchSize: 2, hiddenDropout: 0.1 }

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

describe('two ranks have the losses of one, dropout on', () => {
  it.each([
    ['tp', 2],
    ['dp', 1],
  ] as const)(
    '%s 2',
    async (name, tp) => {
      await run({ ...task, tp, metrics: place(`${name}.jsonl`), save: place(name), saveInterval: 6 }, 2)
      expectSame(steps(place(`${name}.jsonl`)), alone)
    },
    120_000,
  )

  it('one rank goes on from a checkpoint of two', async () => {
    await run({ ...task, trainIters: 6, tp: 2, metrics: place('part.jsonl'), save: place('part') }, 2)
    await work({ ...task, metrics: place('part.jsonl'), save: place('part') }, () => {})
    expectSame(steps(place('part.jsonl')), alone)
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
