// Every stage of a pipeline, and every rank of tp, knows where sequences begin and end: packed and padded batches, of other lengths and
// other numbers of rows in each micro-batch, have the losses and gradients of the same sequences alone on one rank, dropout on. A few
// layouts here; VIADUCT_TEST_FULL=1 takes each form in each.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { ProviderInit } from '../../lib/models/provider.js'
import type { Form } from './sequences.js'
import { type SequenceTask, sequenceWork, type WrittenSteps } from './sequencesRank.js'
import { startScript } from './startRanks.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-sequences-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const place = (name: string) => join(folder, name)
const full = process.env['VIADUCT_TEST_FULL'] === '1'

const tied = { shareEmbeddingsAndOutputWeights: true }
const stages = (pp: number) => ({ pipelineModelParallelSize: pp })
const chunks = { ...stages(2), virtualPipelineModelParallelSize: 2 }
const tp = (size: number) => ({ tensorModelParallelSize: size })
const sp = (size: number) => ({ ...tp(size), sequenceParallel: true })

interface Layout {
  readonly ranks: number
  readonly model: Partial<ProviderInit>
  readonly form: Form
}

// Tokens that tp does not divide are among the steps of each.
const quick: Record<string, Layout> = {
  'pp 4': { ranks: 4, form: 'packed', model: stages(4) },
  'pp 2, vpp 2, tp 2 with sp, recompute, tied': {
    ranks: 4,
    form: 'packed',
    model: { ...chunks, ...sp(2), ...tied, recomputeGranularity: 'full' },
  },
  'pp 2, dp 2, zb-h1': { ranks: 4, form: 'packed', model: { ...stages(2), pipelineSchedule: 'zb-h1' } },
  'tp 2 with sp, dp 2': { ranks: 4, form: 'left', model: sp(2) },
}
const wide: Record<string, Omit<Layout, 'form'>> = {
  'pp 2': { ranks: 2, model: stages(2) },
  'pp 2, gpipe, tied': { ranks: 2, model: { ...stages(2), ...tied, pipelineSchedule: 'gpipe' } },
  'pp 2, zb-h1': { ranks: 2, model: { ...stages(2), pipelineSchedule: 'zb-h1' } },
  'pp 2, vpp 2, groups of 3': { ranks: 2, model: { ...chunks, microbatchGroupSizePerVpStage: 3 } },
  'tp 2': { ranks: 2, model: tp(2) },
  'tp 2 with sp': { ranks: 2, model: sp(2) },
  'dp 2': { ranks: 2, model: {} },
  'pp 3 by layout': { ranks: 3, model: { ...stages(3), pipelineModelParallelLayout: 'Et|tt|t|||L' } },
  'pp 4, zb-h1, tied': { ranks: 4, model: { ...stages(4), ...tied, pipelineSchedule: 'zb-h1' } },
  'pp 4, gpipe': { ranks: 4, model: { ...stages(4), pipelineSchedule: 'gpipe' } },
  'tp 4 with sp': { ranks: 4, model: sp(4) },
  'pp 2, tp 2': { ranks: 4, model: { ...stages(2), ...tp(2) } },
  'pp 2, vpp 2, tp 2 with sp, tied': { ranks: 4, model: { ...chunks, ...sp(2), ...tied } },
  'pp 2, dp 2': { ranks: 4, model: stages(2) },
  'tp 2 with sp, dp 2': { ranks: 4, model: sp(2) },
  'dp 4': { ranks: 4, model: {} },
  'pp 2, vpp 2, tp 2 with sp, dp 2, tied': { ranks: 8, model: { ...chunks, ...sp(2), ...tied } },
}
const layouts: Record<string, Layout> = full
  ? Object.fromEntries([
      ...Object.entries(quick),
      ...(['alone', 'packed', 'left', 'right'] as const).flatMap((form) =>
        Object.entries(wide).map(([name, layout]) => [`${name}, ${form}`, { ...layout, form }] as const),
      ),
    ])
  : quick

