// The bridge over real processes: every rank reads and writes its own bytes, and the folder comes back byte for byte, also with
// more ranks than key-value heads, with data-parallel copies and over pipeline stages.
import { createHash } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { describe, expect, it } from 'vitest'
import { openWeights } from '../../lib/io/weightFolder.js'
import { writeLlama } from '../hostile/llamaFolder.js'
import { digestsOf, temporaryFolder } from '../hostile/temporary.js'
import { runRanks } from './startRanks.js'

const home = temporaryFolder()

describe.each([
  [2, 2, 1, { shards: 3, attentionBias: true, mlpBias: true }],
  [2, 1, 1, { tied: true, dtype: 'float32' as const }],
  [4, 4, 1, { heads: 8, kvHeads: 2, hidden: 48, headDim: 4, vocab: 130 }],
  [4, 2, 2, { tied: true, attentionBias: true }],
])('%i ranks, tp %i, pp %i', (size, tp, pp, options) => {
  it('gives the folder back in every way', async () => {
    const folder = writeLlama(join(home, `hf${size}${tp}${pp}`), options)
    const out = join(home, `out${size}${tp}${pp}`)
    mkdirSync(out)
    await runRanks(size, resolve(import.meta.dirname, 'bridgeRank.ts'), [folder, out, `${tp}`, `${pp}`])
    const expected = digestsOf(folder)
    for (const name of ['exported', 'saved', 'resaved']) expect(digestsOf(join(out, name))).toEqual(expected)
    expect(readFileSync(join(out, 'checkpoint', 'latest_checkpointed_iteration.txt'), 'utf8')).toBe('5\n')
    // Every rank wrote a part of the import.
    expect(readdirSync(join(out, 'imported', 'iter_0000000')).filter((f) => f.endsWith('.safetensors'))).toHaveLength(
      size,
    )

    const tensors: Record<string, string> = {}
    for (const [name, { path, offset, entry }] of (await openWeights(folder)).tensors) {
      const bytes = readFileSync(path).subarray(offset, offset + entry.end - entry.begin)
      tensors[name] = `${entry.dtype} [${entry.shape}] ${createHash('sha256').update(bytes).digest('hex')}`
    }
    for (let rank = 0; rank < size; rank++) {
      const seen = JSON.parse(readFileSync(join(out, `rank${rank}.json`), 'utf8')) as Record<string, unknown>
      expect(seen['tensors']).toEqual(tensors)
      expect((seen['some'] as string[]).filter((_, i) => i % 2 === 1)).toEqual(
        Array(4).fill(rank === 0 ? 'float32' : null),
      )
      expect(seen['early']).toBe(rank === size - 1 ? 'finished' : 'ERR_ABORTED')
      expect(seen).toMatchObject({ leaked: 0, left: 0 })
    }
  })
})
