// Every stage of a pipeline, and every rank of tp, knows where sequences begin and end: packed and padded batches, of other lengths and
// other numbers of rows in each micro-batch, have the losses and gradients of the same sequences alone on one rank, dropout on. A few
// layouts here; VIADUCT_TEST_FULL=1 takes each form in each.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { ProviderInit } from '../../lib/models/provider.js'
import type { CpCommType } from '../../lib/parallel/config.js'
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
const cp = (size: number, form: CpCommType = 'p2p') => ({ contextParallelSize: size, cpCommType: form })
const experts = { numMoeExperts: 4, moeRouterTopk: 2, moeFfnHiddenSize: 48 }
const cpBoth = { ...cp(4, 'a2a+p2p'), hierarchicalContextParallelSizes: [2, 2] }

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
  'pp 2, cp 2': { ranks: 4, form: 'packed', model: { ...stages(2), ...cp(2) } },
  'cp 2, tp 2 with sp': { ranks: 4, form: 'packed', model: { ...cp(2, 'all_gather'), ...sp(2) } },
  'cp 2 by heads, pp 2': { ranks: 4, form: 'packed', model: { ...cp(2, 'a2a'), ...stages(2) } },
  'cp 4 by heads and ring': { ranks: 4, form: 'packed', model: cpBoth },
}
const wide: Record<string, Omit<Layout, 'form'>> = {
  'pp 2': { ranks: 2, model: stages(2) },
  'pp 2, gpipe, tied': { ranks: 2, model: { ...stages(2), ...tied, pipelineSchedule: 'gpipe' } },
  'pp 2, zb-h1': { ranks: 2, model: { ...stages(2), pipelineSchedule: 'zb-h1' } },
  'pp 2, vpp 2, groups of 3': { ranks: 2, model: { ...chunks, microbatchGroupSizePerVpStage: 3 } },
  'tp 2': { ranks: 2, model: tp(2) },
  'tp 2 with sp': { ranks: 2, model: sp(2) },
  'dp 2': { ranks: 2, model: {} },
  'cp 2': { ranks: 2, model: cp(2) },
  'pp 3 by layout': { ranks: 3, model: { ...stages(3), pipelineModelParallelLayout: 'Et|tt|t|||L' } },
  'pp 4, zb-h1, tied': { ranks: 4, model: { ...stages(4), ...tied, pipelineSchedule: 'zb-h1' } },
  'pp 4, gpipe': { ranks: 4, model: { ...stages(4), pipelineSchedule: 'gpipe' } },
  'tp 4 with sp': { ranks: 4, model: sp(4) },
  'pp 2, tp 2': { ranks: 4, model: { ...stages(2), ...tp(2) } },
  'pp 2, vpp 2, tp 2 with sp, tied': { ranks: 4, model: { ...chunks, ...sp(2), ...tied } },
  'pp 2, dp 2': { ranks: 4, model: stages(2) },
  'tp 2 with sp, dp 2': { ranks: 4, model: sp(2) },
  'dp 4': { ranks: 4, model: {} },
  'cp 4': { ranks: 4, model: cp(4) },
  'cp 4 gathered': { ranks: 4, model: cp(4, 'all_gather') },
  'cp 4 by heads and ring': { ranks: 4, model: cpBoth },
  'cp 2, dp 2': { ranks: 4, model: cp(2) },
  'cp 2, pp 2, zb-h1': { ranks: 4, model: { ...cp(2), ...stages(2), pipelineSchedule: 'zb-h1' } },
  'cp 2 by heads, pp 2, vpp 2, tied': { ranks: 4, model: { ...cp(2, 'a2a'), ...chunks, ...tied } },
  'cp 4, pp 2': { ranks: 8, model: { ...cp(4), ...stages(2) } },
  'cp 4 by heads and ring, pp 2': { ranks: 8, model: { ...cpBoth, ...stages(2) } },
  'cp 2, tp 2 with sp, pp 2': { ranks: 8, model: { ...cp(2), ...sp(2), ...stages(2) } },
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

/** In bfloat16, the form as it is on one rank. Stages change no sum; other axes round their parts of sums to bfloat16. */
const half: Record<string, Layout & Pick<SequenceTask, 'mixedPrecision'>> = {
  'pp 4, zb-h1': {
    ranks: 4,
    form: 'packed',
    model: { ...stages(4), pipelineSchedule: 'zb-h1' },
    mixedPrecision: 'bf16_mixed',
  },
  'pp 2, tp 2 with sp': {
    ranks: 4,
    form: 'packed',
    model: { ...stages(2), ...sp(2), paramsDtype: 'bfloat16' },
    mixedPrecision: null,
  },
  'cp 2': { ranks: 2, form: 'packed', model: cp(2), mixedPrecision: 'bf16_mixed' },
  'experts, tp 2 with sp, cp 2, ep 2, etp 2': {
    ranks: 4,
    form: 'packed',
    model: { ...experts, ...sp(2), ...cp(2), expertModelParallelSize: 2, expertTensorParallelSize: 2 },
    mixedPrecision: 'bf16_mixed',
  },
  ...(full && {
    'cp 4 by heads and ring': { ranks: 4, form: 'packed', model: cpBoth, mixedPrecision: 'bf16_mixed' },
    'cp 2, gathered, tp 2 with sp': {
      ranks: 4,
      form: 'packed',
      model: { ...cp(2, 'all_gather'), ...sp(2) },
      mixedPrecision: 'bf16_mixed',
    },
    'experts, cp 2, ep 2': {
      ranks: 2,
      form: 'packed',
      model: { ...experts, ...cp(2, 'a2a'), expertModelParallelSize: 2 },
      mixedPrecision: 'bf16_mixed',
    },
    'experts, tp 2 with sp, etp 2, pp 2': {
      ranks: 4,
      form: 'packed',
      model: { ...experts, ...sp(2), ...stages(2), expertTensorParallelSize: 2 },
      mixedPrecision: 'bf16_mixed',
    },
    'pp 2': { ranks: 2, form: 'packed', model: stages(2), mixedPrecision: 'bf16_mixed' },
    'pp 2, vpp 2, recompute': {
      ranks: 2,
      form: 'packed',
      model: { ...chunks, recomputeGranularity: 'full', paramsDtype: 'bfloat16' },
      mixedPrecision: null,
    },
    'tp 2': { ranks: 2, form: 'packed', model: tp(2), mixedPrecision: 'bf16_mixed' },
    'tp 2 with sp': { ranks: 2, form: 'packed', model: sp(2), mixedPrecision: 'bf16_mixed' },
    'tp 4 with sp': { ranks: 4, form: 'packed', model: sp(4), mixedPrecision: 'bf16_mixed' },
    'tp 2 with sp, pp 2, dp 2': {
      ranks: 8,
      form: 'packed',
      model: { ...stages(2), ...sp(2) },
      mixedPrecision: 'bf16_mixed',
    },
  }),
}
const hasExperts = (model: Partial<ProviderInit>) => (model.numMoeExperts ?? 0) > 0
/** Whether some sum is cut over ranks, or its parts are summed in another order. */
const cutsSums = ({ model }: Layout) =>
  (model.tensorModelParallelSize ?? 1) * (model.contextParallelSize ?? 1) > 1 || hasExperts(model)
const packed = (model: Partial<ProviderInit>) => `packed${hasExperts(model) ? ' experts' : ''}`

const trainIters = full ? 10 : 6
const isTied = (model: Partial<ProviderInit>) => model.shareEmbeddingsAndOutputWeights === true
const gradients = (of: string) => place(`gradients of ${of}`)
const oneRank = (model: Partial<ProviderInit>) => `one rank${isTied(model) ? ', tied' : ''}`
const read = (name: string) => JSON.parse(readFileSync(place(name), 'utf8')) as WrittenSteps

/** What is written under `name`, its gradients compared with those of `reference`. */
function taskOf(name: string, layout: Layout, reference: string, more: Partial<SequenceTask> = {}): SequenceTask {
  const { form, model } = layout
  return { form, model, trainIters, gradients: gradients(reference), written: place(name), ...more }
}

const disagree = ['count', 'length', 'tokens', 'packed'] as const

beforeAll(async () => {
  const alone = (name: string, layout: Omit<Layout, 'ranks'>, reference: string, more: Partial<SequenceTask> = {}) =>
    sequenceWork(taskOf(name, { ...layout, ranks: 1 }, reference, { writes: gradients(name), ...more }))
  for (const model of [{}, tied]) await alone(oneRank(model), { form: 'alone', model }, oneRank(model))
  await alone('packed', { form: 'packed', model: {} }, oneRank({}))
  await alone(packed(experts), { form: 'packed', model: experts }, packed(experts))
  for (const model of [{}, experts])
    await alone(`${packed(model)}, bf16`, { form: 'packed', model }, packed(model), { mixedPrecision: 'bf16_mixed' })
  const tasks = [
    ...Object.entries(layouts).map(([name, layout]) => {
      const more = name === 'pp 4' ? { disagree } : {}
      return [layout.ranks, taskOf(name, layout, oneRank(layout.model), more)] as const
    }),
    ...Object.entries(half).map(([name, { mixedPrecision = null, ...layout }]) => {
      const reference = cutsSums(layout) ? packed(layout.model) : 'packed, bf16'
      return [layout.ranks, taskOf(`${name}, bf16`, layout, reference, { mixedPrecision })] as const
    }),
  ]
  for (const size of new Set(tasks.map(([ranks]) => ranks))) {
    const ofSize = tasks.flatMap(([ranks, task]) => (ranks === size ? [task] : []))
    const started = startScript('sequencesRank.ts', [JSON.stringify(ofSize)], size)
    const code = await started.end
    if (code !== 0) throw new Error(`${size} ranks ended with ${code}:\n${started.lines.join('\n')}`)
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
    const one = read('one rank')
    expect(new Set(one.tokens).size).toBeGreaterThan(1)
    expect(Object.values(one.gradients).every(({ norm, difference }) => norm > 0 && difference === 0)).toBe(true)
  })

  it('packed, on one rank', () => expectSame(read('packed'), read('one rank')))

  it.each(['left', 'right'] as const)('padded on the %s, on one rank', async (form) => {
    await sequenceWork(taskOf(form, { ranks: 1, form, model: {} }, 'one rank'))
    expectSame(read(form), read('one rank'))
  })

  it.each(Object.entries(layouts))('%s: %j', (name, { model }) => {
    expectSame(read(name), read(oneRank(model)))
  })

  it.each(Object.keys(layouts))('%s: as many tensors after each step', (name) => {
    expect(new Set(read(name).live.slice(2)).size).toBe(1)
  })
})

