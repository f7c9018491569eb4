// Fully sharded data parallelism (ddp.useMegatronFsdp): the bits of the sharded optimizer where a step has one micro-batch a rank, the
// losses of one rank everywhere; checkpoints go on in any layout and come back; ranks may have unequal numbers of micro-batches.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { FsdpFindings } from './fsdpRank.js'
import { expectSame } from './sameSteps.js'
import { SavedRuns } from './savedRuns.js'
import { run, type Step, startScript, steps } from './startRanks.js'
import { type Work, work } from './worker.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-fsdp-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const runs = new SavedRuns(folder)
const { place } = { place: runs.place.bind(runs) }
const base = { trainIters: 6, hiddenDropout: 0.1 }
const named = (name: string, more: Partial<Work> = {}): Work => runs.named(name, { ...base, ...more })
const fsdp = { useMegatronFsdp: true }
const kept = { ...fsdp, reshardAfterForward: false }
const behind = { ...fsdp, overlapGradReduce: false, overlapParamGather: false }

// The fixture's global batch of 8: with so many a rank a step has one micro-batch on each, and nothing is added up in another order.
const one = (ranks: number) => ({ microBatchSize: 8 / ranks })
// The biases of the choice are no weights that are trained: each rank has them whole.
const experts = {
  numMoeExperts: 4,
  moeRouterTopk: 2,
  moeFfnHiddenSize: 24,
  moeRouterScoreFunction: 'sigmoid',
  moeRouterEnableExpertBias: true,
  moeRouterBiasUpdateRate: 0.01,
  weightsLoader: null,
} as const
const tied = { shareEmbeddingsAndOutputWeights: true, weightsLoader: null }

type Case = readonly [name: string, ranks: number, more: Partial<Work>]
const equal: readonly Case[] = [
  ['dp2', 2, one(2)],
  ['dp2 bf16', 2, { ...one(2), mixedPrecision: 'bf16_mixed' }],
  ['dp2 recomputed', 2, { ...one(2), model: { recomputeGranularity: 'full', recomputeNumLayers: 2 } }],
  ['dp2 tied', 2, { ...one(2), model: tied }],
  ['dp2 ep2', 2, { ...one(2), model: { ...experts, expertModelParallelSize: 2 } }],
  ['cp2', 2, { ...one(1), model: { contextParallelSize: 2 } }],
  ['dp2 hosted', 2, { ...one(2), optimizer: { optimizerCpuOffload: true, optimizerOffloadFraction: 0.5 } }],
  ['tp2 sp experts', 2, { ...one(1), tp: 2, sequenceParallel: true, model: experts }],
  ['dp4', 4, one(4)],
  ['tp2 dp2', 4, { ...one(2), tp: 2, sequenceParallel: true }],
]

const ofRanks = (ranks: number, more: readonly Work[]) =>
  run(
    [
      ...equal
        .filter(([, size]) => size === ranks)
        .flatMap(([name, , work]) => [named(name, work), named(`${name} fsdp`, { ...work, ddp: fsdp })]),
      ...more,
    ],
    ranks,
  )

const continued = (name: string, more: Partial<Work> = {}): Work =>
  named(name, { microBatchSize: 1, load: place('half'), ...more })

/** All bits of losses, weights and state. Norms are float64 sums over other ranges: they differ by the rounding of those. */
async function expectSameWeights(a: string, b: string): Promise<void> {
  const [left, right] = [runs.curve(a), runs.curve(b)]
  expect(left.map(({ loss }) => loss)).toEqual(right.map(({ loss }) => loss))
  for (const [i, { gradNorm }] of left.entries())
    expect(Math.abs(gradNorm / (right[i]?.gradNorm as number) - 1)).toBeLessThan(1e-13)
  expect(left).toHaveLength(base.trainIters)
  await runs.expectSameContents(a, b)
}

let alone: Step[] = []
let findings: FsdpFindings
beforeAll(async () => {
  await work({ ...base, microBatchSize: 1, metrics: place('alone.jsonl') }, () => {})
  alone = steps(place('alone.jsonl'))
  await ofRanks(2, [
    named('kept', { ...one(2), ddp: kept }),
    named('behind', { ...one(2), ddp: behind }),
    named('many', { microBatchSize: 1, ddp: fsdp }),
    named('many kept', { microBatchSize: 1, ddp: kept }),
    named('half', { microBatchSize: 1, ddp: fsdp, trainIters: 3 }),
    continued('again', { ddp: fsdp }),
    continued('whole again', { ddp: { useDistributedOptimizer: false, overlapParamGather: false } }),
    continued('tp2 again', { tp: 2 }),
    named('experts half', { ...one(2), model: experts, ddp: fsdp, trainIters: 3 }),
    named('experts again', { ...one(2), model: experts, ddp: fsdp, load: place('experts half') }),
    named('experts whole again', { ...one(2), model: experts, load: place('experts half') }),
    named('experts whole half', { ...one(2), model: experts, trainIters: 3 }),
    named('experts back again', { ...one(2), model: experts, ddp: fsdp, load: place('experts whole half') }),
    named('experts', { ...one(2), model: experts }),
  ])
  await ofRanks(4, [continued('dp4 again', { ddp: fsdp })])
  const probe = startScript('fsdpRank.ts', [place('findings.json')], 2)
  if ((await probe.end) !== 0) throw new Error(probe.lines.join('\n'))
  findings = JSON.parse(readFileSync(place('findings.json'), 'utf8')) as FsdpFindings
}, 300_000)

