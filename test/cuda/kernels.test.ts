// Kernels on the GPU of gpu.ts against the CPU's, where the case list of test/ops has no say: sizes that no pack divides, views
// that begin and run anywhere, every cast, float16.
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { type DType, dtypeBytes } from '../../lib/base/dtype.js'
import { gpuSetupTimeout, realGpu, useGpu } from './gpu.js'
import { type Bench, close, numbers, onBoth, randomBytes, sameBits } from './pair.js'

beforeAll(useGpu, gpuSetupTimeout)

const floats = ['float32', 'bfloat16', 'float16', 'float64', 'float8_e4m3fn', 'float8_e5m2'] as const
const wholes = ['int64', 'int32', 'int16', 'int8', 'uint8', 'bool', 'uint16', 'uint32', 'uint64'] as const

/** Bytes of every kind: with all values of the types of one and two bytes, NaN, infinities and denormals among them. */
function anyBytes(elements: number, dtype: DType): Uint8Array {
  const width = dtypeBytes(dtype)
  return Uint8Array.from({ length: elements * width }, (_, i) => {
    const element = Math.floor(i / width)
    const byte = i % width
    if (dtype === 'bool') return element % 2
    if (byte >= width - 2) return width === 1 ? element : (element >> (8 * (byte - width + 2))) & 255
    return (element * 37 + byte * 101) & 255
  })
}

describe('casts have the bits of the CPU', () => {
  const all = [floats, wholes].flatMap((group) => group.flatMap((to) => group.map((from) => [to, from] as const)))
  test.each(all)('%s from %s', async (to, from) => {
    const n = dtypeBytes(from) === 1 ? 256 : 2049
    const step = dtypeBytes(from) === 1 ? 1 : 31 // through all exponents
    const width = dtypeBytes(from)
    const every = anyBytes(n * step, from)
    const data = Uint8Array.from(
      { length: n * width },
      (_, i) => every[Math.floor(i / width) * step * width + (i % width)]!,
    )
    await sameBits(async (bench) => {
      const x = bench.tensor([n], from, data)
      const y = bench.tensor([n], to)
      native.copy(bench.stream, y, x)
      return [{ bytes: await bench.read(y, [n], to), dtype: to }]
    })
  })
})

describe('copies', () => {
  const shapes: [string, number[], number[]][] = [
    ['one element', [1], [1]],
    ['a run', [1001], [1]],
    ['rows with gaps', [7, 40], [56, 1]],
    ['every third', [50], [3]],
    ['transposed', [70, 45], [1, 70]],
    ['transposed inside', [3, 33, 20], [700, 1, 33]],
    ['turned round', [5, 4, 3, 2], [1, 5, 20, 60]],
    ['one row for all', [9, 16], [0, 1]],
    ['one column for all', [9, 17], [1, 0]],
    ['six dims', [2, 3, 2, 2, 3, 8], [288, 96, 8, 48, 16, 1]],
  ]
  const pairs: [DType, DType][] = [
    ['float32', 'float32'],
    ['bfloat16', 'float32'],
    ['float32', 'bfloat16'],
    ['float16', 'float16'],
    ['int8', 'int8'],
    ['int64', 'int64'],
    ['float16', 'bfloat16'],
  ]
  for (const [name, shape, strides] of shapes) {
    test.each(pairs)(`${name}: %s from %s`, async (to, from) => {
      const reach = 1 + shape.reduce((sum, size, d) => sum + (size - 1) * strides[d]!, 0)
      for (const offset of [0, 1]) {
        await sameBits(async (bench) => {
          const storage = bench.tensor([reach + 1], from, anyBytes(reach + 1, from))
          const x = bench.view(storage, shape, strides, offset)
          const y = bench.tensor(shape, to, undefined, { offset, gap: offset })
          native.copy(bench.stream, y, x)
          return [{ bytes: await bench.read(y, shape, to), dtype: to }]
        })
      }
    })
  }
})

