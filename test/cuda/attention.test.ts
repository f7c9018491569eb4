// Own kernels of attention on the GPU of gpu.ts against the CPU's, forward and backward: sizes that no tile divides, every kind
// of mask, caches, views that begin and run anywhere. cuDNN's: attentionEngine.test.ts.
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { Device } from '../../lib/tensor/device.js'
import { type Case, packed, run, same, sized } from './attentionCase.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'
import { Bench, numbers, randomBytes } from './pair.js'

beforeAll(async () => {
  await useGpu()
  native.setAttentionEngine(Device.open('cuda').index, 'own')
}, gpuSetupTimeout)

const cases: readonly (readonly [string, Partial<Case>])[] = [
  ['one query, one key', { S: 1, D: 1 }],
  ['odd sizes, grouped', { B: 2, S: 13, G: 2, R: 3, D: 7 }],
  ['8 channels, several tiles', { S: 150, D: 8 }],
  ['64 channels, one key head for all', { S: 33, R: 4, D: 64 }],
  ['80 channels, packed tensor', { B: 2, S: 19, G: 2, R: 2, D: 80, layout: 'packed' }],
  ['128 channels', { S: 70, D: 128 }],
  ['192 channels, 128 of values', { S: 21, G: 2, D: 192, Dv: 128 }],
  ['256 channels, odd addresses', { S: 40, R: 2, D: 256, layout: 'gaps' }],
  ['values wider than keys', { S: 9, D: 12, Dv: 20 }],
  ['not causal, more keys than queries', { B: 2, S: 20, K: 77, R: 2, causal: false }],
  ['window', { S: 120, R: 2, window: 17 }],
  ['window of two keys', { S: 40, window: 2 }],
  ['softcap', { S: 37, G: 2, softcap: 1.5 }],
  ['packed sequences', { S: 130, R: 2, D: 16, firstKey: packed([1, 40, 3, 64, 22]) }],
  ['packed sequences in a window', { S: 90, firstKey: packed([50, 40]), window: 7, softcap: 3 }],
  ['left padding', { B: 2, S: 70, G: 2, firstKey: (b) => [0, 67][b]! }],
  ['ragged keys, one sample sees none', { B: 3, S: 35, causal: false, keyEnd: [35, 0, 9] }],
  ['first keys behind the last', { S: 8, K: 8, firstKey: () => 9 }],
  ['no keys', { S: 3, K: 0, causal: false }],
  ['behind a cache', { B: 2, S: 30, G: 2, R: 2, K: 100, offset: 61 }],
  ['odd addresses', { B: 2, S: 21, R: 2, D: 24, layout: 'gaps' }],
]

describe.each(['float32', 'bfloat16'] as const)('attention in %s', (dtype) => {
  test.each(cases)('%s', (_, changes) => same(sized(changes), dtype))
})

describe('few queries, of which the keys are split among blocks', () => {
  const decoding = { S: 1, backward: false } as const
  test.each<[string, Partial<Case>]>([
    ['one query', { ...decoding, B: 2, G: 2, R: 4, D: 16, K: 700, offset: 649 }],
    ['one query that sees only late keys', { ...decoding, K: 600, offset: 599, firstKey: () => 590 }],
    ['one query in a window', { ...decoding, K: 600, offset: 500, window: 30, R: 2 }],
    ['ragged caches', { ...decoding, B: 3, K: 400, causal: false, keyEnd: [0, 400, 129] }],
    ['several queries', { S: 3, R: 7, K: 500, offset: 480, D: 20, Dv: 12, backward: false }],
    ['wide heads', { ...decoding, K: 300, D: 256, causal: false }],
    ['wide heads, odd addresses', { ...decoding, K: 280, D: 132, Dv: 9, causal: false, layout: 'gaps' }],
  ])('%s', async (_, changes) => {
    await same(sized(changes), 'float32')
    await same(sized(changes), 'bfloat16')
  })
})

test('equal inputs give equal bits', async () => {
  const bench = new Bench(Device.open('cuda'))
  const c = sized({ B: 2, S: 70, G: 2, R: 2, D: 16, window: 33 })
  const first = await run(bench, c, 'bfloat16')
  const second = await run(bench, c, 'bfloat16')
  bench.close()
  expect(second).toEqual(first)
})

test.each(['own', 'auto'])('float16 by %s', async (engine) => {
  // The CPU has no float16 ops: against float32 of the same values, which float16 holds exactly.
  const [S, D] = [23, 40]
  const bench = new Bench(Device.open('cuda'))
  native.setAttentionEngine(bench.device.index, engine)
  const shape = [1, S, 1, 1, D]
  const keys = [1, S, 1, D]
  const exact = (name: string) => {
    const bits = randomBytes(name, S * D, 'bfloat16') as Uint16Array
    return numbers({ bytes: new Uint8Array(bits.buffer), dtype: 'bfloat16' }).map((x) => Math.round(x * 64) / 64)
  }
  const [qs, ks, vs, ds] = ['q', 'k', 'v', 'd'].map(exact) as [Float32Array, Float32Array, Float32Array, Float32Array]
  const results: Float32Array[][] = []
  for (const dtype of ['float32', 'float16'] as const) {
    const given = (x: Float32Array, dims: readonly number[]) => {
      const wide = bench.tensor(dims, 'float32', x)
      const y = bench.tensor(dims, dtype)
      native.copy(bench.stream, y, wide)
      return y
    }
    const [q, k, v, dOut] = [given(qs, shape), given(ks, keys), given(vs, keys), given(ds, shape)]
    const [out, dq, dk, dv] = [shape, shape, keys, keys].map((s) => bench.tensor(s, dtype)) as [
      number,
      number,
      number,
      number,
    ]
    const lse = bench.tensor([1, 1, S], 'float32')
    native.attentionForward(bench.stream, out, lse, q, k, v, 0, 0, D ** -0.5, true, 0, 0, 0)
    native.attentionBackward(bench.stream, dq, dk, dv, dOut, q, k, v, out, lse, 0, 0, D ** -0.5, true, 0, 0, 0)
    const read = async (x: number, dims: readonly number[]) => {
      const wide = bench.tensor(dims, 'float32')
      native.copy(bench.stream, wide, x)
      return numbers({ bytes: await bench.read(wide, dims, 'float32'), dtype: 'float32' })
    }
    results.push([await read(out, shape), await read(dq, shape), await read(dk, keys), await read(dv, keys)])
  }
  bench.close()
  native.setAttentionEngine(bench.device.index, 'own')
  const [want, got] = results as [Float32Array[], Float32Array[]]
  for (const [index, values] of want.entries()) {
    const most = values.reduce((top, x) => Math.max(top, Math.abs(x)), 0)
    const worst = values.reduce((top, x, i) => Math.max(top, Math.abs(x - got[index]![i]!)), 0)
    expect(worst).toBeGreaterThan(0) // it was rounded
    expect(worst).toBeLessThan(most * 2 ** -9)
  }
})

test('heads that no kernel holds are refused', async () => {
  const bench = new Bench(Device.open('cuda'))
  const c = sized({ D: 257 })
  await expect(run(bench, c, 'float32')).rejects.toThrow(/expected heads of at most 256 channels/)
  bench.close()
})