describe('fully sharded', () => {
  it.each(equal.map(([name]) => name))('has the losses, weights and state of the sharded optimizer: %s', (name) =>
    expectSameWeights(`${name} fsdp`, name),
  )

  it.each(['kept', 'behind'])('whatever stays and whatever runs beside compute: %s', (name) =>
    expectSameWeights(name, 'dp2'),
  )

  it('adds up micro-batches, whether weights stay or not', () =>
    runs.expectSameBits('many', 'many kept', base.trainIters))

  it('trains as one rank does', () => expectSame(steps(place('many.jsonl')), alone))
})

describe('its checkpoints', () => {
  it('go on bit for bit', () => runs.expectSameContents('many', 'again'))

  it.each(['whole again', 'tp2 again', 'dp4 again'])('go on in another layout: %s', (name) =>
    expectSame(steps(place(`${name}.jsonl`)), alone.slice(3)),
  )

  it.each(['experts again', 'experts whole again', 'experts back again'])(
    'have what is not trained too, and go on as if nothing had changed, fully sharded or not: %s',
    async (name) => {
      await runs.expectSameContents(name, 'experts')
      expect(runs.curve(name).map(({ loss }) => loss)).toEqual(
        runs
          .curve('experts')
          .slice(3)
          .map(({ loss }) => loss),
      )
    },
  )

  it('go on on one rank, and what that saves goes on fully sharded', async () => {
    await work(named('dp1', { microBatchSize: 1, load: place('half'), trainIters: 5 }), () => {})
    await run([named('back', { microBatchSize: 1, load: place('dp1'), ddp: fsdp })], 2)
    expectSame(steps(place('back.jsonl')), alone.slice(5))
  })
})

describe('a rank', () => {
  it.each(['unequal', 'none'] as const)('may have fewer micro-batches than others, or none: %s', (which) => {
    const { apart, together } = findings[which]
    expect(apart.tokens).toEqual(together.tokens)
    // Sums over ranks have another order than those over micro-batches.
    for (const [i, loss] of apart.losses.entries())
      expect(Math.abs(loss / (together.losses[i] as number) - 1)).toBeLessThan(1e-6)
    expect(Math.abs(apart.validation / together.validation - 1)).toBeLessThan(1e-6)
  })

  it('may have layers that are not trained', () => {
    const { apart, together } = findings.frozen
    expect(apart.tokens).toEqual(together.tokens)
    for (const [i, loss] of apart.losses.entries())
      expect(Math.abs(loss / (together.losses[i] as number) - 1)).toBeLessThan(1e-6)
    expect(new Set(together.losses).size).toBe(3)
  })

  it('has its share of weights and gradients between steps', () => {
    const { resting, sharded, elements } = findings.weights
    // float32 of both; the sharded optimizer has all of them. Units are filled up to 16 elements a parameter and rank.
    expect(Math.abs((sharded - resting) / (4 * elements) - 1)).toBeLessThan(0.02)
  })

  it('gathers and sums beside products', () => {
    const { gathers, sums, beside } = findings.trace
    // 2 micro-batches of 4 layers and both ends: all of them forward, backward the layers again, as the last unit is still there.
    expect(gathers).toBe(2 * (6 + 4))
    expect(sums).toBe(2 * 6)
    expect(beside).toBeGreaterThan(gathers / 2)
  })

  it('leaves no tensor behind', () => {
    const [, second, third] = findings.slots
    expect(third).toBe(second)
  })

  it('saves the Hugging Face folder that it would save whole, and goes on from one', () => {
    const { folders, goingOn } = findings
    expect(folders.sharded).toBe(folders.whole)
    expect(goingOn.sharded).toBe(goingOn.whole)
    expect(goingOn.whole).not.toBe(folders.whole)
  })

  it('tells which rank made gradients that are not finite, before they are summed', () => {
    expect(findings.notFinite).toMatch(/step 1: the gradient of \S+ and \d+ more on rank 1 is not finite/)
  })
})
