// Matrix products and attention through the addon: both engines, all transposes, edges of tiles, views with gaps, few rows,
// parts of a long sum; and equal bits for every number of threads.
import { readFileSync, writeFileSync } from 'node:fs'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { bfloat16Bits, bfloat16Value } from '../../lib/tensor/host.js'
import { normals } from './normals.js'

const F32 = 0
const I64 = 4
const BF16 = 1

const device = native.openDevice('cpu')
const stream = native.createStream(device)
const threads = native.deviceInfo(device).threads
const handles: number[] = []
function drop() {
  for (const handle of handles.splice(0)) native.free(handle)
}
afterEach(() => {
  drop()
  native.setNumThreads(device, threads)
  native.setMatmulEngine(device, 'auto')
})
afterAll(() => native.destroyStream(stream))

function empty(shape: readonly number[], dtype = F32): number {
  const handle = native.empty(stream, shape, dtype)
  handles.push(handle)
  return handle
}
function tensor(shape: readonly number[], values: Float32Array, dtype = F32): number {
  const handle = empty(shape, dtype)
  if (values.length > 0) native.upload(stream, handle, dtype === F32 ? values : Uint16Array.from(values, bfloat16Bits))
  return handle
}
async function read(handle: number, dtype = F32): Promise<Float32Array> {
  const raw = await native.download(stream, handle)
  return dtype === F32 ? new Float32Array(raw) : Float32Array.from(new Uint16Array(raw), bfloat16Value)
}
const drawn = new Map<string, Float32Array>()
function random(name: string, n: number, dtype = F32): Float32Array {
  const key = `${name} ${n} ${dtype}`
  let values = drawn.get(key)
  if (values === undefined) {
    const next = normals(name)
    values = Float32Array.from({ length: n }, () => (dtype === F32 ? next() : bfloat16Value(bfloat16Bits(next()))))
    drawn.set(key, values)
  }
  return values
}

/** True when this build links oneDNN: only then does the second engine exist. */
function hasOneDnn(): boolean {
  try {
    native.setMatmulEngine(device, 'onednn')
    return true
  } catch {
    return false
  } finally {
    native.setMatmulEngine(device, 'auto')
  }
}

const engines = hasOneDnn() ? ['builtin', 'onednn'] : ['builtin']

const shapes = [
  { name: 'edges of tiles', m: 67, n: 53, k: 129 },
  { name: 'one row', m: 1, n: 37, k: 83 },
  { name: 'eight rows', m: 8, n: 70, k: 512 },
  { name: 'seven rows, odd columns', m: 7, n: 9, k: 77 },
  { name: 'a long sum', m: 24, n: 33, k: 3000 },
  { name: 'several tiles', m: 230, n: 300, k: 40 },
  { name: 'one product', m: 5, n: 3, k: 1 },
  { name: 'an empty sum', m: 4, n: 6, k: 0 },
] as const

describe.each(['builtin', 'onednn'])('matmul by %s', (engine) => {
  const have = engine === 'builtin' || hasOneDnn()
  test.skipIf(!have).each(shapes)('$name', async ({ m, n, k }) => {
    native.setMatmulEngine(device, engine)
    for (const dtype of [F32, BF16]) {
      for (let flags = 0; flags < 8; flags++) {
        const [transA, transB, more] = [(flags & 1) > 0, (flags & 2) > 0, (flags & 4) > 0]
        const [a, b] = [random(`a ${flags}`, m * k, dtype), random(`b ${flags}`, k * n, dtype)]
        const [old, bias] = [random(`y ${flags}`, m * n), random(`bias ${flags}`, n, dtype)]
        // y is every second row of twice as many: a view with gaps.
        const whole = tensor(
          [2 * m, n],
          Float32Array.from({ length: 2 * m * n }, (_, i) => old[(i % n) + n * Math.floor(i / n / 2)]!),
        )
        const y = native.view(whole, [m, n], [2 * n, 1], 0)
        handles.push(y)
        native.matmul(
          stream,
          y,
          tensor(transA ? [k, m] : [m, k], a, dtype),
          tensor(transB ? [n, k] : [k, n], b, dtype),
          more ? tensor([n], bias, dtype) : 0,
          transA,
          transB,
          more,
        )
        const got = await read(whole)
        let worst = 0
        let touched = 0
        for (let i = 0; i < m; i++) {
          for (let j = 0; j < n; j++) {
            let want = more ? old[i * n + j]! + bias[j]! : 0
            let size = Math.abs(want)
            for (let p = 0; p < k; p++) {
              const product = a[transA ? p * m + i : i * k + p]! * b[transB ? j * k + p : p * n + j]!
              want += product
              size += Math.abs(product)
            }
            worst = Math.max(worst, Math.abs(got[2 * i * n + j]! - want) / Math.max(size, 1e-30))
            if (got[(2 * i + 1) * n + j] !== old[i * n + j]) touched++
          }
        }
        expect(touched).toBe(0)
        // k roundings of 2^-24, each of a partial sum of at most `size`, add up like a random walk; 4 for the last additions.
        expect(worst).toBeLessThan(2 ** -24 * (4 + 2 * Math.sqrt(k)))
        drop()
      }
    }
  })
})

