// Attention on the GPU of gpu.ts against the CPU's, forward and backward: sizes that no tile divides, every kind of mask,
// caches, views that begin and run anywhere.
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { numel } from '../../lib/base/shape.js'
import { Device } from '../../lib/tensor/device.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'
import { Bench, numbers, onBoth, type Results, randomBytes } from './pair.js'

beforeAll(useGpu, gpuSetupTimeout)

type Float = 'float32' | 'bfloat16'

interface Case {
  readonly B: number
  readonly S: number
  readonly G: number
  readonly R: number
  readonly D: number
  readonly K: number
  readonly Dv: number
  readonly causal: boolean
  /** Key position of the first query. */
  readonly offset: number
  readonly window: number
  readonly softcap: number
  /** First key that query i of sample b sees. */
  readonly firstKey: ((b: number, i: number) => number) | null
  readonly keyEnd: readonly number[] | null
  /** How q, k and v lie: each alone; as one packed tensor; with gaps at odd addresses. */
  readonly layout: 'alone' | 'packed' | 'gaps'
  readonly backward: boolean
}

function sized(changes: Partial<Case>): Case {
  const base = { B: 1, S: 5, G: 1, R: 1, D: 8, offset: 0, window: 0, softcap: 0, ...changes }
  return {
    K: base.S,
    Dv: base.D,
    causal: true,
    firstKey: null,
    keyEnd: null,
    layout: 'alone',
    backward: true,
    ...base,
  }
}

/** Strides of [B,S,G,R,D] or, without a `heads`, [B,S,G,D] in rows of `row` elements, groups `group` apart. */
function stridesIn(S: number, row: number, group: number, heads: number | null): number[] {
  return heads === null ? [S * row, row, group, 1] : [S * row, row, group, heads, 1]
}

/** out, lse and, backward, dq, dk, dv. */
async function run(bench: Bench, c: Case, dtype: Float): Promise<Results> {
  const { B, S, G, R, D, K, Dv } = c
  const shapes = { q: [B, S, G, R, D], k: [B, K, G, D], v: [B, K, G, Dv], out: [B, S, G, R, Dv] }
  const data = (name: string, shape: readonly number[]) => randomBytes(`${name} ${shape}`, numel(shape), dtype)
  const views = (name: string, filled: boolean) => {
    const get = (part: 'q' | 'k' | 'v') => (filled ? data(`${name} ${part}`, shapes[part]) : undefined)
    const gaps = c.layout === 'gaps' ? { offset: 3, gap: 5 } : {}
    if (c.layout !== 'packed') {
      return {
        q: bench.tensor(shapes.q, dtype, get('q'), gaps),
        k: bench.tensor(shapes.k, dtype, get('k'), gaps),
        v: bench.tensor(shapes.v, dtype, get('v'), gaps),
      }
    }
    const [row, group] = [G * (R + 2) * D, (R + 2) * D]
    const whole = bench.tensor([B * S, row], dtype, filled ? data(name, [B * S, row]) : undefined)
    return {
      q: bench.view(whole, shapes.q, stridesIn(S, row, group, D)),
      k: bench.view(whole, shapes.k, stridesIn(S, row, group, null), R * D),
      v: bench.view(whole, shapes.v, stridesIn(S, row, group, null), (R + 1) * D),
    }
  }
  const { q, k, v } = views('x', true)
  const out = bench.tensor(shapes.out, dtype)
  const lseShape = [B, G * R, S]
  const lse = bench.tensor(lseShape, 'float32')
  const first = c.firstKey
  const firstKey =
    first === null
      ? 0
      : bench.tensor(
          [B, S],
          'int32',
          Int32Array.from({ length: B * S }, (_, t) => first(Math.floor(t / S), t % S)),
        )
  const keyEnd = c.keyEnd === null ? 0 : bench.tensor([B], 'int32', Int32Array.from(c.keyEnd))
  const rest = [firstKey, keyEnd, D ** -0.5, c.causal, c.offset, c.window, c.softcap] as const
  native.attentionForward(bench.stream, out, lse, q, k, v, ...rest)
  const results = [
    { bytes: await bench.read(out, shapes.out, dtype), dtype },
    { bytes: await bench.read(lse, lseShape, 'float32'), dtype: 'float32' as const },
  ]
  if (!c.backward) return results
  const dOut = bench.tensor(shapes.out, dtype, data('dOut', shapes.out))
  const d = views('d', false)
  native.attentionBackward(bench.stream, d.q, d.k, d.v, dOut, q, k, v, out, lse, ...rest)
  for (const part of ['q', 'k', 'v'] as const) {
    results.push({ bytes: await bench.read(d[part], shapes[part], dtype), dtype })
  }
  return results
}

// Both compute in float32 and round once: float32 differs by the order of sums, bfloat16 by the last bit of what is stored, and
// of `out`, from which the backward pass begins.
const bounds: Record<Float, number> = { float32: 3e-6, bfloat16: 2 ** -7 }

/** Fails unless GPU and CPU agree, with -inf in the same places. */
async function same(c: Case, dtype: Float): Promise<void> {
  const [cpu, gpu] = await onBoth((bench) => run(bench, c, dtype))
  const names = ['out', 'lse', 'dq', 'dk', 'dv']
  for (const [index, result] of cpu.entries()) {
    const want = numbers(result)
    const got = numbers(gpu[index]!)
    const most = want.reduce((top, x) => (Number.isFinite(x) ? Math.max(top, Math.abs(x)) : top), 1e-30)
    const bound = (result.dtype === 'float32' ? bounds.float32 : bounds[dtype]) * most
    const wrong = want.findIndex((x, i) => x !== got[i] && !(Math.abs(got[i]! - x) <= bound))
    if (wrong >= 0) expect.fail(`${names[index]}[${wrong}]: ${got[wrong]} for ${want[wrong]}, bound ${bound}`)
  }
}

const packed = (lengths: readonly number[]) => (_: number, i: number) => {
  let begin = 0
  for (const length of lengths) {
    if (i < begin + length) return begin
    begin += length
  }
  return begin
}

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

test('float16', async () => {
  // The CPU has no float16 ops: against float32 of the same values, which float16 holds exactly.
  const [S, D] = [23, 40]
  const bench = new Bench(Device.open('cuda'))
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
