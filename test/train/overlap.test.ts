// Training with the collectives of tp beside the products (tpCommOverlap) over real processes: the same bits as behind them in every layout,
// no byte more on the wire, and a trace in which collectives and products run at once.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { OverlapResult, OverlapTask } from './overlapRank.js'
import { startScript } from './startRanks.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-overlap-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const full = process.env['VIADUCT_TEST_FULL'] === '1'

const tp2 = { tensorModelParallelSize: 2 }
const tp4 = { tensorModelParallelSize: 4 }
const sp2 = { ...tp2, sequenceParallel: true }
const sp4 = { ...tp4, sequenceParallel: true }
const pp2 = { pipelineModelParallelSize: 2 }
const tied = { shareEmbeddingsAndOutputWeights: true }
const recompute = { recomputeGranularity: 'full' } as const
const biases = { addQkvBias: true, addProjBias: true, addMlpBias: true }

type Row = readonly [name: string, ranks: number, task: OverlapTask]
const quick: Row[] = [
  ['tp 2', 2, { model: { ...tp2, ...biases } }],
  ['tp 2 with sp', 2, { model: { ...sp2, ...biases } }],
  ['tp 2 with sp, recompute, bfloat16', 2, { model: { ...sp2, ...recompute }, mixedPrecision: 'bf16_mixed' }],
  ['tp 4 with sp, fewer kv heads than ranks', 4, { model: sp4 }],
  ['tp 2 with sp, pp 2, zb-h1, tied', 4, { model: { ...sp2, ...pp2, ...tied, pipelineSchedule: 'zb-h1' } }],
  ['tp 2 with sp, dp 2, buckets', 4, { model: sp2, ddp: { bucketSize: 20_000 } }],
]
const more: Row[] = [
  ['tp 2, recompute', 2, { model: { ...tp2, ...recompute } }],
  ['tp 2, bfloat16', 2, { model: tp2, mixedPrecision: 'bf16_mixed' }],
  ['tp 4, bfloat16', 4, { model: { ...tp4, ...biases }, mixedPrecision: 'bf16_mixed' }],
  ['tp 4 with sp, bfloat16, recompute', 4, { model: { ...sp4, ...recompute }, mixedPrecision: 'bf16_mixed' }],
  ['tp 2, pp 2, 1f1b', 4, { model: { ...tp2, ...pp2 } }],
  ['tp 2 with sp, pp 2, recompute', 4, { model: { ...sp2, ...pp2, ...recompute } }],
  ['tp 2 with sp, dp 2, whole', 4, { model: sp2, ddp: { useDistributedOptimizer: false, overlapParamGather: false } }],
]
const rows = full ? [...quick, ...more] : quick

const found = new Map<string, OverlapResult>()
beforeAll(async () => {
  for (const ranks of [2, 4]) {
    const own = rows.filter(([, count]) => count === ranks)
    const path = join(folder, `${ranks}.json`)
    const started = startScript('overlapRank.ts', [JSON.stringify(own.map(([, , task]) => task)), path], ranks)
    const code = await started.end
    if (code !== 0) throw new Error(`${ranks} ranks ended with ${code}:\n${started.lines.join('\n')}`)
    const results = JSON.parse(readFileSync(path, 'utf8')) as OverlapResult[]
    for (const [i, [name]] of own.entries()) found.set(name, results[i] as OverlapResult)
  }
}, 240_000)

describe.each(rows)('%s', (name) => {
  const get = () => found.get(name) as OverlapResult

  it('has the losses, norms and parameters that it has without, to the bit, each time', () => {
    const { behind, beside, again } = get()
    const result = ({ losses, norms, parameters }: typeof behind) => ({ losses, norms, parameters })
    expect(new Set(behind.losses).size).toBe(3) // it trains
    expect(result(beside)).toEqual(result(behind))
    expect(result(again)).toEqual(result(behind))
  })

  it('hands as many bytes to each collective, and leaves as many tensors behind each step', () => {
    const { behind, beside } = get()
    expect(Object.values(behind.payload).some((bytes) => bytes > 0)).toBe(true)
    expect(beside.payload).toEqual(behind.payload)
    expect(new Set(beside.live.slice(1)).size).toBe(1)
  })

  it('runs its collectives beside products', () => {
    const { beside } = get()
    expect(beside.collectives).toBeGreaterThan(0)
    expect(beside.besideProducts).toBeGreaterThan(0)
  })
})
