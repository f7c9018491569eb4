// The optimizer's state and updates on the host (optimizerCpuOffload): the bits of a run without it, in every sharing, and from
// checkpoint to checkpoint. Ranks are real processes; those of one size do their runs one after the other.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { SavedRuns } from './savedRuns.js'
import { run } from './startRanks.js'
import { type Work, work } from './worker.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-offload-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const runs = new SavedRuns(folder)

const base = { trainIters: 6, microBatchSize: 1, hiddenDropout: 0.1 }
const bucketSize = 20_000
const whole = { useDistributedOptimizer: false, overlapParamGather: false, bucketSize }
const named = (name: string, more: Partial<Work> = {}) => runs.named(name, { ...base, ...more })
const bf16 = { mixedPrecision: 'bf16_mixed' } as const
const host = { optimizer: { optimizerCpuOffload: true } }
const third = { optimizer: { optimizerCpuOffload: true, optimizerOffloadFraction: 0.3 } }

const alone: readonly Work[] = [
  named('alone'),
  named('alone, host', host),
  named('alone, third', third),
  named('alone bf16', bf16),
  named('alone bf16, host', { ...bf16, ...host }),
  named('alone bf16, third', { ...bf16, ...third }),
  named('half', { ...bf16, ...third, trainIters: 3 }),
  named('half goes on, host', { ...bf16, ...host, load: runs.place('half') }),
  named('half goes on', { ...bf16, load: runs.place('half') }),
]
const two: readonly Work[] = [
  named('dp2', { ddp: { bucketSize } }),
  named('dp2, host', { ddp: { bucketSize }, ...host }),
  named('dp2 bf16', { ddp: { bucketSize }, ...bf16 }),
  named('dp2 bf16, third', { ddp: { bucketSize }, ...bf16, ...third }),
  named('dp2 bf16, waits', { ddp: { bucketSize, overlapParamGather: false }, ...bf16, ...host }),
  named('dp2 whole bf16, host', { ddp: whole, ...bf16, ...host }),
  named('tp2', { tp: 2, sequenceParallel: true }),
  named('tp2, third', { tp: 2, sequenceParallel: true, ...third }),
  named('tp2 half', { tp: 2, sequenceParallel: true, ...third, trainIters: 3 }),
  named('tp2 goes on, host', { tp: 2, sequenceParallel: true, ...host, load: runs.place('tp2 half') }),
]

beforeAll(async () => {
  for (const task of alone) await work(task, () => {})
  await run(two, 2)
}, 240_000)

describe('an optimizer on the host', () => {
  it.each([
    ['alone, host', 'alone'],
    ['alone, third', 'alone'],
    ['alone bf16, host', 'alone bf16'],
    ['alone bf16, third', 'alone bf16'],
    ['dp2, host', 'dp2'],
    ['dp2 bf16, third', 'dp2 bf16'],
    ['dp2 bf16, waits', 'dp2 bf16'],
    ['dp2 whole bf16, host', 'dp2 bf16'],
    ['tp2, third', 'tp2'],
  ])('has the losses, weights and state of one without: %s', (name, peer) =>
    runs.expectSameBits(name, peer, base.trainIters),
  )

  it.each([
    ['half goes on, host', 'alone bf16'],
    ['half goes on', 'alone bf16'],
    ['tp2 goes on, host', 'tp2'],
  ])('goes on bit for bit, on the host or not: %s', async (name, whole) => {
    expect(runs.curve(name)).toEqual(runs.curve(whole).slice(3))
    await runs.expectSameContents(name, whole)
  })
})