/** Whether rows, multiplied apart, have the bytes that they have together. */
async function sameInPieces(m: number, n: number, k: number, dtype: number, transB: boolean, cuts: readonly number[]) {
  const a = tensor([m, k], random('rows a', m * k, dtype), dtype)
  const b = tensor(transB ? [n, k] : [k, n], random('rows b', n * k, dtype), dtype)
  const bias = tensor([n], random('rows bias', n, dtype), dtype)
  const [whole, pieces] = [empty([m, n], dtype), empty([m, n], dtype)]
  native.matmul(stream, whole, a, b, bias, false, transB, false)
  const ends = [...cuts, m]
  ends.forEach((end, i) => {
    const from = ends[i - 1] ?? 0
    const part = (of: number, width: number) => {
      const handle = native.view(of, [end - from, width], [width, 1], from * width)
      handles.push(handle)
      return handle
    }
    native.matmulRows(stream, part(pieces, n), part(a, k), b, bias, transB, m)
  })
  const [one, other] = [await native.download(stream, whole), await native.download(stream, pieces)]
  drop()
  return Buffer.compare(new Uint8Array(one), new Uint8Array(other)) === 0
}

test('rows that are multiplied apart have the bits that they have among all rows', async () => {
  const sizes = [
    [17, 40, 600],
    [512, 48, 2000], // the sum is cut into other parts for fewer rows
    [1024, 512, 512], // wide tiles for some rows, narrow ones for all
    [385, 544, 64],
  ] as const
  let seen = 0
  for (const [m, n, k] of sizes) {
    for (const transB of [true, false]) {
      for (const cuts of [[m >> 1], [2, 7, m - 2], [m >> 2, m >> 1, 3 * (m >> 2)]]) {
        for (const dtype of [F32, BF16]) {
          const what = `[${m}, ${n}] x ${k}, ${transB}, cut at ${cuts}, dtype ${dtype}`
          expect(await sameInPieces(m, n, k, dtype, transB, cuts), what).toBe(true)
          seen++
        }
      }
    }
  }
  expect(seen).toBe(48)
})

test('a not-a-number spreads to its row and column only', async () => {
  const a = Float32Array.from({ length: 20 * 9 }, () => 1)
  a[3 * 9 + 4] = Number.NaN
  const y = empty([20, 17])
  native.matmul(
    stream,
    y,
    tensor([20, 9], a),
    tensor([9, 17], new Float32Array(9 * 17).fill(1)),
    0,
    false,
    false,
    false,
  )
  const got = await read(y)
  for (let i = 0; i < 20; i++) expect(Number.isNaN(got[i * 17 + 16]!)).toBe(i === 3)
})

