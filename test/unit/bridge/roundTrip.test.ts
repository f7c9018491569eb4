// Folder to checkpoint to folder: the same files byte for byte, for many shapes, layouts and dtypes; and what verify finds.
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { AutoBridge } from '../../../lib/bridge/autoBridge.js'
import { exportCkpt, importCkpt } from '../../../lib/bridge/offline/convert.js'
import { verify } from '../../../lib/bridge/proof/verify.js'
import { openWeights } from '../../../lib/io/weightFolder.js'
import type { ParallelConfig } from '../../../lib/parallel/config.js'
import { type FolderOptions, writeLlama } from '../../hostile/llamaFolder.js'
import { digestsOf, errorOf, temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()
let count = 0
const fresh = (name: string) => join(home, `${name}${count++}`)

async function roundTrip(options: FolderOptions) {
  const source = writeLlama(fresh('hf'), options)
  const [ckpt, out] = [fresh('ckpt'), fresh('out')]
  await importCkpt(source, ckpt)
  await exportCkpt(ckpt, out)
  expect(digestsOf(out)).toEqual(digestsOf(source))
  return { source, ckpt, out }
}

describe('import and export', () => {
  it.each<FolderOptions>([
    {},
    { shards: 3, tied: true },
    { attentionBias: true, mlpBias: true, dtype: 'float32' },
    { headDim: 6, heads: 5, kvHeads: 1, hidden: 22, dtype: 'float16' },
    {
      config: {
        rope_theta: undefined,
        rope_parameters: { rope_theta: 1e6, rope_type: 'yarn', factor: 4 },
        torch_dtype: undefined,
        dtype: 'bfloat16',
      },
    },
  ])('gives the same folder: %j', async (options) => {
    await roundTrip(options)
  })

  it('writes a copy of tied embeddings and derived frequencies again', async () => {
    const bytes = new Uint8Array(37 * 32 * 2).fill(9)
    const frequencies = new Float32Array([0, 1, 2, 3].map((i) => 500_000 ** (-(2 * i) / 8)))
    const name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    const options: FolderOptions = {
      tied: true,
      bytes: {
        'lm_head.weight': bytes,
        'model.embed_tokens.weight': bytes,
        [name]: new Uint8Array(frequencies.buffer),
      },
      change: {
        'lm_head.weight': { name: 'lm_head.weight', dtype: 'bfloat16', shape: [37, 32] },
        [name]: { name, dtype: 'float32', shape: [4] },
      },
    }
    const { source, ckpt } = await roundTrip(options)
    expect(await verify(source, { ckpt })).toMatchObject({ ok: true, partial: false })
    const wrong = writeLlama(fresh('hf'), { ...options, config: { rope_theta: 10_000 } })
    expect(await errorOf(() => importCkpt(wrong, fresh('ckpt')))).toMatchObject({
      code: 'ERR_COVERAGE',
      details: { tensor: name, index: 1 },
    })
  })

  it('mixed dtypes stay; within one parameter they are refused', async () => {
    const norm = 'model.layers.0.input_layernorm.weight'
    await roundTrip({ change: { [norm]: { name: norm, dtype: 'float32', shape: [32] } } })
    const k = 'model.layers.0.self_attn.k_proj.weight'
    const folder = writeLlama(fresh('hf'), { change: { [k]: { name: k, dtype: 'float32', shape: [16, 32] } } })
    expect(await errorOf(() => importCkpt(folder, fresh('ckpt')))).toMatchObject({ code: 'ERR_TENSOR_DTYPE' })
  })

  it('casts when asked, to the nearest even, and says so in the config', async () => {
    const values = new Float32Array([
      1,
      1 + 2 ** -8,
      1 + 3 * 2 ** -8,
      -0,
      Number.POSITIVE_INFINITY,
      Number.NaN,
      3e38,
      1e-40,
    ])
    const source = writeLlama(fresh('hf'), {
      dtype: 'float32',
      hidden: 8,
      heads: 2,
      kvHeads: 1,
      bytes: { 'model.norm.weight': new Uint8Array(values.buffer) },
    })
    const [ckpt, out] = [fresh('ckpt'), fresh('out')]
    await importCkpt(source, ckpt)
    await exportCkpt(ckpt, out, { weightDtype: 'bfloat16' })
    const { tensors } = await openWeights(out)
    const norm = tensors.get('model.norm.weight')
    const bytes = readFileSync(join(out, 'model.safetensors')).subarray(norm?.offset, (norm?.offset ?? 0) + 16)
    const got = Array.from({ length: 8 }, (_, i) => bytes.readUInt16LE(2 * i).toString(16))
    expect(got).toEqual(['3f80', '3f80', '3f82', '8000', '7f80', '7fc0', '7f62', '1'])
    const config = readFileSync(join(out, 'config.json'), 'utf8')
    expect(config).toBe(readFileSync(join(source, 'config.json'), 'utf8').replace('"float32"', '"bfloat16"'))
  })

  it('cuts other shards when asked, and refuses a target that holds something', async () => {
    const { ckpt, out, source } = await roundTrip({})
    expect(await errorOf(() => exportCkpt(ckpt, out))).toMatchObject({ code: 'ERR_TARGET_EXISTS', exitCode: 2 })
    await exportCkpt(ckpt, out, { overwrite: true, maxShardBytes: 8000 })
    const cut = await openWeights(out)
    expect(cut.files.length).toBeGreaterThan(3)
    for (const { entries } of cut.files) expect([...entries.values()].at(-1)?.end).toBeLessThanOrEqual(8000)
    expect((await verify(out, {})).ok).toBe(true)
    const [a, b] = [await openWeights(source), cut]
    expect([...b.tensors.keys()].sort()).toEqual([...a.tensors.keys()].sort())
  })

  it('is the identity for random shapes and layouts', async () => {
    const shapes = fc.record({
      tp: fc.constantFrom(1, 2, 3, 4, 8),
      groups: fc.constantFrom(1, 2, 3, 4, 8),
      headsPerGroup: fc.integer({ min: 1, max: 4 }),
      headDim: fc.constantFrom(2, 4, 6),
      hidden: fc.integer({ min: 1, max: 9 }),
      ffn: fc.integer({ min: 1, max: 3 }),
      vocab: fc.integer({ min: 1, max: 30 }),
      tied: fc.boolean(),
      bias: fc.boolean(),
      dtype: fc.constantFrom('bfloat16' as const, 'float32' as const),
    })
    await fc.assert(
      fc.asyncProperty(shapes, async ({ tp, groups, headsPerGroup, headDim, ffn, bias, ...rest }) => {
        fc.pre((groups % tp === 0 || tp % groups === 0) && (groups * headsPerGroup) % tp === 0)
        const folder = writeLlama(fresh('p'), {
          ...rest,
          layers: 1,
          kvHeads: groups,
          heads: groups * headsPerGroup,
          headDim,
          ffn: ffn * tp,
          attentionBias: bias,
          mlpBias: bias,
        })
        const result = await verify(folder, { tensorModelParallelSize: tp })
        expect(result).toMatchObject({ ok: true, differingBytes: 0, configKept: true, partial: false })
        expect(result.tensors.every((t) => t.sha256Before === t.sha256After)).toBe(true)
      }),
      { numRuns: 25, seed: 11 },
    )
  })
})

describe('verify', () => {
  it.each([1, 2, 4])('finds nothing at tp %i', async (tp) => {
    const folder = writeLlama(fresh('hf'), { heads: 4, kvHeads: 2, shards: 2 })
    const result = await verify(folder, { tensorModelParallelSize: tp })
    expect(result).toMatchObject({ ok: true, differingBytes: 0 })
    expect(result.tensors).toHaveLength((await openWeights(folder)).tensors.size)
  })

  it.each<[string, Partial<ParallelConfig>, boolean]>([
    ['stages', { pipelineModelParallelSize: 2, tensorModelParallelSize: 2 }, false],
    ['a tied embedding on two stages', { pipelineModelParallelSize: 4, tensorModelParallelSize: 4 }, true],
    ['virtual stages', { pipelineModelParallelSize: 2, virtualPipelineModelParallelSize: 2 }, true],
    ['written stages', { pipelineModelParallelSize: 2, pipelineModelParallelLayout: 'Et|t|tt|L' }, false],
    ['an uneven first stage', { pipelineModelParallelSize: 2, numLayersInFirstPipelineStage: 1 }, true],
    ['context parallelism', { contextParallelSize: 2, tensorModelParallelSize: 2, sequenceParallel: true }, false],
  ])('finds nothing with %s', async (_, parallel, tied) => {
    const folder = writeLlama(fresh('hf'), { layers: 4, heads: 4, kvHeads: 2, tied })
    const result = await verify(folder, parallel)
    expect(result).toMatchObject({ ok: true, differingBytes: 0, parallel })
    expect(result.tensors).toHaveLength((await openWeights(folder)).tensors.size)
  })

  it('finds one flipped byte on either side', async () => {
    const { source, ckpt } = await roundTrip({ shards: 2 })
    expect(await verify(source, { ckpt })).toMatchObject({ ok: true })
    const weights = await openWeights(source)
    const victim = weights.tensors.get('model.layers.1.mlp.up_proj.weight')
    const bytes = readFileSync(victim?.path as string)
    bytes[(victim?.offset as number) + 5] = (bytes[(victim?.offset as number) + 5] as number) ^ 16
    writeFileSync(victim?.path as string, bytes)
    const result = await verify(source, { ckpt })
    expect(result.ok).toBe(false)
    expect(result.tensors.filter((t) => t.differingBytes > 0)).toMatchObject([
      { name: 'model.layers.1.mlp.up_proj.weight', differingBytes: 1, firstDifference: 5 },
    ])

    const second = await roundTrip({ shards: 2 })
    const file = join(second.ckpt, 'iter_0000000', 'model-00000-of-00001.safetensors')
    const data = readFileSync(file)
    data[data.length - 3] = (data[data.length - 3] as number) ^ 1
    writeFileSync(file, data)
    expect(await errorOf(() => exportCkpt(second.ckpt, fresh('out')))).toMatchObject({ code: 'ERR_CHECKPOINT_HASH' })
    const found = await verify(second.source, { ckpt: second.ckpt })
    expect(found.ok).toBe(false)
    expect(found.differingBytes).toBe(1)
  })

  it('finds other files that differ', async () => {
    const { source, ckpt } = await roundTrip({})
    writeFileSync(join(source, 'tokenizer.json'), '{}')
    writeFileSync(join(source, 'new.txt'), '')
    const { problems } = await verify(source, { ckpt })
    expect(problems.join()).toMatch(/tokenizer\.json differs/)
    expect(problems.join()).toMatch(/new\.txt is not among/)
  })

  it('finds a wrong shape and a missing or extra tensor between checkpoint and folder', async () => {
    const { ckpt } = await roundTrip({})
    const other = writeLlama(fresh('hf'), { vocab: 36 })
    expect((await verify(other, { ckpt })).problems.join()).toContain(
      'embedding.word_embeddings.weight is [37,32] in the checkpoint, [36,32]',
    )
    const more = writeLlama(fresh('hf'), { attentionBias: true })
    expect((await verify(more, { ckpt })).problems.join()).toContain('linear_qkv.bias is missing from the checkpoint')
    const less = writeLlama(fresh('hf'), { layers: 1 })
    expect((await verify(less, { ckpt })).problems.join()).toContain(
      'decoder.layers.1.mlp.linear_fc2.weight is in the checkpoint',
    )
  })

  it('refuses a layout that does not fit', async () => {
    const folder = writeLlama(fresh('hf'), {})
    for (const parallel of [
      { tensorModelParallelSize: 3 },
      { pipelineModelParallelSize: 3 },
      { expertModelParallelSize: 2 },
    ])
      expect(await errorOf(() => verify(folder, parallel))).toMatchObject({ code: 'ERR_LAYOUT_INVALID' })
  })
})

it('lists what it supports', () => {
  expect(AutoBridge.listSupportedModels()).toContain('LlamaForCausalLM')
  expect(AutoBridge.supports({ architectures: ['LlamaForCausalLM'], model_type: 'llama' })).toBe(true)
  expect(AutoBridge.supports({ architectures: ['constructor'], model_type: 'llama' })).toBe(false)
  expect(AutoBridge.supports({ architectures: ['Other'] })).toBe(false)
})
