// Attention in bfloat16, whose blocks a CPU may multiply two elements at a time, against the same numbers in float32: odd numbers of
// queries and keys, blocks that hang over, windows, ranges of keys, softcaps, values of another width, heads in packed rows.
import { expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { dtypes } from '../../lib/base/dtype.js'
import { contiguousStrides, numel } from '../../lib/base/shape.js'
import { Device } from '../../lib/tensor/device.js'
import { normals } from './normals.js'

const device = Device.open('cpu')
const stream = device.stream.id

interface Case {
  readonly B?: number
  readonly S: number
  readonly K?: number
  readonly G?: number
  readonly R?: number
  readonly D: number
  readonly Dv?: number
  readonly causal?: boolean
  readonly window?: number
  readonly softcap?: number
  /** First keys are drawn, some behind all keys. */
  readonly ranges?: boolean
}

const cases: Case[] = [
  { S: 19, D: 2 },
  { S: 37, D: 8, R: 3 },
  { S: 131, D: 16, G: 2 },
  { S: 257, D: 64, R: 2 },
  { S: 300, D: 24, Dv: 40, R: 2, B: 2 },
  { S: 50, K: 181, D: 10, Dv: 6, causal: false },
  { S: 200, D: 12, window: 33 },
  { S: 150, D: 18, softcap: 3 },
  { S: 141, D: 34, R: 5, ranges: true },
  { S: 199, D: 32, Dv: 2, G: 3, window: 70, softcap: 5, ranges: true },
  { S: 64, D: 7, Dv: 9 }, // no pairs
]

/** All results as float32. */
async function run(c: Case, dtype: 'float32' | 'bfloat16'): Promise<Float32Array[]> {
  const { B = 1, S, K = S, G = 1, R = 1, D, Dv = D, causal = true, window = 0, softcap = 0 } = c
  const handles: number[] = []
  const keep = (handle: number) => {
    handles.push(handle)
    return handle
  }
  const empty = (shape: readonly number[], type: keyof typeof dtypes = dtype) =>
    keep(native.empty(stream, shape, dtypes[type].code))
  const copied = (to: number, from: number) => {
    native.copy(stream, to, from)
    return to
  }
  const uploaded = (data: ArrayBufferView, shape: readonly number[], type: 'float32' | 'int32') => {
    const t = empty(shape, type)
    native.upload(stream, t, data)
    return t
  }
  // Rounded to bfloat16 in either run.
  const drawn = (name: string, shape: readonly number[]) => {
    const next = normals(`${name} ${S} ${D}`)
    const exact = uploaded(Float32Array.from({ length: numel(shape) }, next), shape, 'float32')
    const rounded = copied(empty(shape, 'bfloat16'), exact)
    return copied(empty(shape), rounded)
  }
  const view = (t: number, shape: readonly number[], row: number, offset: number) => {
    const [, , ...rest] = contiguousStrides(shape)
    return keep(native.view(t, shape, [(shape[1] as number) * row, row, ...rest], offset))
  }
  // Keys beside values in rows, as in packed projections.
  const row = G * (D + Dv)
  const pairs = drawn('kv', [B, K, row])
  const [k, v] = [view(pairs, [B, K, G, D], row, 0), view(pairs, [B, K, G, Dv], row, G * D)]
  const [q, dOut] = [drawn('q', [B, S, G, R, D]), drawn('dOut', [B, S, G, R, Dv])]
  const [out, lse] = [empty([B, S, G, R, Dv]), empty([B, G * R, S], 'float32')]
  const first = Int32Array.from({ length: B * S }, (_, i) => [0, Math.floor(K / 3), K + 1][i % 3] as number)
  const firstKey = c.ranges ? uploaded(first, [B, S], 'int32') : 0
  const rest = [firstKey, 0, 1.3 / Math.sqrt(D), causal, 0, window, softcap] as const
  native.attentionForward(stream, out, lse, q, k, v, ...rest)
  const [dq, dk, dv] = [empty([B, S, G, R, D]), empty([B, K, G, D]), empty([B, K, G, Dv])]
  native.attentionBackward(stream, dq, dk, dv, dOut, q, k, v, out, lse, ...rest)
  const shapes = [
    [B, S, G, R, Dv],
    [B, G * R, S],
    [B, S, G, R, D],
    [B, K, G, D],
    [B, K, G, Dv],
  ]
  const results: Float32Array[] = []
  for (const [i, t] of [out, lse, dq, dk, dv].entries()) {
    const wide = copied(empty(shapes[i] as number[], 'float32'), t)
    results.push(new Float32Array(await native.download(stream, wide)))
  }
  for (const handle of handles) native.free(handle)
  return results
}

test.each(cases)('%j', async (c) => {
  const [wide, narrow] = [await run(c, 'float32'), await run(c, 'bfloat16')]
  for (const [i, name] of ['out', 'lse', 'dq', 'dk', 'dv'].entries()) {
    const [want, got] = [wide[i] as Float32Array, narrow[i] as Float32Array]
    const most = want.reduce((m, x) => (Number.isFinite(x) ? Math.max(m, Math.abs(x)) : m), 0)
    // Probabilities, gradients of scores and results are rounded to 9 bits each; of lse only the scores' products are summed otherwise.
    const bound = name === 'lse' ? 1e-5 * most : most * 2 ** -6
    const at = want.findIndex((x, j) =>
      Number.isFinite(x) ? !(Math.abs((got[j] as number) - x) <= bound) : got[j] !== x,
    )
    if (at >= 0) expect.fail(`${name}[${at}]: ${got[at]} for ${want[at]}, bound ${bound}`)
  }
})
