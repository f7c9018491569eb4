// Embedding, cross entropy and argmax on the GPU of gpu.ts against the CPU's: shards and padding of the vocabulary, ids outside
// of it, long rows, views that begin anywhere.
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'
import {
  type Bench,
  type Drawn,
  drawn,
  expectEach,
  numbers,
  onBoth,
  randomBytes,
  result,
  sameBits,
  whole,
} from './pair.js'

beforeAll(useGpu, gpuSetupTimeout)

describe('embedding', () => {
  // rows of the shard, columns, tokens, elements before the first and between rows
  const shapes = [
    [11, 37, 60, 0, 0],
    [7, 64, 33, 0, 0],
    [7, 64, 33, 8, 16],
    [40, 520, 9, 1, 0],
    [5, 8, 1, 0, 3],
    [3, 4112, 4, 0, 0],
    [3, 1, 5, 0, 0],
    [4, 16, 0, 0, 0],
  ] as const

  test.each(['float32', 'bfloat16', 'float16'] as const)('forward in %s', async (dtype) => {
    for (const [rows, columns, tokens, offset, gap] of shapes) {
      for (const idType of ['int32', 'int64'] as const) {
        // Before the shard, behind it, far away.
        const ids = Array.from({ length: tokens }, (_, t) =>
          t % 7 === 3 ? -2147483648 * (t % 2) : 98 + (t % (rows + 4)),
        )
        await sameBits(async (bench) => {
          // The CPU has no float16 op, but rows are only moved: bfloat16 is as good.
          const type = dtype === 'float16' && bench.device.kind === 'cpu' ? 'bfloat16' : dtype
          const bits = randomBytes('w', rows * columns, dtype === 'float32' ? 'float32' : 'bfloat16')
          const w = bench.tensor([rows, columns], type, bits, { offset, gap })
          const y = bench.tensor([tokens, columns], type, undefined, { offset, gap })
          native.embeddingForward(bench.stream, y, w, whole(bench, ids, idType), 100)
          return [await result(bench, y, [tokens, columns], type)]
        })
      }
    }
  })

  const gradients = [
    ...shapes,
    [11, 37, 500, 0, 0], // runs of many tokens
    [1, 24, 700, 0, 0], // one row for all
    [300, 8, 2500, 0, 0], // two tiles of the sort
    [70001, 4, 300, 0, 0], // three digits
  ] as const
  test.each(['float32', 'bfloat16'] as const)('the gradient adds up in token order, in %s', async (dtype) => {
    for (const [rows, columns, tokens, offset, gap] of gradients) {
      const ids = Array.from({ length: tokens }, (_, t) => 99 + ((t * t * 31 + t) % (rows + 2)))
      await sameBits(async (bench) => {
        const dw = drawn(bench, 'dw', [rows, columns], 'float32', { offset, gap })
        const dy = bench.tensor([tokens, columns], dtype, randomBytes('dy', tokens * columns, dtype), { offset, gap })
        native.embeddingBackward(bench.stream, dw, dy, whole(bench, ids, tokens % 2 === 0 ? 'int32' : 'int64'), 100)
        return [await result(bench, dw, [rows, columns], 'float32')]
      })
    }
  })

  test('the gradient takes float16', async () => {
    const [[cpu], [gpu]] = await onBoth(async (bench) => {
      const dw = drawn(bench, 'dw', [5, 40], 'float32')
      const half = drawn(bench, 'dy', [90, 40], 'float16')
      const wide = bench.tensor([90, 40], 'float32')
      native.copy(bench.stream, wide, half)
      const ids = Array.from({ length: 90 }, (_, t) => (t * 7) % 5)
      native.embeddingBackward(
        bench.stream,
        dw,
        bench.device.kind === 'cpu' ? wide : half,
        whole(bench, ids, 'int32'),
        0,
      )
      return [await result(bench, dw, [5, 40], 'float32')]
    })
    expect(numbers(gpu!)).toEqual(numbers(cpu!))
  })
})

/** tokens, columns of the shard, its first column, size of the vocabulary, elements before the first logit and between rows. */
const logitShapes = [
  [1, 1, 0, 1, 0, 0],
  [5, 31, 0, 31, 0, 0],
  [7, 40, 80, 117, 0, 0],
  [7, 40, 80, 117, 1, 0],
  [9, 44, 3, 200, 8, 4],
  [3, 264, 512, 600, 0, 8],
  [4, 24, 100, 100, 0, 0], // padding alone
  [2, 33001, 0, 33001, 0, 0],
  [2, 70008, 1000, 71001, 0, 0],
  [0, 16, 0, 16, 0, 0],
] as const

