// `viaduct compare`, `toy`, `export --reference` and the certificate of `verify`, as a user calls them.
import { cpSync, existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { importCkpt } from '../../lib/bridge/offline/convert.js'
import { openWeights } from '../../lib/io/weightFolder.js'
import { writeLlama } from '../hostile/llamaFolder.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { copyFixture, viaduct, viaductJson, writeInputs } from './commandLine.js'

const folder = temporaryFolder()
const inside = (...names: string[]) => join(folder, ...names)
const moe = join(import.meta.dirname, '../fixtures/moe')

interface Compared {
  readonly equal: boolean
  readonly differences: readonly string[]
  readonly activations: {
    readonly firstDivergent?: string | null
    readonly skipped?: string
    readonly seqLength?: number
  }
}

beforeAll(async () => {
  copyFixture('plain', inside('plain'))
  writeFileSync(inside('plain', 'tokenizer.json'), '{}')
  await importCkpt(inside('plain'), inside('ckpt'))
  cpSync(inside('plain'), inside('changed'), { recursive: true })
  const source = (await openWeights(inside('changed'))).tensors.get('model.layers.1.mlp.up_proj.weight')
  const file = inside('changed', 'model.safetensors')
  const bytes = readFileSync(file)
  const at = (source?.offset ?? 0) + 8
  bytes.writeFloatLE(bytes.readFloatLE(at) + 0.5, at)
  writeFileSync(file, bytes)
  cpSync(join(moe, 'qwen3_moe'), inside('moe'), { recursive: true })
})

describe('compare', () => {
  test('exit 0 for a folder and its checkpoint', async () => {
    const { code, stdout } = await viaduct(folder, 'compare', 'plain', 'ckpt')
    expect(code).toBe(0)
    expect(stdout).toMatch(/^tensor +dtype +shape +differing +max abs +mean abs +relative L2\n/)
    expect(stdout).toContain('no layer diverges by more than 0.00001')
    expect(stdout).toContain('equal: 21 tensors in both, 0 of them differ')
  })
  test('exit 1 names the tensor and the first layer that diverges', async () => {
    const { code, stdout, stderr } = await viaduct(folder, 'compare', 'ckpt/iter_0000000', 'changed')
    expect(code).toBe(1)
    expect(stderr).toMatch(
      /model\.layers\.1\.mlp\.up_proj\.weight: 1 of \d+ elements differ, the first at 2, .* 0\.500/,
    )
    expect(stdout).toContain('diverges first at decoder.layers.1')
    expect(stdout).toContain('different: 21 tensors in both, 1 of them differ')
  })
  test('--json, ids of a file, and what is left out', async () => {
    writeInputs(inside('ids.safetensors'), new Map([['input_ids', { shape: [1, 3], data: Float32Array.of(1, 2, 3) }]]))
    const given = await viaductJson<Compared>(folder, ['compare', 'plain', 'changed', '--input', 'ids.safetensors'], 1)
    expect(given).toMatchObject({ equal: false, activations: { firstDivergent: 'decoder.layers.1', seqLength: 3 } })
    expect(given.differences).toHaveLength(1)
    const none = await viaductJson<Compared>(folder, ['compare', 'plain', 'plain', '--no-activations'])
    expect(none).toMatchObject({ equal: true, activations: { skipped: '--no-activations' } })
    const experts = await viaductJson<Compared>(folder, ['compare', 'moe', join(moe, 'qwen3_moe_fused')])
    expect(experts).toMatchObject({ equal: true, activations: { firstDivergent: null } })
  })
  test('exit 3 for wrong ids, before or after the tensors are read', async () => {
    writeInputs(inside('wide.safetensors'), new Map([['input_ids', { shape: [1, 1], data: Float32Array.of(9999) }]]))
    for (const [file, code] of [
      ['wide.safetensors', 'ERR_TOKEN_ID'],
      ['none.safetensors', 'ERR_FILE_MISSING'],
    ] as const) {
      const ended = await viaduct(folder, 'compare', 'plain', 'changed', '--input', file)
      expect([ended.code, ended.stderr]).toEqual([3, expect.stringContaining(code)])
    }
  })
  test('exit 3 for what is no model', async () => {
    const { code, stderr } = await viaduct(folder, 'compare', 'plain', 'nowhere')
    expect([code, stderr]).toEqual([3, expect.stringContaining('nowhere')])
  })
})

describe('the certificate', () => {
  test('has a name of its own and says what was proved', async () => {
    const { code, stdout } = await viaduct(folder, 'verify', 'moe', '--ep', '2')
    expect([code, stdout]).toEqual([0, expect.stringContaining('certificate: moe.certificate.json')])
    const certificate = JSON.parse(readFileSync(inside('moe.certificate.json'), 'utf8'))
    expect(certificate).toMatchObject({
      ok: true,
      architecture: 'Qwen3MoeForCausalLM',
      hub: null,
      checkpoint: null,
      parallel: { expertModelParallelSize: 2 },
      versions: { node: process.versions.node, certificate: 1, checkpoint: 1 },
      logits: { ok: true, ranks: 2 },
      coverage: { partial: false, ignored: [], missing: [] },
      problems: [],
    })
    expect(Date.parse(certificate.time.began)).toBeGreaterThan(0)
    expect(certificate.config).toMatchObject({ changed: [], kept: certificate.config.fields })
    expect(certificate.files.map(({ name }: { name: string }) => name)).toEqual([
      'config.json',
      'generation_config.json',
    ])
    const names = new Set([...(await openWeights(inside('moe'))).tensors.keys()])
    expect(new Set(certificate.tensors.map(({ name }: { name: string }) => name))).toEqual(names)
    for (const tensor of certificate.tensors) {
      expect(tensor.sha256After).toBe(tensor.sha256Before)
      expect(tensor.sha256Before).toMatch(/^[0-9a-f]{64}$/)
    }
    // Both directions: each tensor's reader lists it among its sources.
    const sources = new Map<string, string[]>(
      certificate.coverage.parameters.map((p: { name: string; sources: string[] }) => [p.name, p.sources]),
    )
    for (const { name, rule } of certificate.tensors) expect(sources.get(rule.ours)).toContain(name)
    expect([...sources.values()].flat()).toHaveLength(names.size)
    const kinds = certificate.tensors.map(({ rule }: { rule: { kind: string } }) => rule.kind)
    expect(new Set(kinds)).toEqual(new Set(['rename', 'qkv', 'gated']))
  })
  test('counts tied copies and derived tensors too', async () => {
    const embedding = new Uint8Array(37 * 32 * 2).fill(3)
    const frequencies = 'model.layers.1.self_attn.rotary_emb.inv_freq'
    writeLlama(inside('old'), {
      tied: true,
      change: {
        'lm_head.weight': { name: 'lm_head.weight', dtype: 'bfloat16', shape: [37, 32] },
        [frequencies]: { name: frequencies, dtype: 'float32', shape: [4] },
      },
      bytes: {
        'lm_head.weight': embedding,
        'model.embed_tokens.weight': embedding,
        [frequencies]: new Uint8Array(new Float32Array([0, 1, 2, 3].map((i) => 5e5 ** (-i / 4))).buffer),
      },
    })
    const rule = (tensors: { name: string; rule: object }[], name: string) => tensors.find((t) => t.name === name)?.rule
    await importCkpt(inside('old'), inside('old-ckpt'))
    for (const against of [
      ['--tp', '2'],
      ['--ckpt', 'old-ckpt'],
    ]) {
      const { tensors } = await viaductJson<{ tensors: { name: string; rule: object }[] }>(folder, [
        'verify',
        'old',
        '--no-logits',
        ...against,
      ])
      expect(rule(tensors, 'lm_head.weight')).toEqual({ kind: 'tied', ours: 'embedding.word_embeddings.weight' })
      expect(rule(tensors, frequencies)).toEqual({ kind: 'derived', ours: null })
    }
  })
  test('goes where it is told, never into the model', async () => {
    await viaduct(folder, 'verify', 'plain', '--no-logits', '--no-certificate')
    expect(existsSync(inside('plain.certificate.json'))).toBe(false)
    const refused = await viaduct(folder, 'verify', 'plain', '--certificate', 'plain/proof.json')
    expect([refused.code, refused.stderr]).toEqual([2, expect.stringContaining('ERR_USAGE')])
    const before = readdirSync(inside('plain'))
    const within = await viaduct(inside('plain'), 'verify', '.')
    expect([within.code, within.stdout]).toEqual([0, expect.stringContaining('certificate: none written')])
    expect(readdirSync(inside('plain'))).toEqual(before)
  })
})

describe('toy and export --reference', () => {
  test('make models that verify', async () => {
    const report = await viaductJson<{ tensors: number; files: string[] }>(folder, [
      'toy',
      'moe',
      'toy',
      '--layers',
      '1',
    ])
    expect(report.files).toEqual(['model.safetensors'])
    expect((await viaduct(folder, 'import', 'toy', 'toy-ckpt')).code).toBe(0)
    const out = await viaduct(folder, 'export', 'toy-ckpt', 'rebuilt', '--reference', 'moe')
    expect(out.code, out.stderr).toBe(0)
    expect((await viaduct(folder, 'compare', 'toy', 'rebuilt')).code).toBe(0)
    const wrong = await viaduct(folder, 'toy', 'moe', 'toy9', '--layers', '9')
    expect([wrong.code, wrong.stderr]).toEqual([2, expect.stringContaining('1 to 3 layers')])
    expect((await viaduct(folder, 'toy', 'moe', 'toy9')).code).toBe(2)
  })
})
