// Toys: the first layers of a model, every tensor byte for byte, config.json changed in what speaks of layers alone. And configs that
// are rebuilt for checkpoints of other sizes.
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { parse, stringify } from 'yaml'
import { AutoBridge } from '../../../lib/bridge/autoBridge.js'
import { importCkpt } from '../../../lib/bridge/offline/convert.js'
import { compare } from '../../../lib/bridge/proof/compare.js'
import { verify } from '../../../lib/bridge/proof/verify.js'
import { makeToy } from '../../../lib/bridge/toy.js'
import { openWeights } from '../../../lib/io/weightFolder.js'
import { writeLlama } from '../../hostile/llamaFolder.js'
import { digestsOf, errorOf, temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()
const moe = join(import.meta.dirname, '../../fixtures/moe')
let count = 0
const fresh = () => join(home, String(count++))
const text = (folder: string, file = 'config.json') => readFileSync(join(folder, file), 'utf8')

/** Bytes of each tensor of a folder. */
async function tensorsOf(folder: string): Promise<Map<string, string>> {
  const { tensors } = await openWeights(folder)
  return new Map(
    [...tensors].map(([name, { path, offset, entry }]) => [
      name,
      `${entry.dtype} ${entry.shape} ${readFileSync(path)
        .subarray(offset, offset + entry.end - entry.begin)
        .toString('hex')}`,
    ]),
  )
}

describe('a toy', () => {
  const names = ['qwen3_moe', 'qwen3_moe_fused', 'olmoe', 'olmoe_fused', 'mixtral', 'mixtral_fused']
  it.each(names)('of %s has the first layers, and verifies', async (name) => {
    const [source, toy] = [join(moe, name), fresh()]
    const report = await makeToy(source, toy, { layers: 2 })
    const [all, kept] = [await tensorsOf(source), await tensorsOf(toy)]
    const wanted = [...all].filter(([tensor]) => !/\.layers\.([2-9]|\d\d+)\./.test(tensor))
    expect([...kept].sort()).toEqual(wanted.sort())
    expect(report).toMatchObject({ layers: 2, tensors: wanted.length })
    expect(text(toy, 'generation_config.json')).toBe(text(source, 'generation_config.json'))
    // The source had an index, so has the toy.
    expect(existsSync(join(toy, 'model.safetensors.index.json'))).toBe(true)
    const result = await verify(toy, { tensorModelParallelSize: 2 })
    expect(result).toMatchObject({ ok: true, configKept: true, partial: false })
  })

  it('changes lists of layers and nothing else in the config', async () => {
    const config = { mlp_only_layers: [0, 2], layer_types: ['a', 'b', 'c'], eos_token_id: [1, 2, 3], odd: 1e-7 }
    const source = writeLlama(fresh(), { layers: 3, config })
    const toy = fresh()
    await makeToy(source, toy, { layers: 1 })
    const expected = text(source)
      .replace('"num_hidden_layers": 3', '"num_hidden_layers": 1')
      .replace(/"mlp_only_layers": \[[^\]]*\]/, '"mlp_only_layers": [\n    0\n  ]')
      .replace(/"layer_types": \[[^\]]*\]/, '"layer_types": [\n    "a"\n  ]')
    expect(text(toy)).toBe(expected)
  })

  it('of all layers is the model, cut anew where asked', async () => {
    const source = writeLlama(fresh(), { shards: 2, tied: true })
    const toy = fresh()
    const { files } = await makeToy(source, toy, { layers: 2, maxShardBytes: 4000 })
    expect(files.length).toBeGreaterThan(3)
    expect(await compare(source, toy)).toMatchObject({ equal: true })
  })

  it('refuses layers that are not there, and a target that is', async () => {
    const source = writeLlama(fresh())
    for (const layers of [0, 3, 1.5])
      expect(await errorOf(() => makeToy(source, fresh(), { layers }))).toMatchObject({ code: 'ERR_USAGE' })
    expect(await errorOf(() => makeToy(source, source, { layers: 1 }))).toMatchObject({ code: 'ERR_TARGET_EXISTS' })
  })
})

