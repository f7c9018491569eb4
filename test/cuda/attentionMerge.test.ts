// Attention to runs of keys, merged, against attention to all of them, and sinks: on the CPU and on the GPU of gpu.ts. Some queries see nothing of
// some runs, some nothing at all; rows begin anywhere.
import { beforeAll, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { numel } from '../../lib/base/shape.js'
import { Device } from '../../lib/tensor/device.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'
import { Bench, close, numbers, operand, randomBytes, result, rounding, wideResult } from './pair.js'

beforeAll(() => useGpu(), gpuSetupTimeout)

const [B, S, G, R] = [2, 9, 2, 3]
const ends = [0, 20, 21, 60] // of runs of keys

/** [merged, whole]: outputs in float32, then log-sum-exps. */
async function both(kind: 'cpu' | 'cuda', dtype: 'float32' | 'bfloat16', D: number, offset: number) {
  const bench = new Bench(Device.open(kind))
  const K = ends.at(-1) as number
  const data = (name: string, shape: number[]) => randomBytes(name, numel(shape), dtype)
  const heads = [B, S, G, R, D]
  const q = bench.tensor(heads, dtype, data('q', heads))
  const [k, v] = ['k', 'v'].map((name) => bench.tensor([B, K, G, D], dtype, data(name, [B, K, G, D]))) as [
    number,
    number,
  ]
  // Of each query the first key: all, those of the last run, none.
  const first = Int32Array.from({ length: B * S }, (_, i) => [0, 25, 99][i % 3] as number)
  const attend = (from: number, to: number, out: number, lse: number) => {
    const run = (t: number) => bench.view(t, [B, to - from, G, D], [K * G * D, G * D, D, 1], from * G * D)
    const seen = bench.tensor(
      [B, S],
      'int32',
      first.map((at) => at - from),
    )
    native.attentionForward(bench.stream, out, lse, q, run(k), run(v), seen, 0, 0.3, false, 0, 0, 0)
  }
  const make = () =>
    [bench.tensor(heads, dtype, undefined, { offset, gap: offset }), bench.tensor([B, G * R, S], 'float32')] as const
  const [whole, wholeLse] = make()
  attend(0, K, whole, wholeLse)
  const merged = bench.tensor(heads, 'float32', new Float32Array(numel(heads)), { offset, gap: offset })
  const lse = bench.tensor([B, G * R, S], 'float32')
  native.fill(bench.stream, lse, Number.NEGATIVE_INFINITY)
  for (const [i, from] of ends.slice(0, -1).entries()) {
    const [part, partLse] = make()
    attend(from, ends[i + 1] as number, part, partLse)
    native.mergeAttention(bench.stream, merged, lse, part, partLse)
  }
  const read = async (t: number, shape: number[], type: 'float32' | 'bfloat16') =>
    numbers({ bytes: await bench.read(t, shape, type), dtype: type })
  const results = [
    await read(merged, heads, 'float32'),
    await read(whole, heads, dtype),
    await read(lse, [B, G * R, S], 'float32'),
    await read(wholeLse, [B, G * R, S], 'float32'),
  ] as const
  bench.close()
  return results
}

const farthest = (a: Float32Array, b: Float32Array) =>
  a.reduce((most, x, i) => Math.max(most, x === b[i] ? 0 : Math.abs(x - (b[i] as number))), 0)

test.each([
  ['cpu', 'float32', 16, 0],
  ['cpu', 'float32', 7, 3],
  ['cpu', 'bfloat16', 24, 0],
  ['cuda', 'float32', 16, 0],
  ['cuda', 'float32', 7, 3],
  ['cuda', 'bfloat16', 24, 0],
  ['cuda', 'bfloat16', 20, 1],
] as const)('on %s in %s, %i channels', async (kind, dtype, D, offset) => {
  const [merged, whole, lse, wholeLse] = await both(kind, dtype, D, offset)
  // float32: a few roundings of values below 4. bfloat16: each run's output and the whole are rounded once, by 2^-9 of a value.
  const limit = dtype === 'float32' ? 2e-6 : 4 * 2 ** -8
  expect(farthest(merged, whole)).toBeLessThan(limit)
  expect(farthest(lse, wholeLse)).toBeLessThan(2e-6)
  expect(lse.filter((x) => x === Number.NEGATIVE_INFINITY)).toHaveLength((B * G * R * S) / 3)
  expect(merged.some((x) => x !== 0)).toBe(true)
})

test('what does not fit is refused at the call', () => {
  const bench = new Bench(Device.open('cpu'))
  const [out, lse] = [bench.tensor([1, 2, 1, 1, 4], 'bfloat16'), bench.tensor([1, 1, 2], 'float32')]
  expect(() => native.mergeAttention(bench.stream, out, lse, out, lse)).toThrow(/expected out of f32|float32/)
  const other = bench.tensor([1, 1, 3], 'float32')
  const sum = bench.tensor([1, 2, 1, 1, 4], 'float32')
  expect(() => native.mergeAttention(bench.stream, sum, lse, out, other)).toThrow(/partLse/)
  bench.close()
})

test.each(['float32', 'bfloat16', 'float16'] as const)('a sink on rows that begin anywhere, in %s', async (dtype) => {
  for (const [D, offset] of [
    [16, 0],
    [16, 4],
    [24, 1],
    [5, 0],
  ] as const) {
    for (const sinkDtype of ['float32', 'bfloat16'] as const) {
      // The CPU's float16 is float32.
      await close(4 * rounding[dtype], async (bench) => {
        const shape = [B, S, G, R, D]
        const at = { offset, gap: offset }
        const out = operand(bench, 'out', shape, dtype, at)
        const dOut = operand(bench, 'dOut', shape, dtype, at)
        const nothing = Number.NEGATIVE_INFINITY // a query without keys
        const values = new Float32Array(B * G * R * S).map((_, i) => (i % 5 === 0 ? nothing : (i % 7) - 3))
        const lse = bench.tensor([B, G * R, S], 'float32', values)
        const sink = bench.tensor([G * R], sinkDtype, randomBytes('sink', G * R, sinkDtype))
        const rows = bench.tensor([B * S, G * R], 'float32')
        native.attentionSink(bench.stream, out, lse, sink)
        native.attentionSinkBackward(bench.stream, rows, dOut, out, lse, sink)
        return [
          await wideResult(bench, out, shape),
          await result(bench, lse, [B, G * R, S], 'float32'),
          await result(bench, rows, [B * S, G * R], 'float32'),
        ]
      })
    }
  }
})
