// Kernels through the addon where no tape is involved: casts, randomness by place, sharded cross entropy, sums in order,
// and equal bits for every number of threads.
import { afterAll, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { normals } from './normals.js'

const F32 = 0
const BF16 = 1
const F16 = 2
const F64 = 3
const I64 = 4
const I32 = 5
const E4M3 = 10
const E5M2 = 11

const device = native.openDevice('cpu')
const stream = native.createStream(device)
const threads = native.deviceInfo(device).threads
const handles: number[] = []
afterAll(() => {
  for (const handle of handles) native.free(handle)
  native.setNumThreads(device, threads)
  native.destroyStream(stream)
})

function empty(shape: readonly number[], dtype = F32): number {
  const handle = native.empty(stream, shape, dtype)
  handles.push(handle)
  return handle
}
function tensor(shape: readonly number[], data: ArrayBufferView, dtype = F32): number {
  const handle = empty(shape, dtype)
  native.upload(stream, handle, data)
  return handle
}
const floats = (shape: readonly number[], values: Iterable<number>) => tensor(shape, Float32Array.from(values))
const ids = (values: readonly number[]) => tensor([values.length], Int32Array.from(values), I32)
const bytes = (handle: number) => native.download(stream, handle)
const read = async (handle: number) => new Float32Array(await bytes(handle))
const readIds = async (handle: number) => Array.from(new BigInt64Array(await bytes(handle)), Number)

function random(name: string, n: number, spread = 1): Float32Array {
  const next = normals(name)
  return Float32Array.from({ length: n }, () => spread * next())
}

/** A copy of x in another dtype, read as whole numbers of its size. */
async function cast(shape: readonly number[], x: number, dtype: number) {
  const y = empty(shape, dtype)
  native.copy(stream, y, x)
  const raw = await bytes(y)
  return Array.from(dtype === BF16 || dtype === F16 ? new Uint16Array(raw) : new Uint8Array(raw))
}

test('casts round to nearest even, saturate as PyTorch does and keep a NaN quiet', async () => {
  // Bits computed with PyTorch 2.15: ties to even in each format, the largest finite values, the first that overflow.
  const values = [1.00390625, 1.01171875, -3.4e38, 65519, 65520, 6e-8, 2.9e-8, 464, 465, 61439, 61440, Infinity, NaN]
  const x = floats([values.length], values)
  expect(await cast([values.length], x, BF16)).toEqual([
    0x3f80, 0x3f82, 0xff80, 0x4780, 0x4780, 0x3381, 0x32f9, 0x43e8, 0x43e8, 0x4770, 0x4770, 0x7f80, 0x7fc0,
  ])
  expect(await cast([values.length], x, F16)).toEqual([
    0x3c04, 0x3c0c, 0xfc00, 0x7bff, 0x7c00, 0x0001, 0x0000, 0x5f40, 0x5f44, 0x7b80, 0x7b80, 0x7c00, 0x7e00,
  ])
  expect(await cast([values.length], x, E4M3)).toEqual([
    0x38, 0x38, 0xfe, 0x7e, 0x7e, 0, 0, 0x7e, 0x7e, 0x7e, 0x7e, 0x7e, 0x7f,
  ])
  expect(await cast([values.length], x, E5M2)).toEqual([
    0x3c, 0x3c, 0xfc, 0x7c, 0x7c, 0, 0, 0x5f, 0x5f, 0x7b, 0x7c, 0x7c, 0x7f,
  ])
})

test('each 16-bit float comes back from float32 as it was; equal dtypes keep the payload of a NaN', async () => {
  const all = Uint16Array.from({ length: 65536 }, (_, i) => i)
  for (const [dtype, exponent] of [
    [BF16, 0x7f80],
    [F16, 0x7c00],
  ] as const) {
    const x = tensor([65536], all, dtype)
    const wide = empty([65536])
    native.copy(stream, wide, x)
    const back = await cast([65536], wide, dtype)
    // A NaN: more than infinity, sign aside.
    expect(back.filter((bits, i) => (i & 0x7fff) <= exponent && bits !== i)).toEqual([])
    expect(back.filter((bits, i) => (i & 0x7fff) > exponent && (bits & 0x7fff) <= exponent)).toEqual([])
    expect(await cast([65536], x, dtype)).toEqual(Array.from(all))
  }
})

test('copies any strides, transposes included', async () => {
  const x = floats(
    [3, 5, 70, 2],
    Float32Array.from({ length: 2100 }, (_, i) => i),
  )
  const swapped = native.view(x, [2, 70, 3, 5], [1, 2, 700, 140], 0)
  handles.push(swapped)
  const y = empty([2, 70, 3, 5])
  native.copy(stream, y, swapped)
  const want: number[] = []
  for (let d = 0; d < 2; d++)
    for (let c = 0; c < 70; c++)
      for (let a = 0; a < 3; a++) for (let b = 0; b < 5; b++) want.push(((a * 5 + b) * 70 + c) * 2 + d)
  expect(Array.from(await read(y))).toEqual(want)
})

test('dropout depends on sample, position and channel alone: shards of channels and moved tokens agree', async () => {
  const [T, C] = [64, 1000]
  const rng = tensor([2], BigInt64Array.from([1234n, 5n]), I64)
  const ones = floats([T, C], new Float32Array(T * C).fill(1))
  const sample = Array.from({ length: T }, (_, t) => t >> 3)
  const position = Array.from({ length: T }, (_, t) => t & 7)
  const run = async (rows: number[], channelStart: number, columns: number) => {
    const x = floats([rows.length, columns], new Float32Array(rows.length * columns).fill(1))
    const y = empty([rows.length, columns])
    const at = (list: number[]) => ids(rows.map((t) => list[t]!))
    native.dropout(stream, y, x, rng, at(sample), at(position), 3, channelStart, 0.25)
    return read(y)
  }
  const whole = empty([T, C])
  native.dropout(stream, whole, ones, rng, ids(sample), ids(position), 3, 0, 0.25)
  const want = await read(whole)
  const rows = [17, 3, 63]
  const part = await run(rows, 333, 500)
  rows.forEach((t, i) => {
    expect(part.subarray(i * 500, (i + 1) * 500)).toEqual(want.subarray(t * C + 333, t * C + 833))
  })
  expect(new Set(want)).toEqual(new Set([0, Math.fround(1 / 0.75)]))
  const kept = want.filter((v) => v > 0).length / want.length
  expect(Math.abs(kept - 0.75)).toBeLessThan(5 * Math.sqrt((0.25 * 0.75) / want.length)) // 5 standard deviations
  const other = tensor([2], BigInt64Array.from([1234n, 6n]), I64)
  const next = empty([T, C])
  native.dropout(stream, next, ones, other, ids(sample), ids(position), 3, 0, 0.25)
  const same = (await read(next)).filter((v, i) => v > 0 === want[i]! > 0).length / want.length
  expect(Math.abs(same - (0.75 ** 2 + 0.25 ** 2))).toBeLessThan(0.01) // independent masks agree at 0.625
})

test('normal numbers depend on the logical index alone and have the moments of the normal distribution', async () => {
  const whole = empty([300, 401])
  native.randomNormal(stream, whole, 5, 99, [0, 0], [401, 1], 0, 1)
  const want = await read(whole)
  const part = empty([100, 57])
  native.randomNormal(stream, part, 5, 99, [33, 101], [401, 1], 0, 1)
  const transposed = empty([401, 300])
  native.randomNormal(stream, transposed, 5, 99, [0, 0], [1, 401], 0, 1)
  const p = await read(part)
  const t = await read(transposed)
  for (let i = 0; i < 100; i++) for (let j = 0; j < 57; j++) expect(p[i * 57 + j]).toBe(want[(33 + i) * 401 + 101 + j])
  expect(t.every((v, k) => v === want[(k % 300) * 401 + Math.floor(k / 300)])).toBe(true)
  const n = want.length
  const moment = (power: number) => want.reduce((sum, v) => sum + v ** power, 0) / n
  const bound = (variance: number) => 5 * Math.sqrt(variance / n) // 5 standard deviations of the moment
  expect(Math.abs(moment(1))).toBeLessThan(bound(1))
  expect(Math.abs(moment(2) - 1)).toBeLessThan(bound(2))
  expect(Math.abs(moment(3))).toBeLessThan(bound(15))
  expect(Math.abs(moment(4) - 3)).toBeLessThan(bound(96))
})

test('cross entropy over shards of a padded vocabulary equals the whole', async () => {
  const [T, V, P, vocab] = [7, 5000, 3, 14001]
  const labels = [0, 4999, 5000, -100, 14000, 12345, 77]
  const shards = Array.from({ length: P }, (_, p) => random(`logits ${p}`, T * V, 3))
  const logit = (t: number, j: number) => shards[Math.floor(j / V)]![t * V + (j % V)]!
  const all = new Float32Array(P * 3 * T)
  const logits = shards.map((values) => floats([T, V], values))
  for (let p = 0; p < P; p++) {
    const stats = empty([3, T])
    native.crossEntropyStats(stream, stats, logits[p]!, ids(labels), p * V, vocab)
    all.set(await read(stats), p * 3 * T)
  }
  const lse = empty([T])
  const loss = empty([T])
  native.crossEntropyCombine(stream, lse, loss, floats([P, 3, T], all), ids(labels))
  const gotLse = await read(lse)
  const gotLoss = await read(loss)
  const want = labels.map((_, t) => {
    let sum = 0
    for (let j = 0; j < vocab; j++) sum += Math.exp(logit(t, j))
    return Math.log(sum)
  })
  labels.forEach((label, t) => {
    // float32 rounds lse, about 14, to 5e-7
    expect(Math.abs(gotLse[t]! - want[t]!)).toBeLessThan(2e-6)
    expect(Math.abs(gotLoss[t]! - (label < 0 ? 0 : want[t]! - logit(t, label)))).toBeLessThan(2e-6)
  })
  const dLoss = floats([1], [0.5])
  for (let p = 0; p < P; p++) {
    native.crossEntropyBackward(stream, logits[p]!, logits[p]!, lse, ids(labels), dLoss, p * V, vocab) // in place
    const got = await read(logits[p]!)
    for (let t = 0; t < T; t++) {
      for (let c = 0; c < V; c++) {
        const j = p * V + c
        const q = j < vocab && labels[t]! >= 0 ? Math.exp(logit(t, j) - want[t]!) : 0
        const exact = 0.5 * (labels[t] === j ? q - 1 : q)
        // the exponent is known to 2e-6, see lse above; the result is rounded to float32
        if (!(Math.abs(got[t * V + c]! - exact) <= 3e-6 * q + 6e-8 * Math.abs(exact)))
          expect.fail(`token ${t} column ${j}: ${got[t * V + c]} for ${exact}`)
      }
    }
  }
})

test('an embedding row adds up its tokens in token order', async () => {
  const [V, H, T] = [11, 37, 500]
  const tokens = Array.from({ length: T }, (_, t) => 100 + ((t * 7) % (V + 2)) - 1)
  const dy = random('dy', T * H)
  const want = random('dw', V * H)
  const dw = floats([V, H], want)
  native.embeddingBackward(stream, dw, floats([T, H], dy), ids(tokens), 100)
  tokens.forEach((id, t) => {
    const row = id - 100
    if (row < 0 || row >= V) return
    for (let c = 0; c < H; c++) want[row * H + c]! += dy[t * H + c]!
  })
  expect(await read(dw)).toEqual(want)
})

test('argmax takes the first of the largest, a NaN above all, and leaves padding out', async () => {
  const V = 40000
  const rows = [0, 1, 2, 3].map((r) => random(`row ${r}`, V))
  rows[0]![30001] = rows[0]![777] = 50
  rows[1]![20000] = Number.NaN
  rows[2]![39999] = 60
  rows[2]![5] = 50
  rows[3]!.fill(Number.NEGATIVE_INFINITY)
  const logits = floats(
    [4, V],
    rows.flatMap((row) => Array.from(row)),
  )
  const index = empty([4], I64)
  const value = empty([4])
  native.argmax(stream, index, value, logits, 1000, 1000 + V - 1)
  expect(await readIds(index)).toEqual([1777, 21000, 1005, 1000])
  expect(Array.from(await read(value))).toEqual([50, Number.NaN, 50, Number.NEGATIVE_INFINITY])
})

test('the global norm is summed in float64 and clips as PyTorch does', async () => {
  const x = random('gradient', 300001, 1e3)
  const acc = tensor([1], Float64Array.of(0), F64)
  native.sumSquares(stream, acc, floats([x.length], x))
  const exact = x.reduce((sum, v) => sum + v * v, 0)
  expect(Math.abs(new Float64Array(await bytes(acc))[0]! / exact - 1)).toBeLessThan(1e-12) // 3e5 roundings of 1e-16, signs mixed
  const norm = empty([1])
  const factor = empty([1])
  native.clipFactor(stream, norm, factor, acc, 2)
  const total = Math.sqrt(new Float64Array(await bytes(acc))[0]!)
  expect((await read(norm))[0]).toBe(Math.fround(total))
  expect((await read(factor))[0]).toBe(Math.fround(2 / (total + 1e-6)))
  native.clipFactor(stream, norm, factor, acc, 0)
  expect((await read(factor))[0]).toBe(1)
  native.clipFactor(stream, norm, factor, tensor([1], Float64Array.of(Number.NaN), F64), 2)
  expect((await read(factor))[0]).toBeNaN()
})

test('results have equal bits for 1, 2, 4 and 8 threads', async () => {
  const [T, H] = [700, 520]
  const x = floats([T, H], random('x', T * H))
  const dy = floats([T, H], random('gradient', T * H))
  const w = floats([H], random('w', H))
  const all: Uint8Array[] = []
  for (const n of [1, 2, 4, 8]) {
    native.setNumThreads(device, n)
    const [y, rstd, dx, dw, sums, total, act, stats] = [
      empty([T, H]),
      empty([T]),
      empty([T, H]),
      empty([H]),
      empty([H]),
      empty([1]),
      empty([T, H / 2]),
      empty([3, T]),
    ] as const // prettier-ignore
    for (const zero of [dw, sums]) native.fill(stream, zero, 0)
    native.rmsNormForward(stream, y, rstd, 0, x, 0, w, 1e-5, false)
    native.rmsNormBackwardInput(stream, dx, dy, x, w, rstd, 0, false)
    native.rmsNormBackwardWeight(stream, dw, dy, x, rstd)
    native.sumRows(stream, sums, x)
    native.sum(stream, total, x)
    native.gatedActivationForward(stream, act, x, 0)
    native.crossEntropyStats(stream, stats, x, ids(Array.from({ length: T }, (_, t) => t % H)), 0, H)
    const parts = await Promise.all([y, rstd, dx, dw, sums, total, act, stats].map(bytes))
    all.push(Buffer.concat(parts.map((part) => new Uint8Array(part))))
  }
  for (const other of all.slice(1)) expect(Buffer.compare(other, all[0]!)).toBe(0)
})

test('a wrong argument is refused at the call, by code', () => {
  const x = empty([4, 8])
  const code = (run: () => void) => {
    try {
      run()
    } catch (error) {
      return (error as { code?: string }).code
    }
    return 'nothing thrown'
  }
  expect(code(() => native.add(stream, empty([4, 9]), x, x))).toBe('ERR_SHAPE')
  expect(code(() => native.add(stream, x, x, empty([4, 8], BF16)))).toBe('ERR_DTYPE')
  expect(code(() => native.copy(stream, x, empty([4, 8], I64)))).toBe('ERR_DTYPE')
  const turned = native.view(x, [8, 4], [1, 8], 0)
  handles.push(turned)
  expect(code(() => native.scale(stream, turned, empty([1])))).toBe('ERR_LAYOUT')
  expect(code(() => native.activationForward(stream, x, x, 9))).toBe('ERR_USAGE')
  const rng = empty([2], I64)
  expect(code(() => native.dropout(stream, x, x, rng, empty([4], I32), empty([4], I32), 0, 0, 1))).toBe('ERR_USAGE')
})
