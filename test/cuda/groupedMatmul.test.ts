// Products of a mixture's experts on the GPU of gpu.ts against the CPU's: in one launch, or a product each on streams beside each
// other; experts without rows, one expert alone, rows that begin anywhere.
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { Device } from '../../lib/tensor/device.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'
import { type Bench, close, randomBytes } from './pair.js'

beforeAll(useGpu, gpuSetupTimeout)
afterEach(() => native.setGroupedMatmulEngine(Device.open('cuda').index, 'auto'))

const cases = [
  { counts: [5, 0, 17, 1, 0, 40], inner: 24, columns: 16, offset: 0, gap: 0 },
  { counts: [0, 3], inner: 9, columns: 7, offset: 1, gap: 3 },
  { counts: [8, 8, 8, 8, 8], inner: 32, columns: 1, offset: 8, gap: 8 },
  { counts: [0, 0], inner: 8, columns: 8, offset: 0, gap: 0 },
]
const dtypes = ['float32', 'bfloat16'] as const
// Two orders of a sum of float32; in bfloat16 the result's last bit.
const bound = { float32: 2e-6, bfloat16: 2 ** -8 }

describe.each(['auto', 'one_launch', 'streams'])('experts by %s', (engine) => {
  const useEngine = (bench: Bench) => {
    if (bench.device.kind === 'cuda') native.setGroupedMatmulEngine(bench.device.index, engine)
  }

  test.each(dtypes)('rows times matrices, in %s', async (dtype) => {
    for (const { counts, inner, columns, offset, gap } of cases) {
      const rows = counts.reduce((sum, n) => sum + n, 0)
      for (const transB of [true, false]) {
        await close(bound[dtype], async (bench) => {
          useEngine(bench)
          const x = bench.tensor([rows, inner], dtype, randomBytes('x', rows * inner, dtype), { offset, gap })
          const shape = transB ? [columns, inner] : [inner, columns]
          const w = counts.map((_, e) => bench.tensor(shape, dtype, randomBytes(`w ${e}`, inner * columns, dtype)))
          const y = bench.tensor([rows, columns], dtype, undefined, { offset, gap })
          native.groupedMatmul(bench.stream, y, x, w, counts, transB)
          return [{ bytes: await bench.read(y, [rows, columns], dtype), dtype }]
        })
      }
    }
  })

  test.each(dtypes)('gradients of the matrices are added in float32, in %s', async (dtype) => {
    for (const { counts, inner, columns, offset, gap } of cases) {
      const rows = counts.reduce((sum, n) => sum + n, 0)
      await close(2e-6, async (bench) => {
        useEngine(bench)
        const x = bench.tensor([rows, inner], dtype, randomBytes('x', rows * inner, dtype), { offset, gap })
        const dy = bench.tensor([rows, columns], dtype, randomBytes('dy', rows * columns, dtype), { offset, gap })
        const before = randomBytes('before', inner * columns, 'float32')
        const sums = counts.map(() => bench.tensor([columns, inner], 'float32', before))
        native.groupedMatmulWeights(bench.stream, sums, dy, x, counts)
        return Promise.all(
          sums.map(async (sum) => ({
            bytes: await bench.read(sum, [columns, inner], 'float32'),
            dtype: 'float32' as const,
          })),
        )
      })
    }
  })
})

test('an engine that is none is refused', () => {
  expect(() => native.setGroupedMatmulEngine(Device.open('cuda').index, 'cutlass')).toThrow(
    /auto, one_launch or streams/,
  )
})