const trainIters = full ? 10 : 6
const isTied = (model: Partial<ProviderInit>) => model.shareEmbeddingsAndOutputWeights === true
const taskOf = (name: string, { form, model }: Layout, more: Partial<SequenceTask> = {}): SequenceTask => ({
  form,
  model,
  trainIters,
  gradients: place(`gradients-${isTied(model)}`),
  written: place(name),
  ...more,
})
const read = (name: string) => JSON.parse(readFileSync(place(name), 'utf8')) as WrittenSteps

const disagree = ['count', 'length', 'tokens', 'packed'] as const

beforeAll(async () => {
  for (const model of [{}, tied]) {
    const alone: Layout = { ranks: 1, form: 'alone', model }
    await sequenceWork(taskOf(`one rank ${isTied(model)}`, alone))
  }
  for (const ranks of new Set(Object.values(layouts).map((layout) => layout.ranks))) {
    const tasks = Object.entries(layouts)
      .filter(([, layout]) => layout.ranks === ranks)
      .map(([name, layout]) => taskOf(name, layout, name === 'pp 4' ? { disagree } : {}))
    const started = startScript('sequencesRank.ts', [JSON.stringify(tasks)], ranks)
    const code = await started.end
    if (code !== 0) throw new Error(`${ranks} ranks ended with ${code}:\n${started.lines.join('\n')}`)
  }
}, 900_000)

/** The design's bounds for float32: 1e-6 of a loss; of a norm 1e-5 for five steps, then 1e-4; of a gradient 1e-4 of its norm. */
function expectSame(got: WrittenSteps, wanted: WrittenSteps): void {
  expect(got.tokens).toEqual(wanted.tokens)
  wanted.losses.forEach((loss, i) => {
    expect(Math.abs((got.losses[i] as number) / loss - 1), `loss of step ${i + 1}`).toBeLessThan(1e-6)
    const bound = i < 5 ? 1e-5 : 1e-4
    expect(
      Math.abs((got.gradNorms[i] as number) / (wanted.gradNorms[i] as number) - 1),
      `norm of step ${i + 1}`,
    ).toBeLessThan(bound)
  })
  expect(Math.abs(got.validation / wanted.validation - 1)).toBeLessThan(1e-6)
  const names = Object.keys(wanted.gradients)
  expect(Object.keys(got.gradients).sort()).toEqual(names.sort())
  const global = Math.hypot(...Object.values(wanted.gradients).map(({ norm }) => norm))
  const floor = (1e-3 * global) / Math.sqrt(names.length)
  for (const [name, { norm, difference }] of Object.entries(got.gradients))
    expect(difference / Math.max(norm, floor), name).toBeLessThan(1e-4)
}

describe('the losses and gradients of the same sequences alone', () => {
  it('on one rank are those of this test: of several lengths, some labels ignored', () => {
    const one = read('one rank false')
    expect(new Set(one.tokens).size).toBeGreaterThan(1)
    expect(Object.values(one.gradients).every(({ norm, difference }) => norm > 0 && difference === 0)).toBe(true)
  })

  it.each(['packed', 'left', 'right'] as const)('%s, on one rank', async (form) => {
    await sequenceWork(taskOf(form, { ranks: 1, form, model: {} }, { gradients: place('own gradients') }))
    expectSame(read(form), read('one rank false'))
  })

  it.each(Object.entries(layouts))('%s: %j', (name, { model }) => {
    expectSame(read(name), read(`one rank ${isTied(model)}`))
  })

  it.each(Object.keys(layouts))('%s: as many tensors after each step', (name) => {
    expect(new Set(read(name).live.slice(2)).size).toBe(1)
  })
})

it('other batches on one rank of a copy of the model are told on all ranks before anything waits', () => {
  const { refusals } = read('pp 4')
  const told = [
    /got 3 on rank 0 and 2 on rank 3/,
    /got seqLength of micro-batch 0 with 36 on rank 0 and 1 on rank 3/,
    /got tokens of micro-batch 0 with other values on rank 3/,
    /got packed of micro-batch 0 with true on rank 0 and false on rank 3/,
  ]
  expect(refusals).toHaveLength(disagree.length)
  refusals.forEach((said, i) => {
    expect(new Set(said).size).toBe(1)
    expect(said[0]).toMatch(/^ERR_DATA /)
    expect(said[0]).toMatch(told[i] as RegExp)
  })
})
