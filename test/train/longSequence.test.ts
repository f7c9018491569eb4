// A sequence of 32,768 tokens that four ranks share, forward and backward: memory as planned, which grows with the tokens of a rank and
// never with their square. One form here; VIADUCT_TEST_FULL=1 takes each, and the sequence on one rank.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, expect, test } from 'vitest'
import { resolve } from '../../lib/config/resolve.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import type { CpCommType } from '../../lib/parallel/config.js'
import { stageMemory } from '../../lib/plan/memory.js'
import { type MeasuredMemory, type MemoryTask, memoryConfig } from './memoryRank.js'
import { startScript } from './startRanks.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-long-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const tokens = 32_768
const taskOf = (seqLength: number, model: Partial<ProviderInit>): MemoryTask => ({
  model: {
    numLayers: 1,
    hiddenSize: 32,
    ffnHiddenSize: 64,
    numAttentionHeads: 4,
    numQueryGroups: 4,
    vocabSize: 128,
    maxPositionEmbeddings: seqLength,
    seqLength,
    ...model,
  },
  globalBatchSize: 1,
  microBatchSize: 1,
  steps: 2,
})

async function measure(ranks: number, tasks: readonly MemoryTask[]): Promise<MeasuredMemory[][]> {
  const path = join(folder, `${ranks}.json`)
  const started = startScript('memoryRank.ts', [JSON.stringify(tasks), path], ranks)
  const code = await started.end
  if (code !== 0) throw new Error(`${ranks} ranks ended with ${code}:\n${started.lines.join('\n')}`)
  return JSON.parse(readFileSync(path, 'utf8')) as MeasuredMemory[][]
}

const cp = (cpCommType: CpCommType) => ({ contextParallelSize: 4, cpCommType })
const forms: readonly Partial<ProviderInit>[] = [
  cp('p2p'),
  ...(process.env['VIADUCT_TEST_FULL'] === '1'
    ? [
        cp('all_gather'),
        cp('a2a'),
        { ...cp('a2a+p2p'), hierarchicalContextParallelSizes: [2, 2] },
        { contextParallelSize: 1 },
      ]
    : []),
]

test.each(forms)('%o', { timeout: 300_000 }, async (model) => {
  const ranks = model.contextParallelSize as number
  const tasks = [taskOf(tokens / 4, model), taskOf(tokens, model)]
  const [short, long] = (await measure(ranks, tasks)) as [MeasuredMemory[], MeasuredMemory[]]
  const planned = (task: MemoryTask) => stageMemory(resolve(memoryConfig(task), ranks), 0).activations
  for (const [i, { peaks, resting, resident }] of long.entries()) {
    const [activations, before] = [(peaks[0] as number) - resting, short[i] as MeasuredMemory]
    expect(Math.abs(planned(tasks[1] as MemoryTask) / activations - 1), `${activations}`).toBeLessThan(0.1)
    expect(activations / ((before.peaks[0] as number) - before.resting)).toBeLessThan(4.1)
    // Scores of one head would be 4 GiB.
    expect(resident).toBeLessThan(2 ** 29)
  }
})