/** What losses differ by, over theirs. */
const distances = (a: WrittenSteps, b: WrittenSteps) =>
  a.losses.map((loss, i) => Math.abs(loss / (b.losses[i] as number) - 1))
const error = ({ gradients: of }: WrittenSteps) => Math.hypot(...Object.values(of).map(({ difference }) => difference))

describe('bfloat16', () => {
  it('on one rank is not float32 under another name', () => {
    expect(Math.min(...distances(read('packed, bf16'), read('packed')))).toBeGreaterThan(0)
    expect(error(read('packed, bf16'))).toBeGreaterThan(0)
  })

  const entries = Object.entries(half)
  it.each(entries.filter(([, layout]) => !cutsSums(layout)))('%s: the bits of one rank', (name) => {
    const [got, one] = [read(`${name}, bf16`), read('packed, bf16')]
    expect(got.losses).toEqual(one.losses)
    expect(got.validation).toBe(one.validation)
    expect(error(got)).toBe(0)
    // A sum of squares over the stages in float64.
    for (const [i, norm] of got.gradNorms.entries())
      expect(Math.abs(norm / (one.gradNorms[i] as number) - 1)).toBeLessThan(1e-14)
  })

  // The design's bound for two honest bfloat16 computations: the mean error against float32 is at most 1.25 times the other's. Gradients
  // have enough elements for a mean; losses are a few numbers, which stay in the range of one rank's own rounding.
  it.each(entries.filter(([, layout]) => cutsSums(layout)))('%s: as near to float32 as one rank', (name, { model }) => {
    const [got, one, exact] = [read(`${name}, bf16`), read(`${packed(model)}, bf16`), read(packed(model))]
    expect(got.tokens).toEqual(one.tokens)
    expect(error(got) / error(one)).toBeLessThan(1.25)
    const noise = Math.max(...distances(one, exact))
    for (const distance of distances(got, exact)) expect(distance).toBeLessThan(2 * noise)
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