function labelsOf(tokens: number, columns: number, start: number, size: number): number[] {
  return Array.from({ length: tokens }, (_, t) =>
    t % 4 === 1 ? -100 : [start, size - 1, start + columns, 5][t % 4]! + t,
  )
}

describe.each(['float32', 'bfloat16', 'float16'] as const)('cross entropy in %s', (dtype) => {
  /** The CPU has no float16 op: it gets the same logits in float32. */
  const typeOn = (bench: Bench) => (dtype === 'float16' && bench.device.kind === 'cpu' ? 'float32' : dtype)
  function logitsOn(bench: Bench, shape: readonly number[], at: Drawn): number {
    const x = drawn(bench, 'logits', shape, dtype, { spread: 4, ...at })
    if (typeOn(bench) === dtype) return x
    const wide = bench.tensor(shape, 'float32', undefined, at)
    native.copy(bench.stream, wide, x)
    return wide
  }

  test.each(logitShapes)('statistics of %i x %i from %i of %i', async (T, V, start, size, offset, gap) => {
    const [[cpu], [gpu]] = await onBoth(async (bench) => {
      const stats = bench.tensor([3, T], 'float32')
      const labels = whole(bench, labelsOf(T, V, start, size), T % 2 === 0 ? 'int32' : 'int64')
      native.crossEntropyStats(bench.stream, stats, logitsOn(bench, [T, V], { offset, gap }), labels, start, size)
      return [await result(bench, stats, [3, T], 'float32')]
    })
    const [want, got] = [numbers(cpu!), numbers(gpu!)]
    expect(got.subarray(0, T)).toEqual(want.subarray(0, T)) // the maximum
    expect(got.subarray(2 * T)).toEqual(want.subarray(2 * T)) // the label's logit
    // Up to some hundred terms in one float32 sum, each rounded to 6e-8.
    expectEach(got.subarray(T, 2 * T), want.subarray(T, 2 * T), 1e-6)
  })

  test.each(logitShapes)('gradient of %i x %i from %i of %i', async (T, V, start, size, offset, gap) => {
    for (const [inPlace, perToken] of [
      [true, false],
      [false, true],
    ]) {
      const [[cpu], [gpu]] = await onBoth(async (bench) => {
        const x = logitsOn(bench, [T, V], { offset, gap })
        const y = inPlace ? x : bench.tensor([T, V], typeOn(bench), undefined, { offset, gap: gap + 8 })
        const labels = whole(bench, labelsOf(T, V, start, size), 'int32')
        const lse = drawn(bench, 'lse', [T], 'float32', { change: (d) => d.set(d.map((v) => 14 + v)) })
        const dLoss = perToken
          ? drawn(bench, 'dLoss', [T], 'float32', { change: (d) => d.fill(0, 2, 3) }) // token 2: no gradient
          : bench.tensor([1], 'float32', Float32Array.of(0.3))
        native.crossEntropyBackward(bench.stream, y, x, lse, labels, dLoss, start, size)
        const wide = bench.tensor([T, V], 'float32')
        native.copy(bench.stream, wide, y)
        return [await result(bench, wide, [T, V], 'float32')]
      })
      const [want, got] = [numbers(cpu!), numbers(gpu!)]
      // An exponential of float32, or one rounding to 8 or 11 bits, float16's denormals in steps of 2^-24.
      const relative = { float32: 4e-6, bfloat16: 2 ** -7, float16: 2 ** -10 }[dtype]
      expectEach(got, want, relative, dtype === 'float16' ? 2 ** -24 : 0)
    }
  })

  test('NaN and infinite logits give what they give on the CPU', async () => {
    const [T, V] = [6, 300]
    const change = (d: Float32Array) => {
      d[17] = Number.NaN
      d.fill(Number.NEGATIVE_INFINITY, V, 2 * V)
      d.fill(Number.NEGATIVE_INFINITY, 2 * V, 3 * V - 1)
      d[3 * V + 5] = Number.POSITIVE_INFINITY
      d.fill(Number.NEGATIVE_INFINITY, 4 * V, 4 * V + 256)
    }
    const [[cpu], [gpu]] = await onBoth(async (bench) => {
      const stats = bench.tensor([3, T], 'float32')
      const labels = whole(bench, [0, 1, 2, 3, 4, 5], 'int32')
      native.crossEntropyStats(bench.stream, stats, logitsOn(bench, [T, V], { change }), labels, 0, V)
      return [await result(bench, stats, [3, T], 'float32')]
    })
    expectEach(numbers(gpu!).subarray(T), numbers(cpu!).subarray(T), 1e-6)
  })
})

