// Odd bits come back as they were (F12). Broken model folders (F13 to F21): each is refused with its code, naming file, tensor or field; nothing is written, nothing runs.
import { execFileSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { openHfModel } from '../../lib/bridge/hfModel.js'
import { type FolderOptions, llamaTensors, writeLlama, writeSafetensors } from './llamaFolder.js'
import { digestsOf, errorOf, temporaryFolder } from './temporary.js'

const home = temporaryFolder()
let count = 0
const make = (options: FolderOptions = {}) => writeLlama(join(home, `m${count++}`), options)

/** The error of an import of `folder`; the target stays absent. */
async function refusal(folder: string, options: Parameters<typeof AutoBridge.importCkpt>[2] = {}) {
  const target = join(home, `c${count++}`)
  const error = await errorOf(() => AutoBridge.importCkpt(folder, target, options))
  expect(existsSync(target)).toBe(false)
  expect(readdirSync(home).filter((name) => name.startsWith('.'))).toEqual([])
  expect(error.kind).toMatch(/input|usage/)
  return error
}

const tensor = (name: string, shape: number[], dtype: 'bfloat16' | 'int8' = 'bfloat16') => ({
  [name]: { name, dtype, shape },
})

/** Imports and exports; the files come back byte for byte. */
async function sameAgain(options: FolderOptions) {
  const [source, ckpt, out] = [make(options), join(home, `c${count++}`), join(home, `o${count++}`)]
  await AutoBridge.importCkpt(source, ckpt)
  await AutoBridge.exportCkpt(ckpt, out)
  expect(digestsOf(out)).toEqual(digestsOf(source))
}

describe('F12: bit patterns', () => {
  it('F12: every bit pattern of bfloat16 and of the 8-bit floats', async () => {
    const patterns = Buffer.alloc(65536 * 2)
    for (let i = 0; i < 65536; i++) patterns.writeUInt16LE(i, 2 * i)
    await sameAgain({ hidden: 32, vocab: 2048, bytes: { 'model.embed_tokens.weight': patterns } })
    for (const dtype of ['float8_e4m3fn', 'float8_e5m2'] as const) {
      const all = Uint8Array.from({ length: 37 * 32 }, (_, i) => i)
      await sameAgain({ dtype, config: { torch_dtype: dtype }, bytes: { 'lm_head.weight': all } })
    }
  })
})

describe('F13 to F16, F19: weights against config', () => {
  it('F13: a missing shard is named before others are read', async () => {
    const folder = make({ shards: 3 })
    unlinkSync(join(folder, 'model-00002-of-00003.safetensors'))
    writeFileSync(join(folder, 'model-00001-of-00003.safetensors'), 'broken') // would be the error if it were read first
    const error = await refusal(folder)
    expect(error).toMatchObject({ code: 'ERR_FILE_MISSING', details: { file: 'model-00002-of-00003.safetensors' } })
  })
  it('F14: one tensor missing', async () => {
    const name = 'model.layers.1.self_attn.k_proj.weight'
    const folder = make({ change: { [name]: null } })
    const error = await refusal(folder)
    expect(error).toMatchObject({ code: 'ERR_COVERAGE', details: { missing: [name] } })
    expect(await refusal(folder, { allowMissing: [name] })).toMatchObject({ code: 'ERR_COVERAGE' }) // q and v without k make no parameter
  })
  it('F14: missing by permission is recorded', async () => {
    const folder = make({ change: { 'model.norm.weight': null } })
    const report = await AutoBridge.importCkpt(folder, join(home, `c${count++}`), { allowMissing: ['model.norm.*'] })
    expect(report.coverage).toMatchObject({ partial: true, missing: ['model.norm.weight'] })
  })
  it('F15: an unexpected tensor, and its permission', async () => {
    const name = 'model.layers.0.self_attn.q_proj.bias'
    const folder = make({ change: tensor(name, [32]) })
    expect(await refusal(folder)).toMatchObject({ code: 'ERR_COVERAGE', details: { unexpected: [name] } })
    const report = await AutoBridge.importCkpt(folder, join(home, `c${count++}`), { ignore: ['*.q_proj.bias'] })
    expect(report.coverage).toMatchObject({ partial: true, ignored: [name] })
  })
  it('F16: the vocabulary of the config is not that of the file', async () => {
    const error = await refusal(make({ config: { vocab_size: 200 } }))
    expect(error.code).toBe('ERR_TENSOR_SHAPE')
    expect(error.message).toContain('model.embed_tokens.weight: expected [200,32] from the config, got [37,32]')
  })
  it('all problems stand in one error', async () => {
    const error = await refusal(
      make({
        change: {
          ...tensor('extra.weight', [1]),
          'model.norm.weight': null,
          ...tensor('model.layers.0.mlp.up_proj.weight', [3, 3]),
        },
      }),
    )
    expect(error.details).toMatchObject({
      missing: ['model.norm.weight'],
      unexpected: ['extra.weight'],
      shapes: [expect.stringContaining('up_proj')],
    })
  })
  it('integers in place of a weight are a quantised model', async () => {
    const error = await refusal(make({ change: tensor('model.layers.0.mlp.down_proj.weight', [32, 48], 'int8') }))
    expect(error.code).toBe('ERR_TENSOR_DTYPE')
    expect(error.message).toContain('model.layers.0.mlp.down_proj.weight')
    expect(await refusal(make({ config: { quantization_config: { quant_method: 'gptq' } } }))).toMatchObject({
      code: 'ERR_HF_CONFIG',
    })
  })
  it('F19: lm_head absent', async () => {
    expect((await openHfModel(make({ tied: true }))).coverage.partial).toBe(false)
    const error = await refusal(make({ change: { 'lm_head.weight': null } }))
    expect(error.code).toBe('ERR_COVERAGE')
    expect(error.message).toMatch(/lm_head\.weight.*tie_word_embeddings is false/)
  })
  it('F19: lm_head present though tied: equal is carried, different is an error', async () => {
    const bytes = new Uint8Array(37 * 32 * 2).fill(7)
    const both = { 'model.embed_tokens.weight': bytes, 'lm_head.weight': bytes }
    const change = tensor('lm_head.weight', [37, 32])
    expect((await openHfModel(make({ tied: true, change, bytes: both }))).coverage.tied).toEqual(['lm_head.weight'])
    const other = Uint8Array.from(bytes)
    other[100] = 8
    const error = await refusal(make({ tied: true, change, bytes: { ...both, 'lm_head.weight': other } }))
    expect(error).toMatchObject({
      code: 'ERR_TIED',
      details: { tensor: 'lm_head.weight', original: 'model.embed_tokens.weight' },
    })
    expect(error.message).toContain('1 differing bytes, the first at 100')
  })
})

describe('F17, F18: the config', () => {
  it.each([
    [{ num_hidden_layers: -1 }, 'num_hidden_layers'],
    [{ num_hidden_layers: 1e9 }, 'num_hidden_layers'],
    [{ num_hidden_layers: '32' }, 'num_hidden_layers'],
    [{ num_hidden_layers: 2.5 }, 'num_hidden_layers'],
    [{ num_attention_heads: 5, hidden_size: 64 }, 'num_attention_heads=5 must divide hidden_size=64'],
    [{ num_key_value_heads: 3 }, 'num_key_value_heads=3 must divide num_attention_heads=4'],
    [{ hidden_act: 'constructor' }, 'hidden_act'],
    [{ rope_scaling: { rope_type: 'longrope' } }, 'rope_type'],
    [{ rope_scaling: { type: 'linear' } }, 'factor is missing'],
    [{ rope_theta: 'big' }, 'rope_theta'],
    [{ rms_norm_eps: null, hidden_size: null }, 'hidden_size is missing'],
    [{ tie_word_embeddings: 1 }, 'tie_word_embeddings'],
    [{ torch_dtype: 'float99' }, 'torch_dtype'],
  ])('F17: %j', async (config, message) => {
    const error = await refusal(make({ config }))
    expect(error.code).toBe('ERR_HF_CONFIG')
    expect(error.message).toContain(message)
  })
  it('F17: all problems together', async () => {
    const error = await refusal(make({ config: { num_hidden_layers: -1, num_key_value_heads: 3, vocab_size: 0 } }))
    expect(error.details['problems']).toHaveLength(3)
  })
  it('F18: an unknown architecture lists the supported ones', async () => {
    const error = await refusal(make({ config: { architectures: ['LlamaForCausalML'] } }))
    expect(error.code).toBe('ERR_ARCHITECTURE')
    expect(error.message).toMatch(/LlamaForCausalLM.*did you mean LlamaForCausalLM/)
    expect(await refusal(make({ config: { model_type: 'mistral' } }))).toMatchObject({ code: 'ERR_ARCHITECTURE' })
    expect(await refusal(make({ config: { architectures: 'LlamaForCausalLM' } }))).toMatchObject({
      code: 'ERR_ARCHITECTURE',
    })
  })
  it('F18: config.json that is no JSON, with its place', async () => {
    const folder = make()
    writeFileSync(join(folder, 'config.json'), '{\n  "a": 1,\n  oops\n}')
    expect(await refusal(folder)).toMatchObject({ code: 'ERR_JSON', details: { byteOffset: 14, line: 3 } })
    writeFileSync(join(folder, 'config.json'), '[]')
    expect(await refusal(folder)).toMatchObject({ code: 'ERR_HF_CONFIG' })
    rmSync(join(folder, 'config.json'))
    expect(await refusal(folder)).toMatchObject({ code: 'ERR_FILE_MISSING' })
  })
})

describe('F20, F21: code and paths', () => {
  it('F20: a pickle is refused and does not run', async () => {
    const folder = make()
    unlinkSync(join(folder, 'model.safetensors'))
    const marker = join(home, 'marker')
    // The pickle that Python would run: cos\nsystem\n(S'touch marker'\ntR.
    writeFileSync(join(folder, 'pytorch_model.bin'), `cos\nsystem\n(S'touch ${marker}'\ntR.`)
    const error = await refusal(folder)
    expect(error.code).toBe('ERR_PICKLE')
    expect(error.message).toContain('pytorch_model.bin')
    expect(existsSync(marker)).toBe(false)
  })
  it('no file of the folder runs', async () => {
    const folder = make()
    await AutoBridge.importCkpt(folder, join(home, `c${count++}`))
    expect(existsSync(join(folder, 'ran')) || existsSync('ran')).toBe(false)
  })
  const index = (folder: string, file: unknown) =>
    writeFileSync(
      join(folder, 'model.safetensors.index.json'),
      JSON.stringify({ weight_map: { 'model.norm.weight': file } }),
    )
  it.each([
    '../model.safetensors',
    '/etc/passwd',
    'a/../../model.safetensors',
    '..\\model.safetensors',
    'a\\b.safetensors',
    './x',
    'a//b',
    '',
    'C:/x',
    'a\u0000b',
  ])('F21: %j', async (name) => {
    const folder = make()
    unlinkSync(join(folder, 'model.safetensors'))
    index(folder, name)
    expect(await refusal(folder)).toMatchObject({ code: 'ERR_PATH_ESCAPE' })
  })
  it('F21: a link that leaves the folder; the links of the cache do not', async () => {
    const folder = make()
    const outside = join(home, 'outside.safetensors')
    writeSafetensors(outside, llamaTensors())
    unlinkSync(join(folder, 'model.safetensors'))
    symlinkSync(outside, join(folder, 'model.safetensors'))
    expect(await refusal(folder)).toMatchObject({ code: 'ERR_PATH_ESCAPE' })

    const cache = join(home, 'models--a--b')
    const revision = join(cache, 'snapshots', '0123abcd')
    mkdirSync(join(cache, 'blobs'), { recursive: true })
    const source = make()
    mkdirSync(revision, { recursive: true })
    for (const name of readdirSync(source)) {
      writeFileSync(join(cache, 'blobs', name), readFileSync(join(source, name)))
      symlinkSync(`../../blobs/${name}`, join(revision, name))
    }
    const target = join(home, `c${count++}`)
    await AutoBridge.importCkpt(revision, target)
    const out = join(home, `o${count++}`)
    await AutoBridge.exportCkpt(target, out)
    for (const name of readdirSync(source))
      expect(readFileSync(join(out, name))).toEqual(readFileSync(join(source, name)))
  })
  it('F21: a pipe in place of a file', async () => {
    const folder = make()
    unlinkSync(join(folder, 'model.safetensors'))
    execFileSync('mkfifo', [join(folder, 'model.safetensors')])
    expect(await refusal(folder)).toMatchObject({ code: 'ERR_PATH_ESCAPE' })
  })
  it('an index that names what is not there, or not all that is there', async () => {
    const folder = make()
    index(folder, 'model.safetensors')
    const error = await refusal(folder)
    expect(error.code).toBe('ERR_INDEX')
    expect(error.message).toContain('lm_head.weight of model.safetensors is not in the index')
    for (const text of [
      '{}',
      '[]',
      '{"weight_map":{}}',
      '{"weight_map":{"a":1}}',
      '{"weight_map":{"a":"x","a":"y"}}',
      '{',
    ]) {
      writeFileSync(join(folder, 'model.safetensors.index.json'), text)
      expect(await refusal(folder)).toMatchObject({ code: 'ERR_INDEX' })
    }
  })
  it('a target that the system cannot make', async () => {
    for (const target of ['/proc/viaduct', '/proc/viaduct/below']) {
      const error = await errorOf(() => AutoBridge.importCkpt(make(), target))
      expect(['ERR_FILE_MISSING', 'ERR_IO']).toContain(error.code)
      expect(error.message).toContain('/proc/viaduct')
    }
  })
  it('a hub id and a folder that is not there', async () => {
    expect(await refusal('meta-llama/Llama-3.2-1B')).toMatchObject({ code: 'ERR_OFFLINE' })
    expect(await refusal(join(home, 'nowhere'))).toMatchObject({ code: 'ERR_FILE_MISSING' })
  })
})
