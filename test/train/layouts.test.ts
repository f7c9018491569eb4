// A layout is only a layout: ranks as real processes, and the losses of one. Checkpoints of one layout go on in another.
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { expectSame } from './sameSteps.js'
import { run, type Step, start, steps } from './startRanks.js'
import { type Work, work } from './worker.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-layouts-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const place = (name: string) => join(folder, name)
const task = { trainIters: 20, microBatchSize: 2, hiddenDropout: 0.1, lr: 3e-4 }

const shared = { tp: 2, sequenceParallel: true } as const
/** By number of ranks: layouts by name, run one after the other in the same processes. */
const layouts: Readonly<Record<number, Readonly<Record<string, Partial<Work>>>>> = {
  2: { 'tp 2': { tp: 2 }, 'dp 2': {}, 'tp 2 with sequence parallelism': shared },
  4: {
    // Many buckets: sums of norms' gradients over tp go between the passes' own.
    'tp 2 with sequence parallelism, dp 2': { ...shared, ddp: { bucketSize: 5000 } },
    // Two key-value heads.
    'tp 4 with sequence parallelism': { tp: 4, sequenceParallel: true },
  },
}
const names = Object.values(layouts).flatMap((named) => Object.keys(named))
const files = (name: string) => ({ metrics: place(`${name}.jsonl`), save: place(name) })

let alone: Step[] = []
beforeAll(async () => {
  await work({ ...task, ...files('alone'), saveInterval: 8 }, () => {})
  alone = steps(files('alone').metrics)
  for (const [ranks, named] of Object.entries(layouts)) {
    const tasks = Object.entries(named).map(([name, layout]) => ({
      ...task,
      ...layout,
      ...files(name),
      saveInterval: 8,
    }))
    await run(tasks, Number(ranks))
  }
}, 240_000)

describe('ranks have the losses of one, dropout on', () => {
  it.each(names)('%s', (name) => {
    expectSame(steps(files(name).metrics), alone)
  })
})

describe('a run goes on', () => {
  /** The first 8 steps of a run, as if it had ended there. */
  function cut(name: string, as: string) {
    cpSync(join(place(name), 'iter_0000008'), join(place(as), 'iter_0000008'), { recursive: true })
    writeFileSync(join(place(as), 'latest_checkpointed_iteration.txt'), '8')
    const lines = readFileSync(files(name).metrics, 'utf8').split('\n').slice(0, 8)
    writeFileSync(files(as).metrics, `${lines.join('\n')}\n`)
    return { ...task, ...files(as) }
  }
  const sequence = 'tp 2 with sequence parallelism'

  it.each(['tp 2', sequence])(
    'from %s on one rank',
    async (name) => {
      await work(cut(name, `${name} to one`), () => {})
      expectSame(steps(files(`${name} to one`).metrics), alone)
    },
    60_000,
  )

  it('with sequence parallelism: from one rank, from tp 2 without it, and from itself bit for bit', async () => {
    const parts = { alone: 'wide', 'tp 2': 'other', [sequence]: 'same' }
    await run(
      Object.entries(parts).map(([name, as]) => ({ ...cut(name, as), ...shared })),
      2,
    )
    for (const as of Object.values(parts)) expectSame(steps(files(as).metrics), alone)
    const curve = (name: string) => steps(files(name).metrics).map(({ loss, gradNorm }) => [loss, gradNorm])
    expect(curve('same')).toEqual(curve(sequence))
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
