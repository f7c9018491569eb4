// Files of torch.save against the same tensors in safetensors: names, order, dtypes, shapes and every byte, in both formats.
import { cpSync, existsSync, mkdirSync, readFileSync, renameSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { AutoBridge } from '../../../lib/bridge/autoBridge.js'
import { verify } from '../../../lib/bridge/proof/verify.js'
import { openTorchFile } from '../../../lib/io/torch/torchFile.js'
import { openWeights, readHeader } from '../../../lib/io/weightFolder.js'
import { errorOf, filesOf, temporaryFolder } from '../../hostile/temporary.js'

const fixtures = 'test/fixtures/torch'
const home = temporaryFolder()
let count = 0
const fresh = () => join(home, `t${count++}`)

/** Dtype, shape and bytes of each tensor of a safetensors file. */
async function contentsOf(path: string) {
  const { entries, bytes } = await readHeader(path)
  const data = readFileSync(path).subarray(bytes.length)
  return new Map([...entries].map(([name, e]) => [name, { ...e, data: data.subarray(e.begin, e.end) }]))
}

describe('openTorchFile', () => {
  it.each(['mixed.bin', 'mixed4.bin', 'mixed5.bin', 'mixed_legacy.bin'])('%s', async (name) => {
    const path = join(fixtures, name)
    const expected = await contentsOf(join(fixtures, 'mixed.safetensors'))
    const entries = await openTorchFile(path, name)
    const file = readFileSync(path)
    expect([...entries.keys()].sort()).toEqual([...expected.keys()].sort())
    expect([...entries.keys()].slice(0, 3)).toEqual(['f32', 'bf16', 'f16']) // the dict's order
    for (const [tensor, { dtype, shape, begin, end }] of entries) {
      const twin = expected.get(tensor)
      expect([tensor, dtype, shape]).toEqual([tensor, twin?.dtype, twin?.shape])
      expect(file.subarray(begin, end).equals(twin?.data as Buffer), tensor).toBe(true)
    }
  })
  it('shows tied tensors and views as the same bytes', async () => {
    const entries = await openTorchFile(join(fixtures, 'mixed.bin'), 'mixed.bin')
    const place = (name: string) => [entries.get(name)?.begin, entries.get(name)?.end] as [number, number]
    const [begin] = place('whole')
    expect(place('tied')).toEqual(place('whole'))
    expect(place('rows')).toEqual([begin + 24, begin + 72])
  })
  it('opens the one wrapper of a training script', async () => {
    expect([...(await openTorchFile(join(fixtures, 'wrapped.pt'), 'wrapped.pt')).keys()]).toEqual(['a'])
  })
  it('refuses a transposed tensor by name', async () => {
    const error = await errorOf(() => openTorchFile(join(fixtures, 'transposed.bin'), 'transposed.bin'))
    expect(error).toMatchObject({ code: 'ERR_TORCH_FILE', details: { tensor: 't' } })
    expect(error.message).toContain('.contiguous()')
  })
  it('says what is missing', async () => {
    expect(await errorOf(() => openTorchFile(join(home, 'none'), 'none'))).toMatchObject({ code: 'ERR_FILE_MISSING' })
  })
})

describe('openWeights', () => {
  const put = (files: Record<string, string>) => {
    const folder = fresh()
    mkdirSync(folder)
    for (const [name, source] of Object.entries(files)) cpSync(join(fixtures, source), join(folder, name))
    return folder
  }
  it('takes safetensors wherever there are some', async () => {
    const folder = put({ 'model.safetensors': 'mixed.safetensors', 'pytorch_model.bin': 'transposed.bin' })
    expect((await openWeights(folder)).files.map(({ name }) => name)).toEqual(['model.safetensors'])
  })
  it('takes the only file of torch.save, the usual name first', async () => {
    expect((await openWeights(put({ 'best.pt': 'mixed.bin' }))).tensors.get('f32')?.file).toBe('best.pt')
    const two = { 'pytorch_model.bin': 'mixed.bin', 'training_args.bin': 'wrapped.pt' }
    expect((await openWeights(put(two))).tensors.get('f32')?.file).toBe('pytorch_model.bin')
    expect(await errorOf(() => openWeights(put({ 'a.pt': 'mixed.bin', 'b.pth': 'mixed.bin' })))).toMatchObject({
      code: 'ERR_FILE_MISSING',
    })
  })
  it('proves the index of shards', async () => {
    const folder = fresh()
    cpSync(join(fixtures, 'llama'), folder, { recursive: true })
    expect((await openWeights(folder)).tensors.size).toBe(21)
    const second = join(folder, 'pytorch_model-00002-of-00002.bin')
    renameSync(second, join(home, 'away'))
    expect(await errorOf(() => openWeights(folder))).toMatchObject({ code: 'ERR_FILE_MISSING' })
    symlinkSync(join(home, 'away'), second)
    expect(await errorOf(() => openWeights(folder))).toMatchObject({ code: 'ERR_PATH_ESCAPE' })
    const index = join(folder, 'pytorch_model.bin.index.json')
    writeFileSync(index, JSON.stringify({ weight_map: { a: 'pytorch_model-00001-of-00002.bin' } }))
    expect(await errorOf(() => openWeights(folder))).toMatchObject({ code: 'ERR_INDEX' })
  })
})

describe('a model of torch.save', () => {
  it('is imported, exported as safetensors in its shards, and verified', async () => {
    const [ckpt, out] = [fresh(), fresh()]
    const source = join(fixtures, 'llama')
    const report = await AutoBridge.importCkpt(source, ckpt)
    const pickles = [
      'pytorch_model-00001-of-00002.bin',
      'pytorch_model-00002-of-00002.bin',
      'pytorch_model.bin.index.json',
    ]
    expect(report.leftOut).toEqual(pickles)
    const record = JSON.parse(readFileSync(join(report.folder, 'conversion.json'), 'utf8'))
    expect(record.leftOut).toEqual(pickles)
    expect(existsSync(join(report.folder, 'hf', pickles[0] as string))).toBe(false)
    await AutoBridge.exportCkpt(ckpt, out)
    expect([...filesOf(out).keys()].sort()).toEqual([
      'config.json',
      'model-00001-of-00002.safetensors',
      'model-00002-of-00002.safetensors',
      'model.safetensors.index.json',
    ])
    const twin = await contentsOf(join(fixtures, 'llama.safetensors'))
    let seen = 0
    for (const { name, path, header } of (await openWeights(out)).files) {
      expect(header?.metadata).toEqual(new Map([['format', 'pt']]))
      for (const [tensor, { dtype, shape, data }] of await contentsOf(path)) {
        expect([name, dtype, shape]).toEqual([name, twin.get(tensor)?.dtype, twin.get(tensor)?.shape])
        expect(data.equals(twin.get(tensor)?.data as Buffer), tensor).toBe(true)
        seen++
      }
    }
    expect(seen).toBe(twin.size)
    expect((await openWeights(out)).files.map(({ entries }) => [...entries.keys()])).toEqual(
      (await openWeights(source)).files.map(({ entries }) => [...entries.keys()]),
    )
  })
  it('is verified against its checkpoint, and the checkpoint notices another one', async () => {
    const ckpt = fresh()
    await AutoBridge.importCkpt(join(fixtures, 'llama'), ckpt)
    expect((await verify(join(fixtures, 'llama'), { ckpt })).problems).toEqual([])
    expect((await verify(join(fixtures, 'llama_legacy'), { ckpt })).problems.join()).toContain('model.safetensors')
  })
  it('in one file of the old format: cast from bytes at odd places', async () => {
    const [ckpt, out] = [fresh(), fresh()]
    const source = join(fixtures, 'llama_legacy')
    const places = [...(await openWeights(source)).tensors.values()].map(({ offset }) => offset)
    expect(places.some((offset) => offset % 2 === 1)).toBe(true)
    await AutoBridge.importCkpt(source, ckpt, { dtype: 'float32' })
    await AutoBridge.exportCkpt(ckpt, out)
    const twin = await contentsOf(join(fixtures, 'llama.safetensors'))
    const ours = await contentsOf(join(out, 'model.safetensors'))
    expect([...ours.keys()].sort()).toEqual([...twin.keys()].sort())
    for (const [name, { dtype, data }] of ours) {
      const narrow = new Uint16Array(Uint8Array.from(twin.get(name)?.data ?? []).buffer)
      const wide = Uint32Array.from(narrow, (bits) => bits * 2 ** 16)
      expect([name, dtype]).toEqual([name, 'float32'])
      expect(data.equals(Buffer.from(wide.buffer)), name).toBe(true)
    }
  })
})
