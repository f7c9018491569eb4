// Data: byte-level BPE against the Hugging Face tokenizers library, sample order, micro-batches at any data-parallel size.
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { tokenizerConfigJson, tokenizerJson, trainBpe } from '../../../lib/data/bpeTrainer.js'
import { IndexedTokens } from '../../../lib/data/indexedTokens.js'
import { BatchLoader } from '../../../lib/data/loader.js'
import { permuted, sampleAt } from '../../../lib/data/sampleOrder.js'
import { readTexts, tokenizeTexts } from '../../../lib/data/textTokens.js'
import { MemoryTokens, MockDataset, TokenDataset, unigramEntropy } from '../../../lib/data/tokenDataset.js'
import { Tokenizer } from '../../../lib/data/tokenizer.js'

let folder = ''
const text = Array.from(
  { length: 40 },
  (_, i) => `The ${i}th tensor isn't here: naïve café 東京 🙂 {x} += y[${i}];\n\tdone  .`,
).join('\n')

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'viaduct-data-'))
  const bpe = trainBpe([text], 300)
  await writeFile(join(folder, 'tokenizer.json'), tokenizerJson(bpe))
  await writeFile(join(folder, 'tokenizer_config.json'), tokenizerConfigJson(bpe, 128))
})
afterAll(() => rm(folder, { recursive: true }))

describe('tokenizer', () => {
  it('is trained, written, loaded, and gives every text back', async () => {
    const tokenizer = await Tokenizer.fromFolder(folder)
    expect(tokenizer.vocabSize).toBe(300)
    expect(tokenizer.eosIds).toEqual([0])
    const ids = await tokenizer.encode(text)
    expect(ids.length).toBeLessThan(Buffer.byteLength(text) / 2)
    expect(await tokenizer.decode(ids)).toBe(text)
    const other = 'unseen \u0000 bytes \u{1f9ea} <|endoftext|>'
    expect(await tokenizer.decode(await tokenizer.encode(other), { skipSpecialTokens: false })).toBe(other)
  })

  it('is the same in every training', () => {
    expect(tokenizerJson(trainBpe([text], 300))).toBe(tokenizerJson(trainBpe([text], 300)))
    expect(() => trainBpe(['ab'], 400)).toThrow('[trainBpe] expected text for 400 tokens, got enough for 257')
  })

  it('names a folder without tokenizer.json', async () => {
    await expect(Tokenizer.fromFolder('/nowhere')).rejects.toMatchObject({ code: 'ERR_TOKENIZER' })
  })
})

describe('sample order', () => {
  it('is a permutation of each epoch, another one in the next', () => {
    for (const count of [1, 2, 5, 64, 1000]) {
      const first = Array.from({ length: count }, (_, i) => permuted(i, count, 7, 0))
      expect([...first].sort((a, b) => a - b)).toEqual(Array.from({ length: count }, (_, i) => i))
      if (count < 64) continue
      const second = Array.from({ length: count }, (_, i) => sampleAt(count + i, count, 7))
      expect(second).not.toEqual(first)
      expect([...second].sort((a, b) => a - b)).toEqual([...first].sort((a, b) => a - b))
    }
  })
})