test.each(engines)('products and attention have equal bits for 1, 2, 4 and 8 threads, by %s', async (engine) => {
  native.setMatmulEngine(device, engine)
  const products = [
    { m: 230, n: 260, k: 300, transA: false, transB: true },
    { m: 3, n: 900, k: 256, transA: false, transB: true },
    // Gradients of weights: few rows and columns, a long sum over tokens.
    { m: 64, n: 48, k: 4096, transA: true, transB: false },
    { m: 24, n: 512, k: 2000, transA: true, transB: false },
    { m: 7, n: 5, k: 3001, transA: true, transB: false },
  ]
  const [B, S, G, R, D] = [2, 150, 2, 2, 24]
  const all: Buffer[] = []
  for (const n of [1, 2, 4, 8]) {
    native.setNumThreads(device, n)
    const outputs: number[] = []
    for (const dtype of [F32, BF16]) {
      for (const p of products) {
        const a = tensor(p.transA ? [p.k, p.m] : [p.m, p.k], random('a', p.m * p.k), dtype)
        const b = tensor(p.transB ? [p.n, p.k] : [p.k, p.n], random('b', p.n * p.k), dtype)
        const y = empty([p.m, p.n])
        native.matmul(stream, y, a, b, 0, p.transA, p.transB, false)
        outputs.push(y)
      }
      const heads = (name: string, shape: number[]) =>
        tensor(
          shape,
          random(
            name,
            shape.reduce((x, y) => x * y, 1),
          ),
          dtype,
        )
      const [q, k, v, dOut] = [
        heads('q', [B, S, G, R, D]),
        heads('k', [B, S, G, D]),
        heads('v', [B, S, G, D]),
        heads('d', [B, S, G, R, D]),
      ]
      const [out, lse] = [empty([B, S, G, R, D], dtype), empty([B, G * R, S])]
      const [dq, dk, dv] = [empty([B, S, G, R, D], dtype), empty([B, S, G, D], dtype), empty([B, S, G, D], dtype)]
      native.attentionForward(stream, out, lse, q, k, v, 0, 0, 0.2, true, 0, 0, 0)
      native.attentionBackward(stream, dq, dk, dv, dOut, q, k, v, out, lse, 0, 0, 0.2, true, 0, 0, 0)
      const [last, lastLse] = [empty([B, 1, G, R, D], dtype), empty([B, G * R, 1])]
      const query = native.view(q, [B, 1, G, R, D], [S * G * R * D, G * R * D, R * D, D, 1], (S - 1) * G * R * D)
      handles.push(query)
      native.attentionForward(stream, last, lastLse, query, k, v, 0, 0, 0.2, true, S - 1, 0, 0)
      // Enough work for the team: a stream does smaller kernels of one query, as above, alone.
      const K = 2000
      const [longK, longV] = [heads('long k', [B, K, G, D]), heads('long v', [B, K, G, D])]
      const [far, farLse] = [empty([B, 1, G, R, D], dtype), empty([B, G * R, 1])]
      native.attentionForward(stream, far, farLse, query, longK, longV, 0, 0, 0.2, true, K - 1, 0, 0)
      const [index, largest] = [empty([8], I64), empty([8])]
      native.argmax(stream, index, largest, heads('logits', [8, 40_000]), 0, 40_000)
      outputs.push(out, lse, dq, dk, dv, last, lastLse, far, farLse, index, largest)
    }
    all.push(
      Buffer.concat((await Promise.all(outputs.map((y) => native.download(stream, y)))).map((y) => new Uint8Array(y))),
    )
    drop()
  }
  for (const other of all.slice(1)) expect(Buffer.compare(other, all[0]!)).toBe(0)
})

test('attention of a long sequence takes no memory of its square', async () => {
  const [S, D] = [6144, 16]
  const peak = () => Number(/VmHWM:\s+(\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))![1]) / 1024
  const make = () => tensor([1, S, 1, 1, D], random('long', S * D))
  const [q, dOut, out, dq] = [make(), make(), empty([1, S, 1, 1, D]), empty([1, S, 1, 1, D])]
  const flat = (x: number) => {
    const handle = native.view(x, [1, S, 1, D], [S * D, D, D, 1], 0)
    handles.push(handle)
    return handle
  }
  const [k, v, dk, dv] = [flat(make()), flat(make()), flat(make()), flat(make())]
  const lse = empty([1, 1, S])
  await native.syncStream(stream)
  writeFileSync('/proc/self/clear_refs', '5') // the peak begins anew
  const before = peak()
  native.attentionForward(stream, out, lse, q, k, v, 0, 0, 0.25, true, 0, 0, 0)
  native.attentionBackward(stream, dq, dk, dv, dOut, q, k, v, out, lse, 0, 0, 0.25, true, 0, 0, 0)
  await native.syncStream(stream)
  // A square of scores would be 144 MiB; blocks of some hundred rows and columns are a few.
  expect((S * S * 4) / 2 ** 20).toBe(144)
  expect(peak() - before).toBeLessThan(32)
})

test('a wrong product is refused at the call', () => {
  const x = empty([4, 8])
  const code = (run: () => void) => {
    try {
      run()
    } catch (error) {
      return (error as { code?: string }).code
    }
    return 'nothing thrown'
  }
  expect(code(() => native.matmul(stream, empty([4, 4]), x, x, 0, false, false, false))).toBe('ERR_SHAPE')
  expect(code(() => native.matmul(stream, empty([4, 4], BF16), x, x, 0, false, true, false))).toBe('ERR_DTYPE')
  expect(code(() => native.matmulRows(stream, empty([4, 4]), x, x, 0, true, 16))).toBe('ERR_SHAPE')
  expect(code(() => native.matmulRows(stream, empty([4, 4]), x, x, 0, true, 3))).toBe('ERR_SHAPE')
  expect(code(() => native.setMatmulEngine(device, 'mkl'))).toBe('ERR_UNSUPPORTED')
})
