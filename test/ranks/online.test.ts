// Loading and exporting online over real processes: ranks of a host read each byte once between them, buckets change nothing but the
// number of collectives, casts come before the wire with the same bits, and whatever fails on one rank fails on all.
import { createHash } from 'node:crypto'
import { cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { describe, expect, it } from 'vitest'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import type { ConversionTask } from '../../lib/bridge/online/conversionTasks.js'
import { type IndexedTensor, openCheckpoint, type Piece } from '../../lib/checkpoint/checkpointIndex.js'
import { tensorBytes } from '../../lib/io/safetensorsHeader.js'
import { openWeights } from '../../lib/io/weightFolder.js'
import { llamaTensors, randomBytes, writeLlama } from '../hostile/llamaFolder.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { runRanks } from './startRanks.js'

const home = temporaryFolder()
const sizes = {
  heads: 8,
  kvHeads: 2,
  hidden: 48,
  headDim: 4,
  vocab: 131,
  dtype: 'float32' as const,
  attentionBias: true,
}

/** Finite floats of many magnitudes, halfway cases of bfloat16 among them. */
function weights(count: number, seed: number): Float32Array {
  const bits = new Uint32Array(new Uint8Array(randomBytes(4 * count, seed)).buffer)
  for (let i = 0; i < count; i++) {
    const word = bits[i] as number
    const exponent = 100 + ((word >>> 23) & 31)
    bits[i] = ((word & 0x807fffff) | (exponent << 23)) >>> 0
    if (i % 3 === 0) bits[i] = (((bits[i] as number) & 0xffff0000) | 0x8000) >>> 0
  }
  return new Float32Array(bits.buffer)
}

/** Round to nearest, ties to even. */
function bfloat16(bytes: Uint8Array): Uint8Array {
  const words = new Uint32Array(bytes.slice().buffer)
  return new Uint8Array(Uint16Array.from(words, (w) => (w + 0x7fff + ((w >>> 16) & 1)) >>> 16).buffer)
}

/** Flips the last byte of a tensor of a checkpoint. */
async function spoil(dir: string, name: string): Promise<void> {
  const checkpoint = await openCheckpoint(dir)
  const tensor = checkpoint.tensors.get(name) as IndexedTensor
  const piece = tensor.pieces.at(-1) as Piece
  const { path, offset } = checkpoint.locate(piece, tensor)
  const bytes = readFileSync(path)
  const last = offset + tensorBytes(tensor.dtype, piece.size) - 1
  bytes[last] = (bytes[last] as number) ^ 1
  writeFileSync(path, bytes)
}

interface Exported {
  readonly tensors: [string, string | null][]
  readonly operations: number
  readonly bytes: number
}

interface Seen {
  readonly read: Record<'hf' | 'uncut' | 'checkpoint' | 'unchecked', number>
  readonly tasks: ConversionTask[]
  readonly exports: Record<'whole' | 'single' | 'some' | 'cast' | 'toOne', Exported>
  readonly joined: Exported
  readonly unsound: string
  readonly reloaded: Exported
  readonly [key: string]: unknown
}

describe.each([
  [2, 2],
  [4, 4],
  [4, 2],
])('%i ranks, tp %i', (size, tp) => {
  it('reads once a host, gathers in buckets, and fails together', async () => {
    const bytes = Object.fromEntries(
      llamaTensors(sizes).map(({ name, shape }, i) => {
        const values = weights(
          shape.reduce((a, b) => a * b, 1),
          i + 1,
        )
        return [name, new Uint8Array(values.buffer)]
      }),
    )
    const folder = writeLlama(join(home, `hf${size}${tp}`), { ...sizes, bytes })
    const spoilt = join(home, `spoilt${size}${tp}`)
    cpSync(folder, spoilt, { recursive: true })
    const whole = join(home, `whole${size}${tp}`)
    await AutoBridge.importCkpt(folder, whole)
    const damaged = join(home, `damaged${size}${tp}`)
    cpSync(whole, damaged, { recursive: true })
    await spoil(damaged, 'embedding.word_embeddings.weight')
    const out = join(home, `out${size}${tp}`)
    mkdirSync(out)
    const args = [folder, spoilt, whole, damaged, out, `${tp}`]
    await runRanks(size, resolve(import.meta.dirname, 'onlineRank.ts'), args)
    const ranks = Array.from(
      { length: size },
      (_, rank) => JSON.parse(readFileSync(join(out, `rank${rank}.json`), 'utf8')) as Seen,
    )

    const expected = new Map<string, Record<'float32' | 'bfloat16', string>>()
    let total = 0
    for (const [name, { path, offset, entry }] of (await openWeights(folder)).tensors) {
      const data = new Uint8Array(readFileSync(path).subarray(offset, offset + entry.end - entry.begin))
      total += data.length
      const digest = (dtype: string, of: Uint8Array) =>
        `${dtype} [${entry.shape}] ${createHash('sha256').update(of).digest('hex')}`
      expected.set(name, { float32: digest('float32', data), bfloat16: digest('bfloat16', bfloat16(data)) })
    }
    const readOf = (what: keyof Seen['read']) => ranks.reduce((sum, { read }) => sum + read[what], 0) / total
    for (const what of ['hf', 'checkpoint', 'unchecked'] as const) {
      expect(readOf(what)).toBeGreaterThanOrEqual(1)
      expect(readOf(what)).toBeLessThanOrEqual(1.02)
    }

    // Pieces that several ranks want parts of: one of them reads all of a piece to check it.
    expect(readOf('uncut')).toBeGreaterThan(1)
    expect(readOf('uncut')).toBeLessThanOrEqual(1 + (tp - 1) / tp)
    const faults = ranks.map(({ unsound }) => unsound)
    expect(faults.filter((code) => code === 'ERR_CHECKPOINT_HASH').length).toBe(1)
    expect(faults.filter((code) => code === 'ERR_RANK_FAILED').length).toBe(size - 1)

    const [first] = ranks as [Seen]
    const order = first.tasks.map(({ name }) => name)
    expect([...order].sort()).toEqual([...expected.keys()].sort())
    const gathered = first.tasks.filter(({ axes }) => axes.length > 0)
    for (const [rank, seen] of ranks.entries()) {
      expect(seen.tasks).toEqual(first.tasks)
      const { whole: all, single, some, cast, toOne } = seen.exports
      for (const { tensors } of [all, single, some, seen.joined, seen.reloaded])
        expect(tensors).toEqual(order.map((name) => [name, expected.get(name)?.float32]))
      expect(cast.tensors).toEqual(order.map((name) => [name, expected.get(name)?.bfloat16]))
      expect(toOne.tensors).toEqual(order.map((name) => [name, rank === 1 ? expected.get(name)?.float32 : null]))
      expect(single.operations).toBe(gathered.length)
      expect(all.operations).toBe(1)
      expect(some.operations).toBeGreaterThan(1)
      expect(some.operations).toBeLessThan(gathered.length)
      expect(cast.bytes).toBe(all.bytes / 2)
      // Ranks outside of the group of the one that wants tensors move nothing; a sender moves its part.
      if (Math.floor(rank / tp) !== 0) expect(toOne.bytes).toBe(0)
      else if (rank !== 1) expect(toOne.bytes).toBeLessThanOrEqual(all.bytes)
      expect(seen).toMatchObject({
        left: rank === 1 ? 'none' : 'ERR_ABORTED',
        seen: 4,
        unlike: 'ERR_USAGE',
        failed: rank === 1 ? 'ERR_IO' : 'ERR_RANK_FAILED',
        again: 'none',
      })
      // A bucket, what this rank sent of it, and one tensor of it, in pages of the allocator.
      expect(seen['buckets']).toBeGreaterThan(1)
      expect(seen['buckets']).toBeLessThan(2.6)
    }
  })
})