describe('fill', () => {
  test.each([...floats, ...wholes])('%s', async (dtype) => {
    for (const [offset, gap, value] of [
      [0, 0, 0],
      [0, 0, 3.3],
      [1, 0, 1],
      [3, 5, 2],
    ] as const) {
      await sameBits(async (bench) => {
        const storage = bench.tensor([400], dtype, anyBytes(400, dtype))
        const y = bench.view(storage, [7, 33], [33 + gap, 1], offset)
        native.fill(bench.stream, y, value)
        return [{ bytes: await bench.read(storage, [400], dtype), dtype }] // what lies between stays
      })
    }
  })
})

const sizes = [1, 7, 8, 9, 255, 4099, 70001]

/**
 * Sums of products of numbers about 1 in float32, and one rounding to the result's dtype. With a bias cuBLASLt rounds some products of
 * unaligned matrices before it adds: the result is one place off then.
 */
const productBound = (dtype: 'float32' | 'bfloat16', biased: boolean) =>
  dtype === 'float32' ? 1e-6 : biased && realGpu ? 2 ** -7 : 4e-3

describe.each(['float32', 'bfloat16'] as const)('elementwise in %s', (dtype) => {
  test.each(sizes)('%i elements', async (n) => {
    for (const offset of n > 10000 ? [0] : [0, 1, 4]) {
      await sameBits(async (bench) => {
        const at = { offset }
        const a = bench.tensor([n], dtype, randomBytes('a', n, dtype), at)
        const b = bench.tensor([n], dtype, randomBytes('b', n, dtype), at)
        const sum = bench.tensor([n], dtype, undefined, at)
        native.add(bench.stream, sum, a, b)
        native.mul(bench.stream, b, a, b) // in place
        const acc = bench.tensor([n], 'float32', randomBytes('acc', n, 'float32'), at)
        native.accumulate(bench.stream, acc, a)
        native.scale(bench.stream, a, bench.tensor([1], 'float32', Float32Array.of(0.3)))
        const read = async (t: number, d: DType) => ({ bytes: await bench.read(t, [n], d), dtype: d })
        return [await read(sum, dtype), await read(b, dtype), await read(acc, 'float32'), await read(a, dtype)]
      })
    }
  })

  test.each([
    [1, 1],
    [3, 7],
    [130, 8],
    [5, 1000],
    [2, 4104],
    [300, 24],
  ])('addBias %i x %i', async (rows, columns) => {
    for (const offset of [0, 1]) {
      await sameBits(async (bench) => {
        const x = bench.tensor([rows, columns], dtype, randomBytes('x', rows * columns, dtype), { offset })
        const bias = bench.tensor([columns], dtype, randomBytes('bias', columns, dtype), { offset })
        native.addBias(bench.stream, x, x, bias)
        return [{ bytes: await bench.read(x, [rows, columns], dtype), dtype }]
      })
    }
  })

  // The CPU adds up in another order: float64 inside of sum, float32 inside of sumRows.
  test.each([0, 1, 16384, 16385, 50003])('sum of %i', async (n) => {
    for (const offset of [0, 3]) {
      await close(1e-7, async (bench) => {
        const x = bench.tensor([n], dtype, randomBytes('x', n, dtype), { offset })
        const y = bench.tensor([1], 'float32')
        native.sum(bench.stream, y, x)
        return [{ bytes: await bench.read(y, [1], 'float32'), dtype: 'float32' }]
      })
    }
  })

  test.each([
    [1, 1],
    [7, 33],
    [128, 64],
    [129, 520],
    [1000, 31],
    [40000, 3],
  ])('sumRows %i x %i', async (rows, columns) => {
    for (const gap of [0, 1]) {
      await close(2e-6, async (bench) => {
        const x = bench.tensor([rows, columns], dtype, randomBytes('x', rows * columns, dtype), { gap })
        const acc = bench.tensor([columns], 'float32', randomBytes('acc', columns, 'float32'))
        native.sumRows(bench.stream, acc, x)
        return [{ bytes: await bench.read(acc, [columns], 'float32'), dtype: 'float32' }]
      })
    }
  })

  test.each([
    [1, 1, 1],
    [7, 13, 5],
    [33, 16, 40],
    [2, 3, 0],
  ])('matmul %i x %i x %i', async (m, n, k) => {
    for (const [transA, transB, accumulate, biased] of [
      [false, false, false, false],
      [false, true, false, true],
      [true, false, true, false],
      [true, true, false, false],
    ] as const) {
      await close(productBound(dtype, biased), async (bench) => {
        const a = bench.tensor(transA ? [k, m] : [m, k], dtype, randomBytes('a', m * k, dtype), { gap: 3 })
        const b = bench.tensor(transB ? [n, k] : [k, n], dtype, randomBytes('b', n * k, dtype))
        const yDtype = accumulate ? 'float32' : dtype
        const y = bench.tensor([m, n], yDtype, accumulate ? randomBytes('y', m * n, 'float32') : undefined, { gap: 1 })
        const bias = biased ? bench.tensor([n], dtype, randomBytes('bias', n, dtype)) : 0
        native.matmul(bench.stream, y, a, b, bias, transA, transB, accumulate)
        return [{ bytes: await bench.read(y, [m, n], yDtype), dtype: yDtype }]
      })
    }
  })

  test.each([false, true])('rows of a matmul apart, transposed: %s', async (transB) => {
    const [m, n, k] = [20, 13, 5]
    await close(productBound(dtype, true), async (bench) => {
      const a = bench.tensor([m, k], dtype, randomBytes('a', m * k, dtype))
      const b = bench.tensor(transB ? [n, k] : [k, n], dtype, randomBytes('b', n * k, dtype))
      const bias = bench.tensor([n], dtype, randomBytes('bias', n, dtype))
      const [whole, parts] = [bench.tensor([m, n], dtype), bench.tensor([m, n], dtype)]
      native.matmul(bench.stream, whole, a, b, bias, false, transB, false)
      for (const [first, count] of [
        [0, 3],
        [3, 17],
      ] as const) {
        const rows = (of: number, width: number) => native.view(of, [count, width], [width, 1], first * width)
        const [y, x] = [rows(parts, n), rows(a, k)]
        native.matmulRows(bench.stream, y, x, b, bias, transB, m)
        for (const view of [y, x]) native.free(view)
      }
      const [together, apart] = [await bench.read(whole, [m, n], dtype), await bench.read(parts, [m, n], dtype)]
      expect(apart).toEqual(together)
      return [{ bytes: apart, dtype }]
    })
  })
})

