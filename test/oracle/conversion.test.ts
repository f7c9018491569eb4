// Freshly drawn models of every family, in every layout of up to 8 ranks: imported and exported, not one byte differs, in no file.
// Then Transformers and safetensors load what was exported. The seed is printed; VIADUCT_ORACLE_SEED gives it again.
import { mkdirSync, readdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { openHfModel } from '../../lib/bridge/hfModel.js'
import { exportCkpt, importCkpt } from '../../lib/bridge/offline/convert.js'
import { layoutProblems } from '../../lib/models/layoutShards.js'
import type { TransformerConfig } from '../../lib/models/transformerConfig.js'
import { type ParallelConfig, parallelOf, smallestWorld } from '../../lib/parallel/config.js'
import { digestsOf, temporaryFolder } from '../hostile/temporary.js'
import { python, runPython } from './python.js'

const seed = Number(process.env['VIADUCT_ORACLE_SEED'] ?? Math.floor(Math.random() * 1e9))
const home = temporaryFolder()
const [made, exported, cut] = ['made', 'exported', 'cut'].map((name) => join(home, name)) as [string, string, string]
const families = ['llama', 'qwen3_moe', 'qwen2_moe', 'olmoe', 'mixtral']
const mostRanks = 8

interface Layout extends Partial<ParallelConfig> {
  readonly worldSize: number
}

/** Where 4 layers are on which stages: evenly, in chunks, unevenly, by hand. */
const stages: Partial<ParallelConfig>[] = [
  {},
  ...[2, 4].map((pp) => ({ pipelineModelParallelSize: pp })),
  { pipelineModelParallelSize: 2, virtualPipelineModelParallelSize: 2 },
  { pipelineModelParallelSize: 2, numLayersInFirstPipelineStage: 1 },
  { pipelineModelParallelSize: 3, numLayersInLastPipelineStage: 2, numLayersInFirstPipelineStage: 1 },
  { pipelineModelParallelSize: 2, pipelineModelParallelLayout: 'Ettt|tL' },
  { pipelineModelParallelSize: 8, pipelineModelParallelLayout: 'E||t|t|t|t||L' },
]

/** Every layout that fits a config, with every data-parallel size. */
function layoutsOf(config: TransformerConfig): Layout[] {
  const powers = [1, 2, 4, 8]
  return stages.flatMap((stage) =>
    powers.flatMap((tensorModelParallelSize) =>
      powers.flatMap((contextParallelSize) =>
        powers.flatMap((expertModelParallelSize) =>
          powers.flatMap((expertTensorParallelSize) => {
            const sizes = { tensorModelParallelSize, contextParallelSize, expertModelParallelSize }
            const parallel = parallelOf({ ...stage, ...sizes, expertTensorParallelSize })
            const least = smallestWorld(parallel)
            return Array.from({ length: Math.floor(mostRanks / least) }, (_, i) => least * (i + 1))
              .filter((worldSize) => layoutProblems(config, parallel, worldSize).length === 0)
              .map((worldSize) => ({ ...parallel, worldSize }))
          }),
        ),
      ),
    ),
  )
}

describe.skipIf(python === null)('conversion', () => {
  beforeAll(() => {
    process.stdout.write(`VIADUCT_ORACLE_SEED=${seed}\n`)
    for (const folder of [made, exported, cut]) mkdirSync(folder)
    process.stdout.write(runPython('conversion.py', 'draw', String(seed), made))
    expect(readdirSync(made).sort()).toEqual([...families].sort())
  })

  test.each(families)(
    '%s comes back byte for byte from every layout',
    async (family) => {
      const source = join(made, family)
      const layouts = layoutsOf((await openHfModel(source)).config)
      const expected = digestsOf(source)
      const cutFrom = seed % layouts.length
      for (const [i, layout] of layouts.entries()) {
        const [ckpt, out] = [join(home, 'ckpt'), i === cutFrom ? join(exported, family) : join(home, 'out')]
        await importCkpt(source, ckpt, layout)
        await exportCkpt(ckpt, out)
        expect(digestsOf(out), JSON.stringify(layout)).toEqual(expected)
        if (i === cutFrom) await exportCkpt(ckpt, join(cut, family), { maxShardBytes: 30_000 })
        for (const folder of [ckpt, join(home, 'out')]) rmSync(folder, { recursive: true, force: true })
      }
      process.stdout.write(`${family}: ${layouts.length} layouts, 0 differing bytes\n`)
      // Layouts with experts are many more; a list that shrank would prove less.
      expect(layouts.length).toBeGreaterThan(family === 'llama' ? 40 : 100)
    },
    900_000,
  )

  test('is loaded by Transformers and safetensors, with the same tensors, index and logits', () => {
    expect(runPython('conversion.py', 'check', made, exported, cut)).toContain(`equal: ${families.join(', ')}`)
  })
})
