// What experts do that depends on what a micro-batch is, balance losses and capacities: with the same micro-batches over all ranks, or on
// each, a layout trains as one rank does, and tells the same losses. What does not is drawn in drawnLayouts.test.ts.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { ProviderInit } from '../../lib/models/provider.js'
import { type PipelineTask, pipelineWork } from './pipelineRank.js'
import { expectSame } from './sameSteps.js'
import { startScript, steps } from './startRanks.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-balance-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

type Balance = ProviderInit['moeRouterLoadBalancingType']
const experts = (type: Balance): Partial<ProviderInit> => ({
  numMoeExperts: 4,
  moeRouterTopk: 2,
  moeFfnHiddenSize: 48,
  moeRouterLoadBalancingType: type as NonNullable<Balance>,
  // Of several, each its own.
  moeAuxLossCoeff: Array.isArray(type) ? type.map((_, i) => 0.05 + 0.02 * i) : 0.05,
})
const together = ['aux_loss', 'seq_aux_loss', 'global_aux_loss'] as const
/** Experts take less than their share of a rank's tokens. */
const capped = (moeTokenDropPolicy: 'probs' | 'position') => ({ moeExpertCapacityFactor: 0.75, moeTokenDropPolicy })
const filled = { moePadExpertInputToCapacity: true }
const sp2 = { tensorModelParallelSize: 2, sequenceParallel: true }
const pp2 = { pipelineModelParallelSize: 2 }
const again = { recomputeGranularity: 'full', recomputeMethod: 'uniform', recomputeNumLayers: 1 } as const

/** Layouts of 4 ranks, and sequences of a micro-batch on each; the global batch has 8. */
const layouts: readonly (readonly [
  name: string,
  type: Balance,
  model: Partial<ProviderInit>,
  microBatchSize: number,
])[] = [
  ['tp 2 with sp, cp 2', 'aux_loss', { ...sp2, contextParallelSize: 2 }, 4],
  ['pp 2, cp 2, again', 'aux_loss', { ...again, pipelineModelParallelSize: 2, contextParallelSize: 2 }, 4],
  ['dp 4, ep 2', 'global_aux_loss', { expertModelParallelSize: 2 }, 1],
  ['tp 2 with sp, cp 2', together, { ...sp2, contextParallelSize: 2 }, 4],
  ['pp 2, cp 2, again', together, { ...again, ...pp2, contextParallelSize: 2 }, 4],
  ['tp 2 with sp, dp 2, again', 'global_aux_loss', { ...sp2, ...again }, 2],
  [
    'dp 4, ep 2, etp 2, capped',
    'none',
    { ...capped('probs'), expertModelParallelSize: 2, expertTensorParallelSize: 2 },
    2,
  ],
  ['dp 2, pp 2, ep 2, capped, again', 'none', { ...capped('probs'), ...again, ...pp2, expertModelParallelSize: 2 }, 2],
  [
    'dp 4, ep 4, gathered, capped',
    'none',
    { ...capped('probs'), expertModelParallelSize: 4, moeTokenDispatcherType: 'allgather' },
    2,
  ],
  [
    'dp 4, ep 2, etp 2, filled up',
    'none',
    { ...capped('probs'), ...filled, expertModelParallelSize: 2, expertTensorParallelSize: 2 },
    2,
  ],
  ['dp 2, pp 2, the first ones, filled up, again', 'none', { ...capped('position'), ...filled, ...again, ...pp2 }, 2],
  ['dp 4, ep 2, the first ones', 'none', { ...capped('position'), expertModelParallelSize: 2 }, 2],
  ['cp 2, pp 2', 'global_aux_loss', { contextParallelSize: 2, pipelineModelParallelSize: 2 }, 4],
]
const metricsOf = (name: string) => join(folder, `${name}.jsonl`)
const task = (name: string, type: Balance, model: Partial<ProviderInit>, microBatchSize: number): PipelineTask => ({
  trainIters: 8,
  metrics: metricsOf(name),
  model: { ...experts(type), ...model },
  microBatchSize,
})

beforeAll(async () => {
  for (const type of ['aux_loss', 'global_aux_loss', together] as const)
    await pipelineWork(task(`${type}`, type, {}, 4))
  await pipelineWork(task('whole', 'none', {}, 2))
  for (const policy of ['probs', 'position'] as const) await pipelineWork(task(policy, 'none', capped(policy), 2))
  const tasks = layouts.map(([name, type, model, size]) => task(`${type} ${name}`, type, model, size))
  const started = startScript('pipelineRank.ts', [JSON.stringify(tasks)], 4)
  if ((await started.end) !== 0) throw new Error(started.lines.join('\n'))
}, 120_000)

describe('as on one rank', () => {
  it.each(layouts)('%s, %s', (name, type, { moeTokenDropPolicy }) => {
    const own = steps(metricsOf(`${type} ${name}`))
    expect(own.length).toBe(8)
    expectSame(own, steps(metricsOf(moeTokenDropPolicy ?? `${type}`)))
  })
})

it('ranks that share experts are told of other micro-batches before anything waits', async () => {
  const gathered = { expertModelParallelSize: 2, moeTokenDispatcherType: 'allgather' } as const
  const tasks = [
    { model: { ...experts('none'), expertModelParallelSize: 2 }, shorter: false },
    { model: { ...experts('global_aux_loss') }, shorter: false },
    { model: { ...experts('none'), ...gathered }, shorter: true },
    { model: { ...experts('none'), ...capped('probs'), ...filled, expertModelParallelSize: 2 }, shorter: true },
    // Rows that are sent may be any number.
    { model: { ...experts('none'), expertModelParallelSize: 2 }, shorter: true },
  ]
  const path = join(folder, 'told.json')
  const started = startScript('microBatchesRank.ts', [JSON.stringify(tasks), path], 2)
  expect(await started.end, started.lines.join('\n')).toBe(0)
  const found = JSON.parse(readFileSync(path, 'utf8')) as string[][]
  const expected = [
    /^ERR_DATA .*as many micro-batches on each of 2 ranks, for experts that ranks share, got 4, 3:/,
    /^ERR_DATA .*for moeRouterLoadBalancingType=global_aux_loss, got 4, 3:/,
    /^ERR_DATA .*of the same sizes .* got \[\[1,32\],.*\], \[\[1,31\],.*\]:/,
    /^ERR_DATA .*of the same sizes .* got \[\[1,32\],.*\], \[\[1,31\],.*\]:/,
    /^done$/,
  ]
  for (const [i, said] of found.entries()) for (const one of said) expect(one).toMatch(expected[i] as RegExp)
  expect(found).toHaveLength(expected.length)
}, 120_000)

it('what is dropped is missed', () => {
  const last = ['probs', 'position', 'whole'].map((name) => steps(metricsOf(name)).at(-1)?.loss)
  expect(new Set(last).size).toBe(3)
})

it('the mean over micro-batches is not that of each', () => {
  const [each, all] = ['aux_loss', 'global_aux_loss'].map((type) => steps(metricsOf(type)).at(-1)) as [Step, Step]
  expect(each.loss).not.toBe(all.loss)
})
type Step = ReturnType<typeof steps>[number]
