// Norms, rotary embedding, activations, dropout and initial weights on the GPU of gpu.ts against the CPU's: rows of a warp, of a
// block and beyond its registers, widths that no pack divides, views that begin and run anywhere, float16.
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { numel } from '../../lib/base/shape.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'
import {
  drawn,
  expectEach,
  type Float,
  numbers,
  onBoth,
  operand,
  type Results,
  randomBytes,
  result,
  rounding,
  sameBits,
  typeOn,
  whole,
  wideResult,
} from './pair.js'

beforeAll(useGpu, gpuSetupTimeout)

const floats = ['float32', 'bfloat16', 'float16'] as const

/** Each number of each result within a bound, relative to its own size, or to a tenth of the largest one's. */
function expectClose([cpu, gpu]: [Results, Results], bounds: readonly number[]): void {
  expect(cpu.length).toBeGreaterThan(0)
  for (const [k, bound] of bounds.slice(0, cpu.length).entries()) {
    const [want, got] = [numbers(cpu[k]!), numbers(gpu[k]!)]
    expect(want.length).toBeGreaterThan(0)
    const most = want.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
    expectEach(got, want, bound, bound * most * 0.1)
  }
}

// rows, width, elements before the first and between rows
const shapes = [
  [1, 8, 0, 0],
  [9, 64, 0, 0],
  [3, 37, 1, 2], // no pack
  [6, 512, 0, 8], // a warp's registers, rows apart
  [5, 1030, 0, 0], // a block, scalar
  [3, 2304, 8, 0], // a block
  [2, 9000, 0, 0], // beyond a block's registers
  [300, 40, 0, 0], // several parts of a column's sum
] as const

describe.each(floats)('norms in %s', (dtype) => {
  const weightOf = (zeroCentered: boolean): Float => (zeroCentered && dtype === 'bfloat16' ? 'float32' : dtype)

  test.each(shapes)('RMSNorm of %i x %i', async (T, H, offset, gap) => {
    for (const [zeroCentered, residual] of [
      [false, false],
      [false, true],
      [true, true],
    ] as const) {
      const results = await onBoth(async (bench) => {
        const { stream } = bench
        const type = typeOn(bench, dtype)
        const weight = weightOf(zeroCentered)
        const at = { offset, gap }
        const empty = () => bench.tensor([T, H], type, undefined, at)
        const x = operand(bench, 'x', [T, H], dtype, at)
        const r = residual ? operand(bench, 'r', [T, H], dtype, at) : 0
        const w = operand(bench, 'w', [H], weight)
        const [y, sum, dx] = [empty(), residual ? empty() : 0, empty()]
        const rstd = bench.tensor([T], 'float32')
        native.rmsNormForward(stream, y, rstd, sum, x, r, w, 1e-5, zeroCentered)
        const h = residual ? sum : x
        const dy = operand(bench, 'dy', [T, H], dtype, at)
        native.rmsNormBackwardInput(stream, dx, dy, h, w, rstd, r, zeroCentered)
        const dw = drawn(bench, 'dw', [H], 'float32')
        native.rmsNormBackwardWeight(stream, dw, dy, h, rstd)
        return [
          await wideResult(bench, y, [T, H]),
          await result(bench, rstd, [T], 'float32'),
          await wideResult(bench, dx, [T, H]),
          await result(bench, dw, [H], 'float32'),
          ...(residual ? [await wideResult(bench, sum, [T, H])] : []),
        ]
      })
      // The CPU computes float16's cases in float32, without the rounding of what is normalised and of the sum: a rounding more each.
      // A statistic in float32 has four roundings on the GPU, one on the CPU.
      const one = dtype === 'float32' ? 6e-7 : 3 * rounding[dtype]
      const statistic = dtype === 'float16' && residual ? 2 * rounding.float16 : 5e-7
      expectClose(results, [one, statistic, 4 * one, dtype === 'float16' ? 4e-3 : 8e-6, one])
    }
  })

  test.each(shapes)('LayerNorm of %i x %i', async (T, H, offset, gap) => {
    for (const [zeroCentered, biased] of [
      [false, true],
      [true, false],
    ] as const) {
      const results = await onBoth(async (bench) => {
        const { stream } = bench
        const type = typeOn(bench, dtype)
        const weight = weightOf(zeroCentered)
        const at = { offset, gap }
        const x = operand(bench, 'x', [T, H], dtype, { ...at, change: (d) => d.set(d.map((v) => v + 3)) })
        const w = operand(bench, 'w', [H], weight)
        const bias = biased ? operand(bench, 'bias', [H], weight) : 0
        const y = bench.tensor([T, H], type, undefined, at)
        const [mean, rstd] = [bench.tensor([T], 'float32'), bench.tensor([T], 'float32')]
        native.layerNormForward(stream, y, mean, rstd, x, w, bias, 1e-5, zeroCentered)
        const dy = operand(bench, 'dy', [T, H], dtype, at)
        const dx = bench.tensor([T, H], type, undefined, at)
        native.layerNormBackwardInput(stream, dx, dy, x, w, mean, rstd, zeroCentered)
        const dw = drawn(bench, 'dw', [H], 'float32')
        const dBias = biased ? drawn(bench, 'dBias', [H], 'float32') : 0
        native.layerNormBackwardWeight(stream, dw, dBias, dy, x, mean, rstd)
        return [
          await wideResult(bench, y, [T, H]),
          await result(bench, mean, [T], 'float32'),
          await result(bench, rstd, [T], 'float32'),
          await wideResult(bench, dx, [T, H]),
          await result(bench, dw, [H], 'float32'),
          ...(biased ? [await result(bench, dBias, [H], 'float32')] : []),
        ]
      })
      // Sums of thousands of products in another order: 1e-6 of the largest.
      const one = Math.max(rounding[dtype], 2e-6)
      expectClose(results, [2 * one, 1e-6, 2e-6, 2 * one, 1e-5, 1e-5])
    }
  })
})

