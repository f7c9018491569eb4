// Conversions as plans of parts: memory that does not grow, other layouts of a checkpoint with all that it holds, digests of
// tensors, unfinished work that is gone on with or refused.
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { describe, expect, it } from 'vitest'
import { cutParts } from '../../../lib/bridge/offline/conversion.js'
import { exportCkpt, importCkpt } from '../../../lib/bridge/offline/convert.js'
import { openCheckpoint } from '../../../lib/checkpoint/checkpointIndex.js'
import { openWeights } from '../../../lib/io/weightFolder.js'
import { writeHollow, writeLlama } from '../../hostile/llamaFolder.js'
import { digestsOf, errorOf, temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()
const inside = (...names: string[]) => join(home, ...names)

describe('parts', () => {
  const unit = (bytes: number, rank = 0) => ({ bytes, rank, move: () => ({}) as never })
  it('hold units of one rank, at least 64 MiB', () => {
    const mib = 2 ** 20
    const parts = cutParts([40, 40, 10, 100, 1].map((n) => unit(n * mib)).concat(unit(mib, 1), unit(mib, 1)))
    expect(parts.map(({ first, end, rank }) => [first, end, rank])).toEqual([
      [0, 2, 0],
      [2, 4, 0],
      [4, 5, 0],
      [5, 7, 1],
    ])
    expect(parts.reduce((n, { bytes }) => n + bytes, 0)).toBe(193 * mib)
  })
})

describe('memory', () => {
  const peaks = (layers: number): number[] => {
    const folder = inside(`hollow${layers}`)
    writeHollow(folder, { hidden: 2048, ffn: 5632, heads: 32, kvHeads: 4, layers, vocab: 12_000 })
    const script = inside('peak.mts')
    const lib = resolve(import.meta.dirname, '../../../lib/bridge/offline/convert.ts')
    writeFileSync(
      script,
      `import { readFileSync } from 'node:fs'
import { exportCkpt, importCkpt } from ${JSON.stringify(lib)}
const peak = () => Number(/VmHWM:\\s+(\\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))[1]) / 1024
const idle = peak()
const [hf, ckpt, out] = process.argv.slice(2)
await importCkpt(hf, ckpt, { tensorModelParallelSize: 2 })
const imported = peak() - idle
await exportCkpt(ckpt, out)
console.log(JSON.stringify([imported, peak() - idle]))
`,
    )
    const args = ['--import', 'tsx', script, folder, `${folder}-ckpt`, `${folder}-out`]
    const options = { encoding: 'utf8', cwd: resolve(import.meta.dirname, '../../..') } as const
    const found = JSON.parse(execFileSync(process.execPath, args, options))
    for (const made of args.slice(-3)) rmSync(made, { recursive: true })
    return found
  }
  // 190 MB and 620 MB of weights; 2 GB and 8 GB in `npm run test:full`.
  const layers = process.env['VIADUCT_TEST_FULL'] ? ([21, 90] as const) : ([1, 6] as const)
  it('stays below 256 MiB and does not grow with the model', { timeout: layers[1] * 10_000 }, () => {
    const [small, large] = [peaks(layers[0]), peaks(layers[1])]
    process.stdout.write(`peak MiB above idle, import and export: ${small.join(', ')}; larger: ${large.join(', ')}\n`)
    for (const peak of [...small, ...large]) expect(peak).toBeLessThan(256)
    for (const [i, peak] of large.entries()) expect(Math.abs(peak - (small[i] as number))).toBeLessThan(32)
  })
})

describe('checkpoint to checkpoint', () => {
  const hashes = async (dir: string) => {
    const { tensors } = await openCheckpoint(dir)
    return Object.fromEntries([...tensors].sort().map(([name, t]) => [name, t.pieces.map((p) => p.xxh3)]))
  }
  it('cuts optimizer states like their parameters and keeps every other file', async () => {
    writeLlama(inside('llama'))
    await importCkpt(inside('llama'), inside('tp1'))
    // Slots that hold the same bytes as their parameters, and a state that is no parameter's.
    const folder = inside('tp1', 'iter_0000000')
    const index = JSON.parse(readFileSync(join(folder, 'index.json'), 'utf8'))
    for (const [name, tensor] of Object.entries(index.tensors)) index.tensors[`optimizer.expAvg.${name}`] = tensor
    writeFileSync(join(folder, 'index.json'), JSON.stringify(index))
    mkdirSync(join(folder, 'more'))
    writeFileSync(join(folder, 'more', 'loader.json'), '{}')

    await importCkpt(inside('tp1'), inside('tp4'), { tensorModelParallelSize: 2, pipelineModelParallelSize: 2 })
    const { tensors } = await openCheckpoint(inside('tp4'))
    expect(new Set([...tensors.values()].flatMap((t) => t.pieces.map((p) => p.file))).size).toBe(4)
    for (const [name, { pieces }] of tensors) {
      const slot = tensors.get(`optimizer.expAvg.${name}`)
      if (slot) expect(slot.pieces.map((p) => p.xxh3)).toEqual(pieces.map((p) => p.xxh3))
    }
    expect(readFileSync(inside('tp4', 'iter_0000000', 'more', 'loader.json'), 'utf8')).toBe('{}')
    await importCkpt(inside('tp4'), inside('again'))
    expect(await hashes(inside('again'))).toEqual(await hashes(inside('tp1')))
    await exportCkpt(inside('again'), inside('out'))
    expect(digestsOf(inside('out'))).toEqual(digestsOf(inside('llama')))
  })

  it('refuses damaged pieces by name and leaves nothing', async () => {
    const file = inside('tp4', 'iter_0000000', 'model-00003-of-00004.safetensors')
    const bytes = readFileSync(file)
    bytes[bytes.length - 1] = (bytes.at(-1) as number) ^ 1
    writeFileSync(file, bytes)
    const error = await errorOf(() => importCkpt(inside('tp4'), inside('damaged')))
    expect(error).toMatchObject({ code: 'ERR_CHECKPOINT_HASH', details: { file: 'model-00003-of-00004.safetensors' } })
    expect(existsSync(inside('damaged'))).toBe(false)
  })
})

it('records the SHA-256 of every tensor, source and target', async () => {
  const folder = writeLlama(inside('sha'), { tied: false, shards: 2 })
  await importCkpt(folder, inside('sha-ckpt'), { sha256: true })
  await exportCkpt(inside('sha-ckpt'), inside('sha-out'), { sha256: true })
  const expected: Record<string, string> = {}
  for (const [name, { path, offset, entry }] of (await openWeights(folder)).tensors) {
    const bytes = readFileSync(path).subarray(offset, offset + entry.end - entry.begin)
    expected[name] = createHash('sha256').update(bytes).digest('hex')
  }
  const recorded = (file: string) => JSON.parse(readFileSync(file, 'utf8')).sha256
  expect(recorded(inside('sha-ckpt', 'iter_0000000', 'conversion.json'))).toEqual(expected)
  expect(recorded(inside('sha-out', 'conversion.json'))).toEqual(expected)
})

describe('unfinished work', () => {
  const hf = () => inside('wide')
  /** Stops in the midst; gives how many parts are finished. */
  const stopMidway = async (out: string): Promise<number> => {
    const stop = new AbortController()
    const onProgress = (done: number, total: number) => {
      if (done > total / 2) stop.abort()
    }
    const options = { tensorModelParallelSize: 4, signal: stop.signal, onProgress }
    const error = await errorOf(() => importCkpt(hf(), out, options))
    expect(error).toMatchObject({ code: 'ERR_ABORTED', message: expect.stringContaining('--no-resume') })
    const journal = readFileSync(join(out, '.iter_0000000.unfinished', 'journal-00000.ndjson'), 'utf8')
    return journal.trimEnd().split('\n').length
  }
  it('is thrown away with a word when the source has changed, without one when told to', async () => {
    writeLlama(hf(), { kvHeads: 4 })
    const out = inside('wide-ckpt')
    const notices: string[] = []
    await stopMidway(out)
    expect(readdirSync(out)).toEqual(['.iter_0000000.unfinished'])
    copyFileSync(join(hf(), 'model.safetensors'), inside('touched'))
    copyFileSync(inside('touched'), join(hf(), 'model.safetensors'))
    const options = { tensorModelParallelSize: 4, onNotice: (line: string) => void notices.push(line) }
    expect((await importCkpt(hf(), out, options)).resumedParts).toBe(0)
    expect(notices).toEqual([expect.stringContaining('starting over')])
    await stopMidway(inside('wide-2'))
    expect((await importCkpt(hf(), inside('wide-2'), { ...options, resume: false })).resumedParts).toBe(0)
    expect(notices).toHaveLength(1)
  })
  it('is proved again: a part that was changed since is done again', async () => {
    const out = inside('wide-3')
    const finished = await stopMidway(out)
    const file = join(out, '.iter_0000000.unfinished', 'output', 'model-00000-of-00004.safetensors')
    const bytes = readFileSync(file)
    bytes[bytes.length - 1] = (bytes.at(-1) as number) ^ 1
    writeFileSync(file, bytes)
    const report = await importCkpt(hf(), out, { tensorModelParallelSize: 4 })
    expect(report).toMatchObject({ parts: 4, resumedParts: finished - 1 })
    await importCkpt(hf(), inside('wide-4'), { tensorModelParallelSize: 4 })
    expect(digestsOf(out)).toEqual(digestsOf(inside('wide-4')))
  })
})