test('float16 computes in float32 and rounds once', async () => {
  const n = 1003
  const half = async (bench: Bench, t: number) => {
    const wide = bench.tensor([n], 'float32')
    native.copy(bench.stream, wide, t)
    return { bytes: await bench.read(wide, [n], 'float32'), dtype: 'float32' as const }
  }
  const narrow = (bench: Bench, name: string) => {
    const wide = bench.tensor([n], 'float32', randomBytes(name, n, 'float32'))
    const t = bench.tensor([n], 'float16')
    native.copy(bench.stream, t, wide)
    return t
  }
  // The CPU has no float16 arithmetic: it computes in float32 and casts.
  const [[cpu], [gpu]] = await onBoth(async (bench) => {
    const [a, b] = [narrow(bench, 'a'), narrow(bench, 'b')]
    const y = bench.tensor([n], 'float16')
    if (bench.device.kind === 'cuda') native.add(bench.stream, y, a, b)
    else {
      const [wa, wb] = [bench.tensor([n], 'float32'), bench.tensor([n], 'float32')]
      native.copy(bench.stream, wa, a)
      native.copy(bench.stream, wb, b)
      native.add(bench.stream, wa, wa, wb)
      native.copy(bench.stream, y, wa)
    }
    return [await half(bench, y)]
  })
  expect(numbers(gpu!)).toEqual(numbers(cpu!))
})