test('a norm of rows that lie in several dims', async () => {
  const results = await onBoth(async (bench) => {
    const shape = [3, 4, 5, 16]
    const storage = drawn(bench, 'x', [3, 5, 4, 24], 'float32')
    const x = bench.view(storage, shape, [480, 24, 96, 1])
    const w = drawn(bench, 'w', [16], 'float32')
    const y = bench.tensor(shape, 'float32')
    const rstd = bench.tensor([60], 'float32')
    native.rmsNormForward(bench.stream, y, rstd, 0, x, 0, w, 1e-5, false)
    const dw = drawn(bench, 'dw', [16], 'float32')
    native.rmsNormBackwardWeight(bench.stream, dw, y, x, rstd)
    return [await result(bench, y, shape, 'float32'), await result(bench, dw, [16], 'float32')]
  })
  expectClose(results, [4e-7, 2e-6])
})

describe.each(floats)('rotary embedding in %s', (dtype) => {
  // tokens, heads, channels of a head, rotated pairs, elements before the first and between tokens
  const cases = [
    [5, 2, 16, 8, 0, 0],
    [4, 3, 10, 3, 1, 5], // no pack
    [3, 2, 64, 16, 0, 16], // half of the channels
    [1, 40, 128, 64, 8, 0],
    [7, 1, 24, 12, 0, 0],
  ] as const
  test.each(cases)('%i tokens of %i heads of %i', async (T, heads, D, half, offset, gap) => {
    for (const [interleaved, inverse] of [
      [false, false],
      [true, false],
      [false, true],
      [true, true],
    ] as const) {
      const results = await onBoth(async (bench) => {
        const rows = operand(bench, 'x', [T, heads * D], dtype, { offset, gap })
        const x = bench.view(rows, [T, heads, D], [heads * D + gap, D, 1])
        const angles = Array.from({ length: 9 * half }, (_, i) => Math.sin(i) * 3)
        const table = (f: (x: number) => number) => bench.tensor([9, half], 'float32', Float32Array.from(angles, f))
        const positions = whole(
          bench,
          Array.from({ length: T }, (_, t) => (t * 5) % 9),
          T % 2 === 0 ? 'int32' : 'int64',
        )
        native.rope(bench.stream, x, table(Math.cos), table(Math.sin), positions, interleaved, inverse)
        return [await wideResult(bench, x, [T, heads, D])]
      })
      // A channel is a difference of two products, which a GPU fuses: errors are of their size, not of the difference's.
      const [want, got] = results.map((each) => numbers(each[0]!)) as [Float32Array, Float32Array]
      const most = want.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
      expectEach(got, want, 2 * rounding[dtype], rounding[dtype] * most)
    }
  })
})

