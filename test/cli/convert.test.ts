// `viaduct import`, `export` and `verify`: the same bytes come back, and every difference is found and named.
import { copyFileSync, cpSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { verify } from '../../lib/bridge/proof/verify.js'
import { compareLogits } from '../../lib/cli/layoutLogits.js'
import { writeHollow, writeLlama } from '../hostile/llamaFolder.js'
import { digestsOf, temporaryFolder } from '../hostile/temporary.js'
import { copyFixture, startViaduct, viaduct, viaductJson } from './commandLine.js'

const folder = temporaryFolder()
const inside = (...names: string[]) => join(folder, ...names)

interface Certificate {
  readonly ok: boolean
  readonly partial: boolean
  readonly differingBytes: number
  readonly tensors: readonly { readonly name: string; readonly differingBytes: number }[]
  readonly problems: readonly string[]
  readonly logits: {
    readonly ranks: number
    readonly difference: number
    readonly largestLogit: number
    readonly ok: boolean
    readonly skipped?: string
  }
}

beforeAll(async () => {
  writeLlama(inside('llama'), { layers: 2, hidden: 32, heads: 4, kvHeads: 2, shards: 2, tied: false })
  copyFixture('plain', inside('plain'))
  const imported = await viaduct(folder, 'import', 'llama', 'ckpt')
  expect(imported).toMatchObject({ code: 0, stdout: 'ckpt/iter_0000000\n' })
})

describe('import and export', () => {
  test.each([
    [1, ['--tp', '1']],
    [4, ['--tp', '4']],
    [4, ['--tp', '2', '--pp', '2']],
    [2, ['--pp', '2', '--pipeline-layout', 'E|ttL']],
  ])('give every file back byte for byte, imported by %i ranks with %j', async (ranks, layout) => {
    const [ckpt, out] = [`ckpt${layout.join('')}`, `out${layout.join('')}`]
    const report = await viaductJson<{ tensors: number; partial: boolean }>(folder, [
      'import',
      'llama',
      ckpt,
      ...layout,
    ])
    expect(report).toMatchObject({ tensors: 15, partial: false })
    const files = readdirSync(inside(ckpt, 'iter_0000000')).filter((name) => name.endsWith('.safetensors'))
    expect(files).toHaveLength(ranks)
    expect((await viaduct(folder, 'export', ckpt, out)).code).toBe(0)
    expect(digestsOf(inside(out))).toEqual(digestsOf(inside('llama')))
    expect(digestsOf(inside(out)).length).toBeGreaterThan(5)
  })

  test('let each rank write its stage and its slices', async () => {
    const index = JSON.parse(readFileSync(inside('ckpt--tp2--pp2', 'iter_0000000', 'index.json'), 'utf8')) as {
      tensors: Record<string, { pieces: { file: string }[] }>
    }
    const writers = (name: string) => index.tensors[name]?.pieces.map(({ file }) => Number(file.slice(6, 11)))
    expect(writers('embedding.word_embeddings.weight')).toEqual([0, 1])
    expect(writers('decoder.layers.0.mlp.linear_fc2.weight')).toEqual([0, 1])
    expect(writers('decoder.layers.1.mlp.linear_fc2.weight')).toEqual([2, 3])
    expect(writers('decoder.layers.1.self_attention.linear_qkv.layer_norm_weight')).toEqual([2])
    expect(writers('output_layer.weight')).toEqual([2, 3])
  })

  test('refuse a target that is not empty, and replace it when told to', async () => {
    mkdirSync(inside('full'))
    writeFileSync(inside('full', 'letter.txt'), 'keep me')
    for (const args of [
      ['import', 'llama', 'full'],
      ['export', 'ckpt', 'full'],
    ]) {
      const refused = await viaduct(folder, ...args)
      expect(refused.code).toBe(2)
      expect(refused.stderr).toMatch(/ERR_TARGET_EXISTS.*--overwrite/)
      expect(readFileSync(inside('full', 'letter.txt'), 'utf8')).toBe('keep me')
    }
    expect((await viaduct(folder, 'export', 'ckpt', 'full', '--overwrite')).code).toBe(0)
    expect(digestsOf(inside('full'))).toEqual(digestsOf(inside('llama')))
  })

  test('cast and cut into files where asked', async () => {
    expect(
      (await viaduct(folder, 'export', 'ckpt', 'cast', '--dtype', 'float32', '--max-shard-size', '20kB')).code,
    ).toBe(0)
    const names = readdirSync(inside('cast')).filter((name) => name.endsWith('.safetensors'))
    expect(names.length).toBeGreaterThan(2)
    expect(JSON.parse(readFileSync(inside('cast', 'config.json'), 'utf8'))).toMatchObject({ torch_dtype: 'float32' })
    const wrong = await viaduct(folder, 'export', 'ckpt', 'cast2', '--max-shard-size', 'big')
    expect([wrong.code, wrong.stderr]).toEqual([2, expect.stringContaining('5GB')])
  })

  test('name what cannot be converted', async () => {
    const hub = await viaduct(folder, 'import', 'meta-llama/Llama-3.2-1B', 'hub')
    expect(hub.code).toBe(2)
    expect(hub.stderr).toMatch(/ERR_OFFLINE.*meta-llama\/Llama-3.2-1B.*pass a folder/)
    writeLlama(inside('strange'), { config: { architectures: ['LlamaForCausalLN'] } })
    const strange = await viaduct(folder, 'import', 'strange', 'strange-ckpt')
    expect(strange.code).toBe(3)
    expect(strange.stderr).toMatch(/ERR_ARCHITECTURE.*did you mean LlamaForCausalLM/)
    const nothing = await viaduct(folder, 'import', 'nowhere', 'ckpt3')
    expect([nothing.code, nothing.stderr]).toEqual([3, expect.stringContaining('nowhere')])
    const folderForCheckpoint = await viaduct(folder, 'export', 'llama', 'out3')
    expect([folderForCheckpoint.code, folderForCheckpoint.stderr]).toEqual([
      3,
      expect.stringContaining('ERR_CHECKPOINT'),
    ])
    for (const name of ['hub', 'strange-ckpt', 'ckpt3', 'out3']) expect(existsSync(inside(name))).toBe(false)
  })

  test('tell how far they are', async () => {
    const told: Record<string, [number, number][]> = { import: [], export: [], verify: [] }
    const tell = (what: string) => (done: number, total: number) => void told[what]?.push([done, total])
    const { bytes } = await AutoBridge.importCkpt(inside('llama'), inside('progress'), { onProgress: tell('import') })
    await AutoBridge.exportCkpt(inside('progress'), inside('progress-out'), { onProgress: tell('export') })
    await verify(inside('llama'), { onProgress: tell('verify') })
    for (const [what, steps] of Object.entries(told)) {
      expect(steps.length, what).toBeGreaterThan(10)
      expect(steps.map(([done]) => done)).toEqual(steps.map(([done]) => done).sort((a, b) => a - b))
      expect(steps.at(-1)).toEqual([bytes, bytes])
    }
  })

  test('an error is one line of JSON for programs', async () => {
    const usage = await viaductJson<{ error: { code: string; message: string } }>(folder, ['import', 'llama'], 2)
    expect(usage.error).toEqual({ code: 'ERR_USAGE', message: "missing required argument 'ckpt'" })
    const { error } = await viaductJson<{ error: { code: string; details: object } }>(
      folder,
      ['import', 'llama', 'ckpt'],
      2,
    )
    expect(error).toMatchObject({ code: 'ERR_TARGET_EXISTS', details: { target: 'ckpt' } })
  })
})

describe('verify', () => {
  test.each([['1'], ['2'], ['4']])('finds no difference at tp %s', async (tp) => {
    const result = await viaductJson<Certificate>(folder, ['verify', 'plain', '--tp', tp])
    expect(result).toMatchObject({ ok: true, partial: false, differingBytes: 0, problems: [] })
    expect(result.tensors).toHaveLength(21)
    if (tp === '1') expect(result.logits.skipped).toContain('one rank')
    else {
      expect(result.logits).toMatchObject({ ranks: Number(tp), ok: true })
      // Typical of two orders of summation; the gate is 1e-5. Nought would say that nothing was sharded.
      expect(result.logits.difference).toBeLessThan(3e-6)
      expect(result.logits.difference).toBeGreaterThan(0)
      // Logits of a model with weights near 1/√hidden, not garbage.
      expect(result.logits.largestLogit).toBeGreaterThan(0.01)
      expect(result.logits.largestLogit).toBeLessThan(1000)
    }
  })

  test('simulates stages, and computes logits on real ones', async () => {
    const { code, stdout } = await viaduct(folder, 'verify', 'plain', '--pp', '2', '--pipeline-layout', 'E|ttL')
    expect(code).toBe(0)
    expect(stdout).toContain('0 differing bytes (tp 1, pp 2, E|ttL and back)')
    expect(stdout).toContain('logits agree: 1 rank and 2')
  })

  test('writes a table, a verdict and a certificate', async () => {
    const { code, stdout } = await viaduct(
      folder,
      'verify',
      'llama',
      '--ckpt',
      'ckpt',
      '--no-logits',
      '--certificate',
      'proof.json',
    )
    expect(code).toBe(0)
    expect(stdout).toMatch(/^tensor +dtype +shape +size +differing bytes +sha256\n/)
    expect(stdout).toMatch(/model\.embed_tokens\.weight +bfloat16 +\[37,32\]/)
    expect(stdout).toContain('equal: 21 tensors')
    expect(stdout).toContain('logits: left out, --no-logits')
    expect(JSON.parse(readFileSync(inside('proof.json'), 'utf8'))).toMatchObject({
      ok: true,
      tensors: expect.any(Array),
    })
  })

  test('names the tensor of one flipped byte in a checkpoint', async () => {
    cpSync(inside('ckpt'), inside('flipped'), { recursive: true })
    const file = inside('flipped', 'iter_0000000', 'model-00000-of-00001.safetensors')
    const bytes = readFileSync(file)
    const index = bytes.length - 5
    bytes[index] = (bytes[index] as number) ^ 1
    writeFileSync(file, bytes)
    const { code, stdout, stderr } = await viaduct(folder, 'verify', 'llama', '--ckpt', 'flipped', '--no-logits')
    expect(code).toBe(1)
    expect(stdout).toContain('not equal')
    expect(stdout).toContain(', 1 differing bytes')
    expect(stderr).toMatch(/1 of \d+ bytes differ, the first at byte \d+/)
    expect(stderr).toMatch(/(model|lm_head)\.[\w.]+ of model-0000/)
    // What is not verified cannot be exported either.
    const exported = await viaduct(folder, 'export', 'flipped', 'flipped-out')
    expect([exported.code, existsSync(inside('flipped-out'))]).toEqual([3, false])
    expect(exported.stderr).toContain('ERR_CHECKPOINT_HASH')
  })

  const name = 'model.layers.1.mlp.up_proj.weight'
  test.each([
    ['a missing tensor', { [name]: null }, 'ERR_COVERAGE'],
    [
      'an extra tensor',
      {
        'model.layers.1.mlp.extra.weight': {
          name: 'model.layers.1.mlp.extra.weight',
          dtype: 'bfloat16' as const,
          shape: [3],
        },
      },
      'ERR_COVERAGE',
    ],
    ['a wrong shape', { [name]: { name, dtype: 'bfloat16' as const, shape: [47, 32] } }, 'ERR_TENSOR_SHAPE'],
  ])('names %s of a folder', async (what, change, code) => {
    const bad = what.replaceAll(' ', '-')
    writeLlama(inside(bad), { change })
    const ended = await viaduct(folder, 'verify', bad)
    expect(ended.code).toBe(3)
    expect(ended.stderr).toContain(code)
    expect(ended.stderr).toContain(Object.keys(change)[0])
    const imported = await viaduct(folder, 'import', bad, `${bad}-ckpt`)
    expect([imported.code, existsSync(inside(`${bad}-ckpt`))]).toEqual([3, false])
  })

  type Index = { tensors: Record<string, { shape: number[]; pieces: object[] }> }
  const ours = 'decoder.layers.1.mlp.linear_fc2.weight'
  test.each<[string, (index: Index) => void, string]>([
    ['a missing tensor', (index) => delete index.tensors[ours], ours],
    [
      'an extra tensor',
      (index) => void (index.tensors['decoder.layers.9.extra'] = index.tensors[ours] as Index['tensors'][string]),
      'decoder.layers.9.extra',
    ],
    ['a wrong shape', (index) => void ((index.tensors[ours] as { shape: number[] }).shape[0] = 33), ours],
  ])('names %s of a checkpoint', async (what, spoil, named) => {
    const bad = `ckpt-${what.replaceAll(' ', '-')}`
    cpSync(inside('ckpt'), inside(bad), { recursive: true })
    const file = inside(bad, 'iter_0000000', 'index.json')
    const index = JSON.parse(readFileSync(file, 'utf8')) as Index
    spoil(index)
    writeFileSync(file, JSON.stringify(index))
    const ended = await viaduct(folder, 'verify', 'llama', '--ckpt', bad, '--no-logits')
    expect([1, 3]).toContain(ended.code)
    expect(ended.stderr).toContain(named)
  })

  test('tells a changed file beside the weights', async () => {
    cpSync(inside('llama'), inside('renamed'), { recursive: true })
    copyFileSync(inside('renamed', 'config.json'), inside('renamed', 'more.json'))
    writeFileSync(inside('renamed', 'LICENSE.txt'), 'Another licence.')
    const { code, stderr } = await viaduct(folder, 'verify', 'renamed', '--ckpt', 'ckpt', '--no-logits')
    expect(code).toBe(1)
    expect(stderr).toContain('LICENSE.txt')
    expect(stderr).toContain('more.json')
  })

  test('lets pass what is permitted, and says so', async () => {
    const pattern = 'model.layers.1.mlp.extra.weight'
    const change = { [pattern]: { name: pattern, dtype: 'bfloat16' as const, shape: [3] } }
    writeLlama(inside('permitted'), { change })
    const result = await viaductJson<Certificate>(folder, ['verify', 'permitted', '--tp', '2', '--ignore', pattern])
    expect(result).toMatchObject({ ok: true, partial: true, logits: { skipped: 'the folder is partial' } })
  })

  test('a model whose own logits are not finite has none to compare', async () => {
    const change = { bytes: { 'model.norm.weight': new Uint8Array(64).fill(0xff) } }
    writeLlama(inside('nan'), change)
    const result = await viaductJson<Certificate>(folder, ['verify', 'nan', '--tp', '2'])
    expect(result).toMatchObject({ ok: true, differingBytes: 0, logits: { skipped: expect.stringMatching(/finite/) } })
  })

  test('the comparison of logits can fail', () => {
    const a = Float32Array.of(1, -4, 2)
    expect(compareLogits(a, a)).toEqual({ largestLogit: 4, difference: 0, ok: true })
    expect(compareLogits(a, Float32Array.of(1, -4, 2.0001)).ok).toBe(false)
    expect(compareLogits(a, Float32Array.of(1, -4)).ok).toBe(false)
    expect(compareLogits(Float32Array.of(Number.NaN), Float32Array.of(Number.NaN)).ok).toBe(false)
  })
})

describe('a signal in the midst of a conversion', () => {
  /** True when a process has finished a part. */
  const hasBegun = (dir: string) =>
    existsSync(inside(dir)) &&
    readdirSync(inside(dir), { recursive: true }).some((name) => /journal-/.test(String(name)))

  test.each([
    ['SIGINT', 130, ['import', 'heavy', 'stopped2']],
    ['SIGTERM', 143, ['import', 'heavy', 'stopped15', '--tp', '2']],
  ] as const)('%s ends with %i, says how to go on, and the same command does', async (signal, code, args) => {
    const out = args[2]
    if (!existsSync(inside('heavy')))
      writeHollow(inside('heavy'), { hidden: 1024, ffn: 4096, layers: 16, vocab: 32_000, heads: 16, kvHeads: 4 })
    const { child, ended } = startViaduct(folder, ...args)
    while (!hasBegun(out) && child.exitCode === null) await new Promise((go) => setTimeout(go, 1))
    child.kill(signal)
    const { code: got, stderr } = await ended
    expect([got, stderr]).toEqual([code, expect.stringMatching(`stopped by ${signal}.*run the same command again`)])
    expect(readdirSync(inside(out))).toEqual(['.iter_0000000.unfinished'])
    const { parts, resumedParts } = await viaductJson<{ parts: number; resumedParts: number }>(folder, [...args])
    expect(resumedParts).toBeGreaterThan(0)
    expect(resumedParts).toBeLessThan(parts)
    expect(readdirSync(inside(out)).sort()).toEqual(['iter_0000000', 'latest_checkpointed_iteration.txt'])
  })

  test('two conversions do not write one target', async () => {
    const { child, ended } = startViaduct(folder, 'import', 'heavy', 'busy')
    while (!hasBegun('busy')) await new Promise((go) => setTimeout(go, 1))
    child.kill('SIGSTOP')
    const second = await viaduct(folder, 'import', 'heavy', 'busy')
    child.kill('SIGCONT')
    expect([second.code, second.stderr]).toEqual([2, expect.stringContaining(`ERR_TARGET_BUSY`)])
    expect(second.stderr).toContain(`process ${child.pid}`)
    expect((await ended).code).toBe(0)
  })
})
