// The optimizer sharded over data-parallel ranks: the bits of the unsharded one, at 1 / dp of its memory; its checkpoints go on in
// any layout. Ranks are real processes; those of one size do their runs one after the other.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { openCheckpoint } from '../../lib/checkpoint/checkpointIndex.js'
import { volume } from '../../lib/tensor/region.js'
import { SavedRuns } from './savedRuns.js'
import type { Findings } from './shardedRank.js'
import { run, type Step, startScript, steps } from './startRanks.js'
import { type Work, work } from './worker.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-sharded-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

// About 85000 parameters: buckets of 20000 elements are four or five.
const base = { trainIters: 6, microBatchSize: 1, hiddenDropout: 0.1 }
const sharded = { bucketSize: 20_000 }
const whole = {
  bucketSize: 20_000,
  useDistributedOptimizer: false,
  overlapParamGather: false,
  overlapGradReduce: false,
}

const runs = new SavedRuns(folder)
const { place, curve } = { place: runs.place.bind(runs), curve: runs.curve.bind(runs) }
const named = (name: string, more: Partial<Work> = {}): Work => runs.named(name, { ...base, ...more })

// Sums over ranks have another order: the bounds of any layout (test/train/layouts.test.ts).
function expectClose(name: string, expected: readonly Step[]): void {
  const got = steps(place(`${name}.jsonl`))
  expect(got.length).toBeGreaterThan(0)
  for (const { step, loss, gradNorm } of got) {
    const peer = expected[step - 1] as Step
    expect(Math.abs(loss / peer.loss - 1), `${name}: loss of step ${step}`).toBeLessThan(1e-6)
    expect(Math.abs(gradNorm / peer.gradNorm - 1), `${name}: norm of step ${step}`).toBeLessThan(
      step <= 5 ? 1e-5 : 1e-4,
    )
  }
}

/** A run that goes on from the half-way checkpoint of two data-parallel ranks. */
const continued = (name: string, more: Partial<Work> = {}): Work => named(name, { load: place('half'), ...more })

let alone: Step[] = []
let findings: Findings
beforeAll(async () => {
  await work({ ...base, metrics: place('alone.jsonl') }, () => {})
  alone = steps(place('alone.jsonl'))
  await run(
    [
      named('dp2', { ddp: sharded }),
      named('dp2 whole', { ddp: whole }),
      named('dp2 one bucket', { ddp: { ...sharded, bucketSize: null, overlapGradReduce: false } }),
      named('dp2 bf16', { ddp: sharded, mixedPrecision: 'bf16_mixed' }),
      named('dp2 bf16 whole', { ddp: whole, mixedPrecision: 'bf16_mixed' }),
      named('dp2 recomputed', { ddp: sharded, recompute: true }),
      named('half', { ddp: sharded, trainIters: 3 }),
      continued('dp2 again', { ddp: sharded }),
      continued('dp2 again whole', { ddp: whole }),
      continued('tp2', { tp: 2, ddp: sharded }),
    ],
    2,
  )
  await run(
    [
      named('dp4', { ddp: sharded }),
      named('dp4 whole', { ddp: whole }),
      named('tp2 dp2', { tp: 2, ddp: sharded }),
      named('tp2 dp2 whole', { tp: 2, ddp: whole }),
      continued('dp4 again', { ddp: sharded }),
    ],
    4,
  )
  const probe = startScript('shardedRank.ts', [place('findings.json')], 2)
  if ((await probe.end) !== 0) throw new Error(probe.lines.join('\n'))
  findings = JSON.parse(readFileSync(place('findings.json'), 'utf8')) as Findings
}, 240_000)

describe('the sharded optimizer', () => {
  it.each(['dp2', 'dp2 bf16', 'dp4', 'tp2 dp2'])('has the losses, weights and state of the whole one: %s', (name) =>
    runs.expectSameBits(name, `${name} whole`, base.trainIters),
  )

  it.each(['dp2', 'dp4', 'tp2 dp2'])('trains as one rank does: %s', (name) => expectClose(name, alone))

  it('does not depend on buckets, overlap and recomputation', () => {
    const losses = (name: string) => curve(name).map(({ loss }) => loss)
    expect(losses('dp2 one bucket')).toEqual(losses('dp2'))
    expect(losses('dp2 recomputed')).toEqual(losses('dp2'))
  })

  it('takes 1 / dp of the memory, as planned', () => {
    const { wholeBytes, shardedBytes, planned } = findings.memory
    expect(Math.abs(shardedBytes / planned - 1)).toBeLessThan(0.1)
    expect(Math.abs(wholeBytes / 2 / shardedBytes - 1)).toBeLessThan(0.02)
  })
})

describe('its checkpoints', () => {
  it('are written once, each range by the rank that has it', async () => {
    const { tensors } = await openCheckpoint(place('dp2'))
    const bytes: Record<string, number> = {}
    for (const [name, { pieces }] of tensors) {
      if (!name.startsWith('optimizer.')) continue
      for (const { file, size } of pieces) bytes[file] = (bytes[file] ?? 0) + 4 * volume(size)
    }
    const shares = Object.values(bytes)
    expect(shares).toHaveLength(2)
    // Halves, but for the rows that pad the vocabulary in memory.
    expect(Math.min(...shares) / ((shares[0] as number) + (shares[1] as number))).toBeGreaterThan(0.45)
  })

  it('go on bit for bit in the same layout, sharded or not', async () => {
    const rest = curve('dp2').slice(3)
    expect(curve('dp2 again')).toEqual(rest)
    expect(curve('dp2 again whole')).toEqual(rest)
    await runs.expectSameContents('dp2', 'dp2 again')
  })

  it.each(['dp4 again', 'tp2'])('go on in another layout: %s', (name) => expectClose(name, alone))

  it('go on on one rank', async () => {
    await work(continued('dp1'), () => {})
    expect(steps(place('dp1.jsonl'))[0]?.step).toBe(4)
    expectClose('dp1', alone)
  })
})

describe('a step of two data-parallel ranks', () => {
  it('sums buckets during the last backward pass, from the second step on', () => {
    const { buckets, early } = findings.overlap
    expect(buckets).toBeGreaterThan(3)
    // The bucket with the embedding is complete only when the pass ends; all of them are then.
    expect(early).toEqual([0, buckets, buckets])
  })

  it("hands the textbook's bytes to collectives: all gradients, and its own half of the parameters", () => {
    const { payload, elements } = findings.overlap
    expect(Math.abs(payload / (4 * elements + (4 * elements) / 2) - 1)).toBeLessThan(0.01)
  })

  it('leaves no tensor behind', () => {
    const [, second, third] = findings.overlap.slots
    expect(third).toBe(second)
  })

  it('averages over tokens exactly, with unequal counts in micro-batches and ranks', () => {
    const { tokens, losses, norms, aloneTokens, aloneLosses, aloneNorms } = findings.unequal
    expect(tokens).toEqual(aloneTokens)
    expect(new Set(tokens).size).toBeGreaterThan(1)
    for (const [i, loss] of losses.entries()) {
      expect(Math.abs(loss / (aloneLosses[i] as number) - 1)).toBeLessThan(1e-6)
      expect(Math.abs((norms[i] as number) / (aloneNorms[i] as number) - 1)).toBeLessThan(1e-5)
    }
  })

  it.each(['checkpoint', 'folder'] as const)('leaves parameters that a save at once sees whole: %s', (way) => {
    const [atOnce, later] = findings.saved[way].split('|')
    expect(atOnce).toBe(later)
  })

  it('fails on the compute stream with what failed on the communication stream', () => {
    expect(findings.failure).toContain('a collective failed')
  })
})