test('a token whose position has no row becomes NaN, and no other', async () => {
  const results = await onBoth(async (bench) => {
    const onCpu = bench.device.kind === 'cpu'
    const x = drawn(bench, 'x', [3, 2, 8], 'float32')
    const table = drawn(bench, 'table', [4, 4], 'float32')
    native.rope(bench.stream, x, table, table, whole(bench, [1, onCpu ? 0 : 4, 3], 'int32'), false, false)
    return [await result(bench, x, [3, 2, 8], 'float32')]
  })
  const [want, got] = [numbers(results[0][0]!), numbers(results[1][0]!)]
  expect([...got.subarray(16, 32)].every(Number.isNaN)).toBe(true)
  expectEach(got.subarray(0, 16), want.subarray(0, 16), 1e-6, 1e-6)
  expectEach(got.subarray(32), want.subarray(32), 1e-6, 1e-6)
})

describe.each(floats)('activations in %s', (dtype) => {
  const kinds = ['silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', 'quick_gelu', 'sigmoid'].map(
    (name, code) => [name, code] as const,
  )
  test.each(kinds)('%s', async (_, kind) => {
    for (const [T, F, offset] of [
      [5, 64, 0],
      [3, 37, 1],
      [2, 4096, 0],
      [40, 24, 8],
    ] as const) {
      const results = await onBoth(async (bench) => {
        const { stream } = bench
        const type = typeOn(bench, dtype)
        const at = { spread: 4, offset }
        const x = operand(bench, 'x', [T, 2 * F], dtype, at)
        const dy = operand(bench, 'dy', [T, F], dtype, { offset })
        const y = bench.tensor([T, F], type, undefined, { offset })
        native.gatedActivationForward(stream, y, x, kind)
        const dx = bench.tensor([T, 2 * F], type, undefined, { offset })
        native.gatedActivationBackward(stream, dx, dy, x, kind)
        const z = operand(bench, 'z', [T, F], dtype, at)
        const a = bench.tensor([T, F], type, undefined, { offset })
        native.activationForward(stream, a, z, kind)
        native.activationBackward(stream, z, dy, z, kind) // in place
        return [
          await wideResult(bench, y, [T, F]),
          await wideResult(bench, dx, [T, 2 * F]),
          await wideResult(bench, a, [T, F]),
          await wideResult(bench, z, [T, F]),
        ]
      })
      // float16 rounds act(gate) once more than the CPU's float32; exponentials of float32 are within 2 ulp.
      const one = dtype === 'float32' ? 2e-6 : 2 * rounding[dtype]
      expectClose(results, [one, one, one, one])
    }
  })

  test('at the end of a product', async () => {
    // GELU by eights and relu without `pre` are the library's, others kernels behind the product.
    for (const [, kind] of kinds) {
      for (const [T, K, F, kept, biased] of [
        [5, 12, 16, true, true],
        [5, 12, 16, false, false],
        [3, 7, 9, true, false],
        [4, 8, 11, false, true],
      ] as const) {
        const results = await onBoth(async (bench) => {
          const [x, w, b] = [[T, K], [F, K], [F]].map((shape, i) => operand(bench, `${i}`, shape, dtype)) as [
            number,
            number,
            number,
          ]
          const type = typeOn(bench, dtype)
          const y = bench.tensor([T, F], type)
          const pre = kept ? bench.tensor([T, F], type) : 0
          native.matmulActivation(bench.stream, y, pre, x, w, biased ? b : 0, kind)
          return [await wideResult(bench, y, [T, F]), await wideResult(bench, pre || y, [T, F])]
        })
        // One more rounding where the function is of the rounded sum, which the CPU's in float16 is not.
        const one = dtype === 'float32' ? 4e-6 : 3 * rounding[dtype]
        expectClose(results, [one, one])
      }
    }
  })

  test('the largest and smallest numbers, infinities and NaN', async () => {
    const edges = [0, -0, 1e-30, -1e-30, 20, -20, 88, -88, 104, -104, 3e4, -3e4, Infinity, NaN]
    for (const [, kind] of kinds) {
      const results = await onBoth(async (bench) => {
        const x = operand(bench, 'x', [edges.length], dtype, { change: (d) => d.set(edges) })
        const y = bench.tensor([edges.length], typeOn(bench, dtype))
        native.activationForward(bench.stream, y, x, kind)
        return [await wideResult(bench, y, [edges.length])]
      })
      const [want, got] = [numbers(results[0][0]!), numbers(results[1][0]!)]
      for (const [i, value] of want.entries()) {
        const most = dtype === 'float16' ? 65504 : Number.POSITIVE_INFINITY
        if (Number.isNaN(value)) expect(got[i]).toBeNaN()
        else if (dtype !== 'float16' && !Number.isFinite(value)) expect(got[i]).toBe(value)
        else if (Math.abs(value) > most) expect(Math.abs(got[i]!)).toBeGreaterThanOrEqual(most)
        else
          expect(Math.abs(got[i]! - value), `${kind} of ${edges[i]}`).toBeLessThanOrEqual(
            Math.max(2 * rounding[dtype] * Math.abs(value), 6e-8),
          )
      }
    }
  })
})

