// Checkpoints: any layout loads any, damage is found, and a saver that is killed leaves a complete checkpoint, old or new.
import { spawn } from 'node:child_process'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { openCheckpoint, resolveCheckpoint } from '../../../lib/checkpoint/checkpointIndex.js'
import { loadCheckpoint, readCheckpointFile } from '../../../lib/checkpoint/loadCheckpoint.js'
import type { Ranks } from '../../../lib/checkpoint/ranks.js'
import { saveCheckpoint } from '../../../lib/checkpoint/saveCheckpoint.js'
import { ioCounters } from '../../../lib/io/blocks.js'
import { Ctx } from '../../../lib/tensor/ctx.js'
import { replicated, rowRuns, type ShardSpec, splitDim } from '../../../lib/tensor/shardSpec.js'
import { Tensor } from '../../../lib/tensor/tensor.js'
import { errorOf, temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()
const ctx = Ctx.create({ device: 'cpu' })
let count = 0

/** Ranks in one process that meet at each gather. */
function teams(size: number): Ranks[] {
  let waiting: { value: unknown; done: (all: unknown[]) => void; rank: number }[] = []
  return Array.from({ length: size }, (_, rank) => ({
    rank,
    size,
    gather: <T>(value: T) =>
      new Promise<T[]>((done) => {
        waiting.push({
          value: JSON.parse(JSON.stringify({ value })).value,
          done: done as (all: unknown[]) => void,
          rank,
        })
        if (waiting.length < size) return
        const all = waiting
        waiting = []
        const values = all.sort((a, b) => a.rank - b.rank).map((w) => w.value)
        for (const w of all) w.done(values)
      }),
  }))
}

const logical = (rows: number, columns: number) => Float32Array.from({ length: rows * columns }, (_, i) => i)

/** The shard of a 2-D tensor whose element i has the value i. */
function shardTensor(spec: ShardSpec): Tensor {
  const [, columns] = spec.logicalShape as [number, number]
  const [rows, width] = spec.localShape as [number, number]
  const local = new Float32Array(rows * width)
  for (const { globalStart, localStart, size } of spec.blocks) {
    for (let r = 0; r < (size[0] as number); r++) {
      for (let c = 0; c < (size[1] as number); c++) {
        local[((localStart[0] as number) + r) * width + (localStart[1] as number) + c] =
          ((globalStart[0] as number) + r) * columns + (globalStart[1] as number) + c
      }
    }
  }
  return Tensor.fromHost(ctx, local, spec.localShape, 'float32')
}

async function save(dir: string, name: string, specs: readonly ShardSpec[]): Promise<void> {
  const ranks = teams(specs.length)
  const tensors = specs.map((shard) => ({ name, dtype: 'float32' as const, shard, data: shardTensor(shard) }))
  await ctx.stream.sync()
  await Promise.all(
    specs.map((_, r) => saveCheckpoint(dir, 3, [tensors[r] as (typeof tensors)[number]], { ranks: ranks[r] as Ranks })),
  )
}

describe('any layout loads any', () => {
  const layout = fc.record({
    kind: fc.constantFrom('rows', 'columns', 'halves', 'copies'),
    parts: fc.constantFrom(1, 2, 4),
  })
  const specsOf = ({ kind, parts }: { kind: string; parts: number }): ShardSpec[] =>
    Array.from({ length: parts }, (_, r) => {
      if (kind === 'rows') return splitDim([6, 8], 0, r, parts, 8)
      if (kind === 'columns') return splitDim([6, 8], 1, r, parts)
      if (kind === 'copies') return replicated([6, 8], { replica: r })
      const n = 6 / 2 / (parts === 4 ? 1 : parts)
      return Number.isInteger(n) && parts < 4
        ? rowRuns(
            [6, 8],
            [
              { start: r * n, count: n },
              { start: 3 + r * n, count: n },
            ],
          )
        : splitDim([6, 8], 1, r, parts)
    })
  it('random pairs of layouts', async () => {
    await fc.assert(
      fc.asyncProperty(layout, layout, async (from, to) => {
        const odd = (l: { kind: string; parts: number }) => l.kind === 'halves' && 3 % l.parts !== 0
        fc.pre(!odd(from) && !odd(to))
        const dir = join(home, `l${count++}`)
        await save(dir, 'w', specsOf(from))
        const files = readdirSync(join(dir, 'iter_0000003')).filter((f) => f.endsWith('.safetensors'))
        expect(files.length).toBeLessThanOrEqual(from.parts)
        for (const spec of specsOf(to)) {
          const tensor = Tensor.full(ctx, spec.localShape, 'float32', -1)
          await loadCheckpoint(dir, [{ name: 'w', tensor, shard: spec }])
          const wanted = shardTensor(spec)
          const [got, expected] = [await tensor.toFloat32Array(), await wanted.toFloat32Array()]
          // Padding keeps what was there: -1.
          const inside = new Set<number>()
          for (const b of spec.blocks) {
            for (let r = 0; r < (b.size[0] as number); r++)
              for (let c = 0; c < (b.size[1] as number); c++)
                inside.add(
                  ((b.localStart[0] as number) + r) * (spec.localShape[1] as number) + (b.localStart[1] as number) + c,
                )
          }
          got.forEach((value, i) => {
            expect(value).toBe(inside.has(i) ? expected[i] : -1)
          })
        }
      }),
      { numRuns: 20, seed: 5 },
    )
  })
  it('reads each piece once where it is wanted whole, and what is wanted where nothing is checked', async () => {
    const dir = join(home, `l${count++}`)
    await save(
      dir,
      'w',
      [0, 1].map((r) => splitDim([6, 8], 1, r, 2)),
    )
    const bytes = 6 * 8 * 4
    const readBy = async (shard: ShardSpec, verify?: boolean) => {
      const checkpoint = await openCheckpoint(dir)
      const tensor = Tensor.empty(ctx, shard.localShape, 'float32')
      const before = ioCounters().bytesRead
      await loadCheckpoint(checkpoint, [{ name: 'w', tensor, shard }], verify === undefined ? {} : { verify })
      expect(await tensor.toFloat32Array()).toEqual(await shardTensor(shard).toFloat32Array())
      return (ioCounters().bytesRead - before) / bytes
    }
    expect(await readBy(replicated([6, 8]))).toBe(1)
    expect(await readBy(splitDim([6, 8], 1, 1, 2))).toBe(0.5)
    expect(await readBy(splitDim([6, 8], 0, 1, 2))).toBe(1)
    expect(await readBy(splitDim([6, 8], 0, 1, 2), false)).toBe(0.5)
  })
  it('casts on load', async () => {
    const dir = join(home, `l${count++}`)
    await save(dir, 'w', [replicated([6, 8])])
    const tensor = Tensor.empty(ctx, [6, 8], 'bfloat16')
    await loadCheckpoint(dir, [{ name: 'w', tensor, shard: replicated([6, 8]) }])
    expect(await tensor.toFloat32Array()).toEqual(logical(6, 8)) // below 256: exact in bfloat16
  })
})

describe('damage', () => {
  it('a changed byte, a missing tensor, another shape', async () => {
    const dir = join(home, `l${count++}`)
    await save(dir, 'w', [replicated([6, 8])])
    const file = join(dir, 'iter_0000003', 'model-00000-of-00001.safetensors')
    const bytes = readFileSync(file)
    bytes[bytes.length - 1] = 1
    writeFileSync(file, bytes)
    const tensor = Tensor.empty(ctx, [6, 8], 'float32')
    const shard = replicated([6, 8])
    expect(await errorOf(() => loadCheckpoint(dir, [{ name: 'w', tensor, shard }]))).toMatchObject({
      code: 'ERR_CHECKPOINT_HASH',
      details: { tensor: 'w' },
    })
    // Also where the damage lies outside of what is wanted.
    const part = splitDim([6, 8], 0, 0, 2)
    const half = Tensor.empty(ctx, part.localShape, 'float32')
    expect(await errorOf(() => loadCheckpoint(dir, [{ name: 'w', tensor: half, shard: part }]))).toMatchObject({
      code: 'ERR_CHECKPOINT_HASH',
    })
    await loadCheckpoint(dir, [{ name: 'w', tensor: half, shard: part }], { verify: false })
    expect(await half.toFloat32Array()).toEqual(logical(3, 8))
    expect(await errorOf(() => loadCheckpoint(dir, [{ name: 'x', tensor, shard }]))).toMatchObject({
      code: 'ERR_CHECKPOINT',
      details: { problems: ['x is missing'] },
    })
    expect(
      (await errorOf(() => loadCheckpoint(dir, [{ name: 'w', tensor, shard: replicated([6, 9]) }]))).message,
    ).toContain('expected [6,9], got [6,8]')
  })
  it.each([
    ['version', (t: string) => t.replace('"version": 1', '"version": 2'), 'version'],
    ['a hole', (t: string) => t.replace('"size":[6,8]', '"size":[5,8]'), '40 of 48 elements'],
    ['a path', (t: string) => t.replaceAll('model-00000', '../model-00000'), ''],
    ['cut', (t: string) => t.slice(0, 200), ''],
    ['dtype', (t: string) => t.replace('"float32"', '"bfloat16"'), 'to hold w as bfloat16'],
  ])('an index with %s', async (_, change, message) => {
    const dir = join(home, `l${count++}`)
    await save(dir, 'w', [replicated([6, 8])])
    const index = join(dir, 'iter_0000003', 'index.json')
    writeFileSync(index, change(readFileSync(index, 'utf8')))
    const error = await errorOf(() => openCheckpoint(dir))
    expect(error.code).toMatch(/ERR_CHECKPOINT|ERR_PATH_ESCAPE/)
    expect(error.message).toContain(message)
  })
  it('no checkpoint', async () => {
    expect(await errorOf(() => resolveCheckpoint(home))).toMatchObject({ code: 'ERR_CHECKPOINT' })
  })
  it('a failing rank fails all, and nothing is left', async () => {
    const dir = join(home, `l${count++}`)
    const ranks = teams(2)
    const [kept, lost] = [Tensor.empty(ctx, [3, 8], 'float32'), Tensor.empty(ctx, [3, 8], 'float32')]
    lost.dispose()
    const results = await Promise.allSettled(
      ranks.map((r) =>
        saveCheckpoint(
          dir,
          1,
          [
            {
              name: 'w',
              dtype: 'float32' as const,
              shard: splitDim([6, 8], 0, r.rank, 2),
              data: r.rank === 1 ? lost : kept,
            },
          ],
          { ranks: r },
        ),
      ),
    )
    expect(results.map((r) => (r.status === 'rejected' ? (r.reason as { code?: string }).code : 'fine'))).toEqual([
      'ERR_RANK_FAILED',
      'ERR_HANDLE',
    ])
    expect(readdirSync(home)).not.toContain(dir)
  })
})

describe('F28: SIGKILL while saving', () => {
  it.each(['new', 'same'])(
    '10 kills leave a complete checkpoint (%s iterations)',
    async (kind) => {
      const dir = join(home, `kill-${kind}`)
      let state = 12345
      const random = () => ((state = (Math.imul(state, 1103515245) + 12345) >>> 1) % 1000) / 1000
      let next = 1
      for (let kill = 0; kill < 10; kill++) {
        let last = next - 1
        const child = spawn(
          process.execPath,
          ['--import', 'tsx', resolve(import.meta.dirname, 'saver.ts'), dir, String(next), kind],
          { stdio: ['ignore', 'pipe', 'inherit'] },
        )
        const ended = new Promise((done) => child.once('exit', done))
        const delay = random() * 150
        await new Promise<void>((done) => {
          let armed = false
          child.stdout.on('data', (data: Buffer) => {
            last = Number(data.toString().trim().split('\n').at(-1))
            if (armed) return
            armed = true
            setTimeout(() => {
              child.kill('SIGKILL')
              done()
            }, delay)
          })
          child.once('exit', () => done())
        })
        await ended
        const tensors = ['a', 'b', 'c'].map((name) => ({
          name,
          tensor: Tensor.empty(ctx, [64, 256], 'float32'),
          shard: replicated([64, 256]),
        }))
        const checkpoint = await loadCheckpoint(dir, tensors)
        const { n } = JSON.parse((await readCheckpointFile(checkpoint, 'train_state.json')) as string) as { n: number }
        expect(n).toBeGreaterThanOrEqual(last) // what was reported is there, or the one after it
        expect(n).toBeLessThanOrEqual(last + 1)
        for (const { tensor } of tensors) {
          const values = await tensor.toFloat32Array()
          expect(values.every((v) => v === n)).toBe(true)
          tensor.dispose()
        }
        next = n + 1
      }
      // The last kill's leftovers go with the next save, and nothing else is hidden there.
      expect(readdirSync(dir).filter((name) => name.startsWith('.')).length).toBeLessThanOrEqual(2)
    },
    120_000,
  )
})