test('cross entropy combines shards, with padding alone, NaN, ignored labels', async () => {
  const [P, T] = [3, 300]
  const stats = randomBytes('stats', P * 3 * T, 'float32') as Float32Array
  for (let p = 0; p < P; p++) {
    for (let t = 0; t < T; t++) {
      stats[(p * 3 + 1) * T + t] = 1 + Math.abs(stats[(p * 3 + 1) * T + t]!)
      if (p !== 2) continue
      stats[p * 3 * T + t] = Number.NEGATIVE_INFINITY
      stats[(p * 3 + 1) * T + t] = 0
    }
  }
  stats[T + 7] = Number.NaN
  const [cpu, gpu] = await onBoth(async (bench) => {
    const [lse, loss] = [bench.tensor([T], 'float32'), bench.tensor([T], 'float32')]
    const labels = whole(bench, labelsOf(T, 50, 0, 50), 'int64')
    native.crossEntropyCombine(bench.stream, lse, loss, bench.tensor([P, 3, T], 'float32', stats), labels)
    return [await result(bench, lse, [T], 'float32'), await result(bench, loss, [T], 'float32')]
  })
  for (const k of [0, 1]) expectEach(numbers(gpu[k]!), numbers(cpu[k]!), 2 ** -23) // computed in float64
})

test("a token's statistics do not depend on the tokens beside it", async () => {
  const V = 40000
  const [, [all, one]] = await onBoth(async (bench) => {
    const logits = drawn(bench, 'logits', [5, V], 'bfloat16', { spread: 3 })
    const [many, single] = [bench.tensor([3, 5], 'float32'), bench.tensor([3, 1], 'float32')]
    native.crossEntropyStats(bench.stream, many, logits, whole(bench, [1, 2, 3, 4, 5], 'int32'), 0, V)
    const row = bench.view(logits, [1, V], [V, 1], 3 * V)
    native.crossEntropyStats(bench.stream, single, row, whole(bench, [4], 'int32'), 0, V)
    return [await result(bench, many, [3, 5], 'float32'), await result(bench, single, [3, 1], 'float32')]
  })
  expect(Array.from(numbers(one!))).toEqual([3, 8, 13].map((i) => numbers(all!)[i]))
})

describe.each(['float32', 'bfloat16'] as const)('argmax in %s', (dtype) => {
  test.each(logitShapes)('of %i x %i from %i of %i', async (T, V, start, size, offset, gap) => {
    await sameBits(async (bench) => {
      const [index, value] = [bench.tensor([T], 'int64'), bench.tensor([T], 'float32')]
      // In bfloat16 the largest come several times.
      native.argmax(bench.stream, index, value, drawn(bench, 'logits', [T, V], dtype, { offset, gap }), start, size)
      return [await result(bench, index, [T], 'int64'), await result(bench, value, [T], 'float32')]
    })
  })

  test('the first of equals, a NaN above all, padding left out', async () => {
    const V = 20000
    const change = (d: Float32Array) => {
      d[15001] = d[777] = d[778] = 50 // equal within a pack and far away
      d[V + 9000] = d[V + 9001] = d[V + 19000] = Number.NaN
      d[V + 3] = Number.POSITIVE_INFINITY
      d[2 * V + V - 1] = 60 // padding
      d[2 * V + 5] = 50
      d.fill(Number.NEGATIVE_INFINITY, 3 * V, 4 * V)
      d.fill(-1, 4 * V, 5 * V)
      d[4 * V + 8192] = -0
      d[4 * V + 12000] = 0
    }
    for (const offset of [0, 1]) {
      const [, [index, value]] = await onBoth(async (bench) => {
        const [i, v] = [bench.tensor([5], 'int64'), bench.tensor([5], 'float32')]
        native.argmax(bench.stream, i, v, drawn(bench, 'rows', [5, V], dtype, { offset, change }), 1000, 1000 + V - 1)
        return [await result(bench, i, [5], 'int64'), await result(bench, v, [5], 'float32')]
      })
      const places = Array.from(new BigInt64Array(Uint8Array.from(index!.bytes).buffer), Number)
      expect(places).toEqual([1777, 10000, 1005, 1000, 9192])
      expect(Array.from(numbers(value!))).toEqual([50, Number.NaN, 50, Number.NEGATIVE_INFINITY, -0])
    }
  })
})
