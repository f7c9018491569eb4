// The comparison of two models: numbers of a difference, dtypes, both spellings of experts, tensors and fields of one side alone; and
// the first layer that computes something else.
import { cpSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { exportCkpt, importCkpt } from '../../../lib/bridge/offline/convert.js'
import { compare } from '../../../lib/bridge/proof/compare.js'
import { compareActivations } from '../../../lib/inference/activations.js'
import { openWeights } from '../../../lib/io/weightFolder.js'
import { bfloat16Bits } from '../../../lib/tensor/host.js'
import { stretches } from '../../../lib/tensor/region.js'
import { llamaFixtures } from '../../fixtures/safetensorsFile.js'
import { writeLlama } from '../../hostile/llamaFolder.js'
import { temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()
const moe = join(import.meta.dirname, '../../fixtures/moe')
let count = 0
const fresh = () => join(home, String(count++))

async function change(folder: string, name: string, work: (values: Float32Array) => void): Promise<void> {
  const source = (await openWeights(folder)).tensors.get(name)
  if (source === undefined) throw new Error(`expected ${name} in ${folder}`)
  const file = readFileSync(source.path)
  const values = new Float32Array((source.entry.end - source.entry.begin) / 4)
  const bytes = new Uint8Array(values.buffer)
  bytes.set(file.subarray(source.offset, source.offset + bytes.length))
  work(values)
  file.set(bytes, source.offset)
  writeFileSync(source.path, file)
}

describe('tensors', () => {
  const norm = 'model.norm.weight'
  const folder = (values: readonly number[], dtype: 'float32' | 'bfloat16' = 'float32') => {
    const data = dtype === 'float32' ? Float32Array.from(values) : Uint16Array.from(values, bfloat16Bits)
    return writeLlama(fresh(), {
      hidden: 4,
      heads: 2,
      kvHeads: 1,
      dtype,
      seed: 3,
      bytes: { [norm]: new Uint8Array(data.buffer) },
    })
  }
  const rowOf = async (a: string, b: string) => (await compare(a, b)).tensors.find(({ name }) => name === norm)

  it('are told by how much they differ', async () => {
    const row = await rowOf(folder([1, -2, 3, -4]), folder([1, -2.5, 3, -3]))
    expect(row).toMatchObject({
      equal: false,
      difference: { differing: 2, first: 1, maxDifference: 1, meanDifference: 0.375 },
    })
    expect(row?.difference?.relativeL2).toBeCloseTo(Math.sqrt(1.25 / 30), 12)
  })
  it('differ by bits that no number shows', async () => {
    const zero = { differing: 1, first: 0, maxDifference: 0, relativeL2: 0 }
    expect(await rowOf(folder([0, 1, 1, 1]), folder([-0, 1, 1, 1]))).toMatchObject({ equal: false, difference: zero })
    const [a, b] = [folder([Number.NaN, 1, 1, 1]), folder([1, 1, 1, 1])]
    expect(await rowOf(a, a)).toMatchObject({ equal: true, difference: { differing: 0 } })
    expect(await rowOf(a, b)).toMatchObject({ equal: false, difference: { differing: 1, maxDifference: null } })
  })
  it('of two dtypes are compared by value', async () => {
    const row = await rowOf(folder([1, 2, 3, 1.001], 'float32'), folder([1, 2, 3, 1.001], 'bfloat16'))
    expect(row).toMatchObject({
      equal: false,
      a: { dtype: 'float32' },
      b: { dtype: 'bfloat16' },
      difference: { differing: 1, first: 3 },
    })
    expect(row?.difference?.maxDifference).toBeCloseTo(0.001, 6)
  })
  it('of another shape, and those of one side alone', async () => {
    const [a, b] = [
      writeLlama(fresh(), { vocab: 37 }),
      writeLlama(fresh(), { vocab: 36, attentionBias: true, layers: 1 }),
    ]
    const result = await compare(a, b)
    expect(result.tensors.find(({ name }) => name === 'lm_head.weight')).toMatchObject({
      equal: false,
      difference: null,
    })
    expect(result.onlyInA).toContain('model.layers.1.mlp.up_proj.weight')
    expect(result.onlyInB).toContain('model.layers.0.self_attn.q_proj.bias')
    expect(result.config.map(({ field }) => field)).toEqual(['attention_bias', 'num_hidden_layers', 'vocab_size'])
    expect(result.differences.join('\n')).toContain('lm_head.weight is [37,32] in a, [36,32] in b')
  })
  it('are the same in a checkpoint, cut anew, and in the other spelling of experts', async () => {
    for (const name of ['qwen3_moe', 'olmoe', 'mixtral']) {
      const [hub, stacked, ckpt, cut] = [join(moe, name), join(moe, `${name}_fused`), fresh(), fresh()] as const
      await importCkpt(hub, ckpt)
      await exportCkpt(ckpt, cut, { maxShardBytes: 30_000 })
      for (const [a, b] of [
        [hub, ckpt],
        [ckpt, stacked],
        [stacked, hub],
        [cut, hub],
      ] as const) {
        const result = await compare(a, b)
        expect([a, b, result.differences]).toEqual([a, b, []])
        expect(result.tensors.length).toBeGreaterThan(30)
      }
    }
  })
  it('optimizer states count between checkpoints alone', async () => {
    const [source, ckpt] = [writeLlama(fresh()), fresh()]
    await importCkpt(source, ckpt)
    const other = fresh()
    cpSync(ckpt, other, { recursive: true })
    const file = join(other, 'iter_0000000/index.json')
    const index = JSON.parse(readFileSync(file, 'utf8'))
    index.tensors['optimizer.m.output_layer.weight'] = index.tensors['output_layer.weight']
    writeFileSync(file, JSON.stringify(index))
    expect(await compare(source, other)).toMatchObject({ equal: true })
    expect(await compare(ckpt, other)).toMatchObject({ equal: false, onlyInB: ['optimizer.m.output_layer.weight'] })
  })
})

describe('activations', () => {
  const plain = join(llamaFixtures, 'plain')
  const sizes = { vocabSize: 32, maxPositionEmbeddings: 16 }
  let ckpt = ''
  beforeAll(async () => {
    ckpt = fresh()
    await importCkpt(plain, ckpt)
  })
  it('of a folder and its checkpoint are the same bits', async () => {
    const result = await compareActivations(plain, ckpt, sizes)
    expect(result).toMatchObject({ equal: true, firstDivergent: null })
    const places = result.layers.map(({ place }) => place)
    expect(places).toEqual(['embedding', 'decoder.layers.0', 'decoder.layers.1', 'decoder.final_layernorm', 'logits'])
    for (const { largest } of result.layers) expect(largest).toBeGreaterThan(0.1)
  })
  it.each([
    ['model.embed_tokens.weight', 'embedding'],
    ['model.layers.0.self_attn.o_proj.weight', 'decoder.layers.0'],
    ['model.layers.1.mlp.down_proj.weight', 'decoder.layers.1'],
    ['model.norm.weight', 'decoder.final_layernorm'],
    ['lm_head.weight', 'logits'],
  ])('%s: the first that diverges is %s', async (name, place) => {
    const copy = fresh()
    cpSync(plain, copy, { recursive: true })
    await change(copy, name, (values) => values.forEach((value, i) => void (values[i] = value * 1.01)))
    const result = await compareActivations(ckpt, copy, sizes)
    expect(result.firstDivergent).toBe(place)
    const before = result.layers.slice(
      0,
      result.layers.findIndex((l) => l.place === place),
    )
    expect(before.every(({ maxDifference }) => maxDifference === 0)).toBe(true)
    expect((await compareActivations(ckpt, copy, sizes, { tolerance: 10 })).firstDivergent).toBeNull()
  })
})

it('stretches tile a tensor in its order, none above the limit', () => {
  for (const shape of [[7, 5], [3], [], [0, 4], [2, 3, 4], [1, 100], [2, 1, 9]]) {
    for (const most of [1, 4, 10, 1000]) {
      const boxes = [...stretches(shape, most)]
      const sizes = boxes.map(({ size }) => size.reduce((a, b) => a * b, 1))
      expect(Math.max(0, ...sizes)).toBeLessThanOrEqual(most)
      const offsets = boxes.map(({ start }) => start.reduce((at, n, d) => at * (shape[d] as number) + n, 0))
      let next = 0
      offsets.forEach((offset, i) => {
        expect(offset).toBe(next)
        next += sizes[i] as number
      })
      expect(next).toBe(shape.reduce((a, b) => a * b, 1))
    }
  }
})
