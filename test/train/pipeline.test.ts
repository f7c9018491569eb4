// A pipeline is only a layout: real processes, every schedule, and the losses of one rank, dropout on. Checkpoints go on in other layouts.
// A few here; VIADUCT_TEST_FULL=1 (npm run test:full) takes all.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { openCheckpoint } from '../../lib/checkpoint/checkpointIndex.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import { type PipelineTask, pipelineWork, type Uneven } from './pipelineRank.js'
import { expectSame } from './sameSteps.js'
import { type Step, startScript, steps } from './startRanks.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-pipeline-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const place = (name: string) => join(folder, name)
const full = process.env['VIADUCT_TEST_FULL'] === '1'

const tied = { shareEmbeddingsAndOutputWeights: true }
const stages = (pp: number) => ({ pipelineModelParallelSize: pp })
const chunks = (pp: number, vpp: number) => ({ ...stages(pp), virtualPipelineModelParallelSize: vpp })
const tp2 = { tensorModelParallelSize: 2 }
const sp2 = { ...tp2, sequenceParallel: true }

async function onRanks(task: PipelineTask, ranks: number): Promise<void> {
  const started = startScript('pipelineRank.ts', [JSON.stringify(task)], ranks)
  const code = await started.end
  if (code !== 0) throw new Error(`${ranks} ranks ended with ${code}:\n${started.lines.join('\n')}`)
}

const alone = new Map<boolean, Step[]>()
beforeAll(async () => {
  for (const isTied of [false, true]) {
    const metrics = place(`alone-${isTied}.jsonl`)
    await pipelineWork({ trainIters: 20, metrics, model: isTied ? tied : {} })
    alone.set(isTied, steps(metrics))
  }
})
const aloneOf = (model: Partial<ProviderInit>) =>
  alone.get(model.shareEmbeddingsAndOutputWeights === true) as readonly Step[]

describe('20 steps have the losses of one rank', () => {
  const quick: [string, number, Partial<ProviderInit>][] = [
    ['pp 2, tp 2 with sp, zb-h1, tied', 4, { ...stages(2), ...sp2, ...tied, pipelineSchedule: 'zb-h1' }],
  ]
  const more: [string, number, Partial<ProviderInit>][] = [
    ['pp 2, 1f1b', 2, stages(2)],
    ['pp 2, 1f1b, tied', 2, { ...stages(2), ...tied }],
    ['pp 2, gpipe', 2, { ...stages(2), pipelineSchedule: 'gpipe' }],
    ['pp 2, zb-h1, recompute', 2, { ...stages(2), pipelineSchedule: 'zb-h1', recomputeGranularity: 'full' }],
    ['pp 4, 1f1b, tied', 4, { ...stages(4), ...tied }],
    ['pp 4, gpipe', 4, { ...stages(4), pipelineSchedule: 'gpipe' }],
    ['pp 4, zb-h1', 4, { ...stages(4), pipelineSchedule: 'zb-h1' }],
    ['pp 2, vpp 2, tied', 2, { ...chunks(2, 2), ...tied }],
    [
      'pp 2, vpp 2, groups of 3, recompute',
      2,
      { ...chunks(2, 2), microbatchGroupSizePerVpStage: 3, recomputeGranularity: 'full' },
    ],
    ['pp 2, vpp 3, by layout', 2, { ...stages(2), pipelineModelParallelLayout: 'E|t|tt||t|L' }],
    ['pp 3, vpp 2, by layout', 3, { ...stages(3), pipelineModelParallelLayout: 'Et|t|t|t||L' }],
    ['pp 4, by layout', 4, { ...stages(4), pipelineModelParallelLayout: 'E|ttt|t|L' }],
    ['pp 2, uneven ends', 2, { ...stages(2), numLayersInFirstPipelineStage: 1, numLayersInLastPipelineStage: 3 }],
    ['pp 2, tp 2', 4, { ...stages(2), ...tp2 }],
    ['pp 2, dp 2', 4, stages(2)],
    ['pp 2, vpp 2, tp 2, dp 2', 8, { ...chunks(2, 2), ...sp2, ...tied }],
  ]
  it.each(full ? [...quick, ...more] : quick)(
    '%s',
    async (name, ranks, model) => {
      const metrics = place(`${name}.jsonl`)
      await onRanks({ trainIters: 20, metrics, model }, ranks)
      expectSame(steps(metrics), aloneOf(model))
    },
    120_000,
  )
})

