// The optimizer's ops on the GPU of gpu.ts against the CPU's.
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import type { DType } from '../../lib/base/dtype.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'
import { type Bench, numbers, onBoth, type Results, randomBytes, sameBits } from './pair.js'

beforeAll(useGpu, gpuSetupTimeout)

async function result(bench: Bench, tensor: number, n: number, dtype: DType): Promise<Results[number]> {
  return { bytes: await bench.read(tensor, [n], dtype), dtype }
}

describe.each(['float32', 'bfloat16'] as const)('sum of squares in %s', (dtype) => {
  test.each([0, 1, 3, 4, 16384, 16389, 70001])('of %i', async (n) => {
    for (const offset of [0, 1]) {
      const [[cpu], [gpu]] = await onBoth(async (bench) => {
        const acc = bench.tensor([1], 'float64', Float64Array.of(0.5))
        const x = bench.tensor([n], dtype, randomBytes('x', n, dtype), { offset })
        native.sumSquares(bench.stream, acc, x)
        return [await result(bench, acc, 1, 'float64')]
      })
      const [want, got] = [cpu!, gpu!].map(({ bytes }) => new Float64Array(Uint8Array.from(bytes).buffer)[0]!)
      expect(Math.abs(got! / want! - 1)).toBeLessThan(1e-13) // two orders of some hundred roundings of 1e-16
    }
  })
})

test.each([0, 4, 1e-30, Number.NaN, Number.POSITIVE_INFINITY])('clipping factor for a sum of %d', async (sum) => {
  for (const maxNorm of [0, 0.5, 2, 1e9]) {
    await sameBits(async (bench) => {
      const [norm, factor] = [bench.tensor([1], 'float32'), bench.tensor([1], 'float32')]
      native.clipFactor(bench.stream, norm, factor, bench.tensor([1], 'float64', Float64Array.of(sum)), maxNorm)
      const read = async (t: number) => ({
        bytes: Uint8Array.of(...plain(await bench.read(t, [1], 'float32'))),
        dtype: 'float32' as const,
      })
      return [await read(norm), await read(factor)]
    })
  }
})

/** The bytes of one float32, every NaN as the same one. */
function plain(bytes: Uint8Array): Uint8Array {
  return new Uint8Array(Float32Array.from(new Float32Array(Uint8Array.from(bytes).buffer), (x) => x).buffer)
}

describe('AdamW', () => {
  const [beta1, beta2, eps, decay] = [0.9, 0.95, 1e-8, 0.1]

  /** param, m, v and the model's copy after one update; `change` sets single elements of the state before. */
  async function update(n: number, model: DType | null, steps: number, offset = 0, change = (_: Float32Array[]) => {}) {
    const state = ['param', 'm', 'v', 'grad'].map((name) => randomBytes(name, n, 'float32') as Float32Array)
    state[2] = state[2]!.map((x) => x * x * 1e-4)
    change(state)
    return onBoth(async (bench) => {
      const [param, m, v, grad] = state.map((data) => bench.tensor([n], 'float32', data, { offset })) as [
        number,
        number,
        number,
        number,
      ]
      const copy = model === null ? 0 : bench.tensor([n], model, undefined, { offset })
      const slots = bench.tensor([4], 'float32', Float32Array.of(1e-3, 1 - beta1 ** steps, 1 - beta2 ** steps, 0.7))
      native.adamw(bench.stream, param, m, v, copy, grad, slots, beta1, beta2, eps, decay)
      const results = [
        await result(bench, param, n, 'float32'),
        await result(bench, m, n, 'float32'),
        await result(bench, v, n, 'float32'),
      ]
      if (model === null) return results
      const want = bench.tensor([n], model)
      native.copy(bench.stream, want, param)
      return [...results, await result(bench, copy, n, model), await result(bench, want, n, model)]
    })
  }

  const models = [null, 'bfloat16', 'float16'] as const
  const runs = [0, 1, 3, 4, 1027, 7001].flatMap((n) => models.map((model) => [n, model] as const))
  test.each([...runs, [25003, 'bfloat16'] as const])('%i elements, model in %s', async (n, model) => {
    const cases = [
      [1, 0],
      [2, 1],
      [5000, 4],
    ] as const
    for (const [steps, offset] of n > 10000 ? cases.slice(0, 1) : cases) {
      const [cpu, gpu] = await update(n, model, steps, offset)
      expect(gpu[1]!.bytes).toEqual(cpu[1]!.bytes)
      expect(gpu[2]!.bytes).toEqual(cpu[2]!.bytes)
      if (model !== null) expect(gpu[3]!.bytes).toEqual(gpu[4]!.bytes)
      const bits = (r: Results[number]) => new Int32Array(Uint8Array.from(r.bytes).buffer)
      const [want, got] = [bits(cpu[0]!), bits(gpu[0]!)]
      let differ = 0
      want.forEach((value, i) => {
        if (value !== got[i]) differ++
        if (Math.abs(value - got[i]!) > 1) expect.fail(`element ${i}: more than a unit in the last place away`)
      })
      // Both are the exact value rounded about once; a reciprocal of 12 to 14 bits on the CPU tips some in a hundred thousand.
      expect(differ).toBeLessThanOrEqual(n / 1000)
    }
  })

  test('zeros, infinities and NaN give what they give on the CPU', async () => {
    const [cpu, gpu] = await update(16, null, 3, 0, ([param, m, v, grad]) => {
      ;[m![0], v![0], grad![0]] = [0, 0, 0]
      grad![1] = Number.NaN
      grad![2] = Number.POSITIVE_INFINITY
      v![3] = Number.POSITIVE_INFINITY
      param![4] = Number.NaN
      ;[m![5], v![5], grad![5]] = [1e-40, 1e-42, 1e-30]
      grad![6] = 1e30
    })
    for (const k of [0, 1, 2]) expect(numbers(gpu[k]!)).toEqual(numbers(cpu[k]!))
  })
})