describe('a config rebuilt after a reference', () => {
  /** A checkpoint that keeps nothing of a folder but its model section, with `changes`. */
  async function bare(source: string, section: (model: Record<string, unknown>) => unknown): Promise<string> {
    const ckpt = fresh()
    await importCkpt(source, ckpt)
    const iter = join(ckpt, 'iter_0000000')
    for (const name of ['hf', 'hf_layout.json', 'tokenizer']) rmSync(join(iter, name), { recursive: true, force: true })
    const { model } = parse(text(iter, 'run_config.yaml')) as { model: Record<string, unknown> }
    writeFileSync(join(iter, 'run_config.yaml'), stringify({ model: section(model) }))
    return ckpt
  }
  const sizes = { layers: 1, hidden: 24, heads: 3, kvHeads: 1, headDim: 6, ffn: 20, vocab: 29 } as const

  it.each<[string, (model: Record<string, unknown>) => unknown]>([
    ['its own spelling', (model) => model],
    [
      'snake_case',
      (model) =>
        Object.fromEntries(
          Object.entries(model).map(([key, value]) => [key.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`), value]),
        ),
    ],
  ])('exports a pruned Llama, its section in %s', async (_, section) => {
    const pruned = writeLlama(fresh(), { ...sizes, config: { rope_theta: 10_000 } })
    const reference = writeLlama(fresh(), { layers: 4, config: { layer_types: ['a', 'b', 'c', 'd'], extra: 1e-9 } })
    const ckpt = await bare(pruned, section)
    expect(await errorOf(() => AutoBridge.exportCkpt(ckpt, fresh()))).toMatchObject({ code: 'ERR_CHECKPOINT' })
    const bridge = await AutoBridge.fromAutoConfig(ckpt, reference)
    const out = fresh()
    await bridge.exportCkpt(ckpt, out)
    expect(await tensorsOf(out)).toEqual(await tensorsOf(pruned))
    const config = JSON.parse(text(out))
    expect(config).toMatchObject({
      num_hidden_layers: 1,
      hidden_size: 24,
      vocab_size: 29,
      head_dim: 6,
      rope_theta: 10_000,
      layer_types: ['a'],
      extra: 1e-9,
      num_attention_heads: 3,
      num_key_value_heads: 1,
      intermediate_size: 20,
    })
    for (const file of ['tokenizer.json', 'LICENSE.txt']) expect(text(out, file)).toBe(text(reference, file))
    expect(await verify(out)).toMatchObject({ ok: true, configKept: true })
    // A model in memory goes the same way.
    const model = await bridge.toMegatronModel({ wrapWithDdp: false })
    const saved = fresh()
    await bridge.saveHfPretrained(model, saved)
    await model.dispose()
    expect(digestsOf(saved)).toEqual(digestsOf(out))
  })

  it('exports experts of other sizes', async () => {
    const toy = fresh()
    await makeToy(join(moe, 'qwen3_moe'), toy, { layers: 2 })
    const ckpt = await bare(toy, (model) => model)
    const out = fresh()
    await (await AutoBridge.fromAutoConfig(ckpt, join(moe, 'qwen3_moe'))).exportCkpt(ckpt, out)
    expect(await compare(toy, out)).toMatchObject({ equal: true })
  })

  it('says what is missing or does not fit', async () => {
    const source = writeLlama(fresh(), sizes)
    const reference = writeLlama(fresh())
    const none = await bare(source, () => null)
    expect(await errorOf(() => AutoBridge.fromAutoConfig(none, reference))).toMatchObject({ code: 'ERR_CHECKPOINT' })
    const odd = await bare(source, (model) => ({ ...model, hiddenSize: 'wide' }))
    const error = await errorOf(() => AutoBridge.fromAutoConfig(odd, reference))
    expect([error.code, error.message]).toEqual(['ERR_CHECKPOINT', expect.stringContaining('hiddenSize')])
    const norm = await bare(source, (model) => ({ ...model, normalization: 'LayerNorm' }))
    expect(await errorOf(() => AutoBridge.fromAutoConfig(norm, reference))).toMatchObject({ code: 'ERR_CONFIG' })
    const less = await bare(source, (model) => ({ ...model, vocabSize: 28 }))
    const bridge = await AutoBridge.fromAutoConfig(less, reference)
    expect(await errorOf(() => bridge.exportCkpt(less, fresh()))).toMatchObject({ code: 'ERR_TENSOR_SHAPE' })
  })
})