describe('randomness by place', () => {
  const samples = [7n, 2n ** 40n + 3n, 5n, 0n, 9n]
  test.each(['float32', 'bfloat16'] as const)('dropout has the bits of the CPU, in %s', async (dtype) => {
    for (const [T, C, start, offset, p] of [
      [5, 64, 0, 0, 0.1],
      [3, 37, 5, 0, 0.5],
      [2, 48, 6, 1, 0.9],
      [1, 4096, 2 ** 33, 0, 0.3],
      [2, 16, 0, 0, 0],
    ] as const) {
      await sameBits(async (bench) => {
        const x = bench.tensor([T, C], dtype, randomBytes('x', T * C, dtype), { offset })
        const y = bench.tensor([T, C], dtype, undefined, { offset })
        const rng = bench.tensor([2], 'int64', BigInt64Array.of(1234n, 77n))
        const ids = bench.tensor([T], 'int64', BigInt64Array.from(samples.slice(0, T)))
        const positions = whole(
          bench,
          Array.from({ length: T }, (_, t) => t * 1000),
          'int32',
        )
        native.dropout(bench.stream, y, x, rng, ids, positions, 300, start, p)
        return [await result(bench, y, [T, C], dtype)]
      })
    }
  })

  test.each(['float32', 'bfloat16'] as const)('jitter is that of the CPU, in %s', async (dtype) => {
    for (const [T, C] of [
      [5, 64],
      [3, 37],
    ] as const) {
      const results = await onBoth(async (bench) => {
        const x = bench.tensor([T, C], dtype, randomBytes('x', T * C, dtype))
        const y = bench.tensor([T, C], dtype)
        const rng = bench.tensor([2], 'int64', BigInt64Array.of(1234n, 77n))
        const ids = bench.tensor([T], 'int64', BigInt64Array.from(samples.slice(0, T)))
        native.jitter(bench.stream, y, x, rng, ids, whole(bench, [4, 2, 9, 0, 1].slice(0, T), 'int32'), 2, 0.1)
        return [await result(bench, y, [T, C], dtype)]
      })
      // A multiplication and an addition, contracted or not.
      expectClose(results, [2 * rounding[dtype]])
    }
  })

  test('dropout of float16 drops what float32 drops', async () => {
    const results = await onBoth(async (bench) => {
      const x = operand(bench, 'x', [4, 24], 'float16')
      const rng = bench.tensor([2], 'int64', BigInt64Array.of(1n, 2n))
      const ids = bench.tensor([4], 'int64', BigInt64Array.from(samples.slice(0, 4)))
      native.dropout(bench.stream, x, x, rng, ids, whole(bench, [1, 2, 3, 4], 'int64'), 1, 0, 0.5)
      return [await wideResult(bench, x, [4, 24])]
    })
    expectClose(results, [rounding.float16])
  })

  const blocks: [string, number[], number[], number[], number[]][] = [
    ['a whole matrix', [9, 21], [21, 1], [0, 0], [21, 1]],
    ['a shard of columns', [6, 10], [13, 1], [2, 30], [50, 1]],
    ['every other column', [4, 7], [7, 1], [1, 3], [40, 2]],
    ['transposed', [5, 8], [1, 5], [0, 0], [8, 1]],
    ['one number', [1], [1], [2 ** 35 + 3], [1]],
  ]
  test.each(blocks)('normal numbers of %s', async (_, shape, strides, start, logical) => {
    for (const dtype of floats) {
      const results = await onBoth(async (bench) => {
        const reach = 1 + shape.reduce((sum, size, d) => sum + (size - 1) * strides[d]!, 0)
        const y = bench.view(bench.tensor([reach], typeOn(bench, dtype)), shape, strides)
        native.randomNormal(bench.stream, y, 42, 2 ** 40 + 11, start, logical, 0.5, 2)
        return [await wideResult(bench, y, shape)]
      })
      expect(numbers(results[0][0]!).length).toBe(numel(shape))
      // float64 functions of two libraries, rounded once: at most the last bit differs.
      expectClose(results, [2 * rounding[dtype]])
    }
  })
})
