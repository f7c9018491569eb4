// Toys in Transformers: they load without a missing or unexpected tensor, and their layers compute what those of the whole model do.
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { makeToy } from '../../lib/bridge/toy.js'
import { llamaFixtures } from '../fixtures/safetensorsFile.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { python, runPython } from './python.js'

const home = temporaryFolder()

test.skipIf(python === null)('Transformers loads toys of every family', async () => {
  const moe = join(import.meta.dirname, '../fixtures/moe')
  const sources = [
    join(llamaFixtures, 'plain'),
    ...['qwen3_moe', 'olmoe', 'mixtral', 'mixtral_fused'].map((name) => join(moe, name)),
  ]
  const pairs: string[] = []
  for (const [i, source] of sources.entries()) {
    const toy = join(home, String(i))
    await makeToy(source, toy, { layers: source.includes('moe/') ? 2 : 1 })
    pairs.push(source, toy)
  }
  expect(runPython('toy.py', ...pairs).match(/^same: /gm)).toHaveLength(sources.length)
})
