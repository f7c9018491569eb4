// Each rank of a layout reads the bytes that it owns, and hardly any others.
import { mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { dtypes } from '../../lib/base/dtype.js'
import { openCheckpoint } from '../../lib/checkpoint/checkpointIndex.js'
import { volume } from '../../lib/tensor/region.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { runRanks } from './startRanks.js'

const home = temporaryFolder()
const folder = join(import.meta.dirname, '../fixtures/moe/qwen3_moe')

it.each([
  [
    'tp 2, pp 2, ep 2',
    {
      tensorModelParallelSize: 2,
      pipelineModelParallelSize: 2,
      expertModelParallelSize: 2,
      pipelineModelParallelLayout: 'Ett|tL',
    },
  ],
  [
    'tp 2, cp 2, pp 2, vpp 2, etp 2',
    {
      tensorModelParallelSize: 2,
      contextParallelSize: 2,
      pipelineModelParallelSize: 2,
      virtualPipelineModelParallelSize: 2,
      expertTensorParallelSize: 2,
      pipelineModelParallelLayout: 'E|t|t|tL',
    },
  ],
])('%s: at most 1.02 times what it owns', async (name, layout) => {
  const out = join(home, name.replaceAll(/\W+/g, '-'))
  mkdirSync(out)
  await runRanks(8, join(import.meta.dirname, 'importRank.ts'), [folder, out, JSON.stringify(layout)])
  const { tensors } = await openCheckpoint(join(out, 'ckpt'))
  const owned = new Map<string, number>()
  for (const { dtype, pieces } of tensors.values())
    for (const { file, size } of pieces)
      owned.set(file, (owned.get(file) ?? 0) + (volume(size) * dtypes[dtype].bits) / 8)
  expect(owned.size).toBe(8)
  for (const file of readdirSync(join(out, 'ckpt', 'iter_0000000')).filter((n) => n.endsWith('.safetensors'))) {
    const rank = Number(file.slice(6, 11))
    const { read } = JSON.parse(readFileSync(join(out, `rank${rank}.json`), 'utf8'))
    expect(read, file).toBeGreaterThanOrEqual(owned.get(file) as number)
    expect(read, file).toBeLessThanOrEqual(1.02 * (owned.get(file) as number))
  }
})