describe('a checkpoint of one layout goes on in another', () => {
  const quick: [string, Partial<ProviderInit>, Partial<ProviderInit>, number, number][] = [
    ['pp 2, vpp 2 to one rank', { ...chunks(2, 2), ...tied }, tied, 2, 1],
    ['one rank to pp 2', tied, { ...stages(2), ...tied }, 1, 2],
    // The stage between has no parameters, and takes part in what the others load together.
    ['one rank to pp 3', tied, { ...stages(3), ...tied, pipelineModelParallelLayout: 'Ett||ttL' }, 1, 3],
  ]
  const more: typeof quick = [
    ['pp 2, dp 2, its optimizer sharded, to tp 2', { ...stages(2), ...tied }, { ...sp2, ...tied }, 4, 2],
    ['tp 2, dp 2 to pp 4', { ...tp2, ...tied }, { ...stages(4), ...tied }, 4, 4],
  ]
  it.each(full ? [...quick, ...more] : quick)(
    '%s',
    async (name, first, second, ranks, later) => {
      const files = { metrics: place(`${name}.jsonl`), save: place(name) }
      const run = (task: PipelineTask, count: number) => (count === 1 ? pipelineWork(task) : onRanks(task, count))
      await run({ ...files, trainIters: 8, model: first }, ranks)
      const saved = await openCheckpoint(place(name))
      await run({ ...files, trainIters: 20, model: second }, later)
      expectSame(steps(files.metrics), aloneOf(tied))
      // The same logical tensors whoever saved them: a tied embedding once.
      expect([...(await openCheckpoint(place(name))).tensors.keys()].sort()).toEqual([...saved.tensors.keys()].sort())
      expect(saved.tensors.has('output_layer.weight')).toBe(false)
    },
    120_000,
  )
})

it('a failure of the forward step on the last stage ends all ranks and is told as the first cause', async () => {
  const task: PipelineTask = { trainIters: 3, failAt: 11, model: chunks(2, 2) }
  const started = startScript('pipelineRank.ts', [JSON.stringify(task)], 2)
  expect(await started.end).not.toBe(0)
  const text = started.lines.join('\n')
  expect(text).toMatch(/rank 1 \(.*\) failed first/)
  expect(text).toContain('the forward step failed at call 11')
}, 60_000)

it('micro-batches of unequal lengths and token counts, metrics and evaluation, and as many tensors after each step', async () => {
  const task = { trainIters: 4 }
  await pipelineWork({ ...task, uneven: place('uneven.json') })
  await onRanks({ ...task, uneven: place('uneven-pp.json'), model: chunks(2, 2) }, 2)
  const [one, two] = ['uneven.json', 'uneven-pp.json'].map(
    (name) => JSON.parse(readFileSync(place(name), 'utf8')) as Uneven,
  ) as [Uneven, Uneven]
  expect(two.tokens).toEqual(one.tokens)
  expect(new Set(one.tokens).size).toBeGreaterThan(1)
  // The design's bounds for float32: 1e-6 of a loss, 1e-5 of a norm.
  one.losses.forEach((loss, i) => {
    expect(Math.abs((two.losses[i] as number) / loss - 1)).toBeLessThan(1e-6)
    expect(Math.abs((two.metrics[i] as number) / loss - 1)).toBeLessThan(1e-6)
    expect(Math.abs((two.gradNorms[i] as number) / (one.gradNorms[i] as number) - 1)).toBeLessThan(1e-5)
  })
  expect(Math.abs(two.validation / one.validation - 1)).toBeLessThan(1e-6)
  for (const { live } of [one, two]) expect(new Set(live.slice(1)).size).toBe(1)
}, 120_000)
