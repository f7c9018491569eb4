// The bridge over real processes: every rank reads and writes its own bytes, and the folder comes back byte for byte, also with
// more ranks than key-value heads and with data-parallel copies.
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join, resolve } from 'node:path'
import { describe, expect, it } from 'vitest'
import { openWeights } from '../../lib/io/weightFolder.js'
import { writeLlama } from '../hostile/llamaFolder.js'
import { digestsOf, temporaryFolder } from '../hostile/temporary.js'

const home = temporaryFolder()

function freePort(): Promise<number> {
  return new Promise((done) => {
    const server = createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address() as { port: number }
      server.close(() => done(port))
    })
  })
}

async function runRanks(size: number, args: readonly string[]): Promise<void> {
  const port = await freePort()
  const ranks = Array.from({ length: size }, (_, rank) => {
    const env = {
      ...process.env,
      RANK: `${rank}`,
      LOCAL_RANK: `${rank}`,
      WORLD_SIZE: `${size}`,
      LOCAL_WORLD_SIZE: `${size}`,
      MASTER_ADDR: '127.0.0.1',
      MASTER_PORT: `${port}`,
      OMP_NUM_THREADS: '1',
    }
    const child = spawn(process.execPath, ['--import', 'tsx', resolve(import.meta.dirname, 'bridgeRank.ts'), ...args], {
      env,
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    let said = ''
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => (said += String(chunk)))
    return new Promise<void>((done, fail) => {
      child.on('close', (code) => (code === 0 ? done() : fail(new Error(`rank ${rank} left with ${code}: ${said}`))))
    })
  })
  await Promise.all(ranks)
}

describe.each([
  [2, 2, { shards: 3, attentionBias: true, mlpBias: true }],
  [2, 1, { tied: true, dtype: 'float32' as const }],
  [4, 4, { heads: 8, kvHeads: 2, hidden: 48, headDim: 4, vocab: 130 }],
])('%i ranks, tp %i', (size, tp, options) => {
  it('gives the folder back in every way', async () => {
    const folder = writeLlama(join(home, `hf${size}${tp}`), options)
    const out = join(home, `out${size}${tp}`)
    mkdirSync(out)
    await runRanks(size, [folder, out, `${tp}`])
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