describe('loader', () => {
  const dataset = new TokenDataset(new MemoryTokens(Int32Array.from({ length: 701 }, (_, i) => i)), 7)
  const loader = (rank: number, size: number, microBatchSize = 2) =>
    new BatchLoader({
      dataset,
      globalBatchSize: 8,
      microBatchSize,
      dataParallelRank: rank,
      dataParallelSize: size,
      seed: 3,
    })

  it('cuts neighbours that share one token, each label once', () => {
    expect(dataset.length).toBe(100)
    expect([...dataset.sample(1)]).toEqual([7, 8, 9, 10, 11, 12, 13, 14])
    expect(() => dataset.sample(100)).toThrow('expected a sample of 0 to 99')
  })

  it('has the same micro-batches at any data-parallel size', () => {
    const whole = loader(0, 1)
    for (const dp of [1, 2, 4]) {
      const ranks = Array.from({ length: dp }, (_, rank) => loader(rank, dp))
      whole.restore({ consumedSamples: 0 })
      for (let step = 0; step < 30; step++) {
        const expected = whole.next().map((b) => `${b.sampleIds}|${b.tokens}|${b.labels}`)
        const parts = ranks.map((rank) => rank.next().map((b) => `${b.sampleIds}|${b.tokens}|${b.labels}`))
        expect(expected.map((_, m) => parts[m % dp]?.[Math.floor(m / dp)])).toEqual(expected)
      }
    }
  })

  it('goes on from its state as if it had not stopped', () => {
    const straight = loader(0, 1)
    for (let step = 0; step < 20; step++) straight.next()
    const resumed = loader(0, 1)
    resumed.restore({ consumedSamples: 160 })
    expect(resumed.next()).toEqual(straight.next())
    expect(resumed.state()).toEqual({ consumedSamples: 168 })
  })

  it('reads every sample once an epoch', () => {
    const one = new BatchLoader({
      dataset,
      globalBatchSize: 10,
      microBatchSize: 5,
      dataParallelRank: 0,
      dataParallelSize: 1,
      seed: 1,
    })
    const seen: number[] = []
    for (let step = 0; step < 10; step++)
      for (const b of one.next()) for (let i = 0; i < 5; i++) seen.push(b.tokens[i * 7] as number)
    expect(seen.sort((a, b) => a - b)).toEqual(Array.from({ length: 100 }, (_, i) => 7 * i))
  })

  it('makes each micro-batch as long as its longest sample, and counts nothing behind shorter ones', () => {
    const lengths = [3, 5, 2, 4]
    const uneven = {
      length: 4,
      sample: (i: number) => Int32Array.from({ length: lengths[i] as number }, (_, t) => 10 * i + t + 1),
    }
    const sizes = { globalBatchSize: 4, microBatchSize: 2, dataParallelRank: 0, dataParallelSize: 1 }
    const told = new BatchLoader({ dataset: uneven, ...sizes, seed: null }).next()
    expect(told.map(({ seqLength }) => seqLength)).toEqual([4, 3])
    expect([...(told[0]?.tokens ?? [])]).toEqual([1, 2, 0, 0, 11, 12, 13, 14])
    expect([...(told[0]?.labels ?? [])]).toEqual([2, 3, -100, -100, 12, 13, 14, 15])
    expect([...(told[1]?.labels ?? [])]).toEqual([22, -100, -100, 32, 33, 34])
  })

  it('refuses a batch that does not divide', () => {
    expect(() => loader(0, 3)).toThrow('globalBatchSize=8 must be divisible')
  })
})

describe('sources', () => {
  it('mock data are repeatable and inside of the vocabulary', () => {
    const mock = new MockDataset(50, 32, 5)
    expect(mock.sample(9)).toEqual(new MockDataset(50, 32, 5).sample(9))
    expect(mock.sample(9)).not.toEqual(mock.sample(10))
    for (let i = 0; i < 100; i++) for (const id of mock.sample(i)) expect(id >= 0 && id < 50).toBe(true)
  })

  it('text folders become one stream with end tokens', async () => {
    const tokenizer = await Tokenizer.fromFolder(folder)
    const stream = await tokenizeTexts(await readTexts([folder]), tokenizer, 1)
    expect([...stream.tokens].filter((id) => id === 0).length).toBeGreaterThanOrEqual(2)
    await expect(readTexts('/nowhere')).rejects.toMatchObject({ code: 'ERR_DATA' })
  })

  it('reads Megatron indexed files', async () => {
    const ids = [5, 6, 7, 60000, 9]
    const prefix = join(folder, 'corpus')
    const index = Buffer.alloc(34 + 2 * 12 + 3 * 8)
    index.write('MMIDIDX\0\0', 0, 'latin1')
    index.writeBigUInt64LE(1n, 9)
    index.writeUInt8(8, 17)
    index.writeBigUInt64LE(2n, 18)
    index.writeBigUInt64LE(3n, 26)
    index.writeInt32LE(3, 34)
    index.writeInt32LE(2, 38)
    index.writeBigInt64LE(0n, 42)
    index.writeBigInt64LE(6n, 50)
    ;[0n, 1n, 2n].forEach((boundary, i) => void index.writeBigInt64LE(boundary, 58 + 8 * i))
    await writeFile(`${prefix}.idx`, index)
    await writeFile(`${prefix}.bin`, Buffer.from(Uint16Array.from(ids).buffer))
    const tokens = new IndexedTokens(prefix)
    expect(tokens.length).toBe(5)
    expect([...tokens.read(2, 3)]).toEqual([7, 60000, 9])
    tokens.dispose()
    await writeFile(`${prefix}.bin`, Buffer.alloc(4))
    expect(() => new IndexedTokens(prefix)).toThrow('expected 10 bytes in .bin, got 4')
  })

  it('measures the entropy of single tokens', () => {
    expect(unigramEntropy([1, 1, 2, 2])).toBeCloseTo(Math.log(2), 12)
    expect(unigramEntropy([1, 1, 1])).toBe(0)
  })
})
