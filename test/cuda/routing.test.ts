// Routing of tokens to experts on the GPU of gpu.ts against the CPU's: sizes that no warp divides, ties, numbers that are none, groups,
// rows that begin anywhere and rows that are not here.
import { beforeAll, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'
import { type Bench, close, onBoth, randomBytes, sameBits } from './pair.js'

beforeAll(useGpu, gpuSetupTimeout)

const int32 = (bench: Bench, values: readonly number[], shape: readonly number[]) =>
  bench.tensor(shape, 'int32', Int32Array.from(values))
const result = async (bench: Bench, t: number, shape: readonly number[], dtype: 'float32' | 'int32' | 'bfloat16') => ({
  bytes: await bench.read(t, shape, dtype),
  dtype,
})

describe('router', () => {
  // tokens, experts, chosen, groups, chosen groups, elements before the first and between rows
  const shapes = [
    [5, 8, 2, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 0, 0],
    [9, 33, 33, 1, 1, 1, 3],
    [13, 128, 8, 1, 1, 0, 5],
    [6, 257, 40, 1, 1, 0, 0],
    [7, 64, 6, 8, 3, 2, 2],
    [4, 96, 8, 3, 2, 0, 0],
    [0, 8, 2, 1, 1, 0, 0],
  ] as const
  const kinds = [
    { sigmoid: false, normalize: true, bias: false },
    { sigmoid: true, normalize: true, bias: true },
    { sigmoid: false, normalize: false, bias: true },
  ]

  test.each(['float32', 'bfloat16'] as const)('chooses alike, in %s', async (dtype) => {
    for (const [T, E, K, groups, groupTopk, offset, gap] of shapes) {
      for (const { sigmoid, normalize, bias } of kinds) {
        const run = async (bench: Bench) => {
          const logits = bench.tensor([T, E], dtype, randomBytes(`logits ${E}`, T * E, dtype), { offset, gap })
          const added = bias ? bench.tensor([E], 'float32', randomBytes('bias', E, 'float32')) : 0
          const weights = bench.tensor([T, K], 'float32')
          const experts = bench.tensor([T, K], 'int32')
          const scores = bench.tensor([T, E], 'float32')
          native.routerForward(
            bench.stream,
            weights,
            experts,
            scores,
            logits,
            added,
            sigmoid,
            normalize,
            groups,
            groupTopk,
            2.5,
          )
          const dWeights = bench.tensor([T, K], 'float32', randomBytes('dw', T * K, 'float32'))
          const dScores = bench.tensor([T, E], 'float32', randomBytes('ds', T * E, 'float32'))
          const dLogits = bench.tensor([T, E], dtype, undefined, { offset, gap })
          native.routerBackward(
            bench.stream,
            dLogits,
            dWeights,
            bias ? dScores : 0,
            experts,
            scores,
            sigmoid,
            normalize,
            2.5,
          )
          return [
            await result(bench, weights, [T, K], 'float32'),
            await result(bench, scores, [T, E], 'float32'),
            await result(bench, dLogits, [T, E], dtype),
            await result(bench, experts, [T, K], 'int32'),
          ] as const
        }
        const [cpu, gpu] = await onBoth(run)
        expect(gpu[3]?.bytes, `experts of ${T} x ${E}`).toEqual(cpu[3]?.bytes)
        // exp of two libraries, sums in another order; of bfloat16 gradients one rounding.
        await close(dtype === 'float32' ? 2e-6 : 8e-3, async (bench) => (await run(bench)).slice(0, 3))
      }
    }
  })

  test('the first of equal scores; what is no number is the lowest', async () => {
    const [E, K] = [40, 5]
    const nan = Number.NaN
    const rows = [
      Array.from({ length: E }, () => 0.5),
      Array.from({ length: E }, (_, e) => (e % 7 === 3 ? 2 : 1)),
      Array.from({ length: E }, () => nan),
      Array.from({ length: E }, (_, e) => (e < 36 ? nan : e / E)),
    ]
    const [cpu, gpu] = await onBoth(async (bench) => {
      const logits = bench.tensor([4, E], 'float32', Float32Array.from(rows.flat()))
      const [weights, experts] = [bench.tensor([4, K], 'float32'), bench.tensor([4, K], 'int32')]
      const scores = bench.tensor([4, E], 'float32')
      // Sigmoid: a softmax would make the whole row no number.
      native.routerForward(bench.stream, weights, experts, scores, logits, 0, true, false, 1, 1, 1)
      return [await result(bench, experts, [4, K], 'int32')]
    })
    expect(Array.from(new Int32Array(Uint8Array.from(cpu[0]!.bytes).buffer))).toEqual([
      ...[0, 1, 2, 3, 4],
      ...[3, 10, 17, 24, 31],
      ...[0, 1, 2, 3, 4],
      ...[39, 38, 37, 36, 0],
    ])
    expect(gpu).toEqual(cpu)
  })
})

describe('rows of experts', () => {
  test('order and counts', async () => {
    for (const [T, K, E, runs] of [
      [7, 2, 4, 7],
      [300, 4, 9, 3],
      [64, 1, 1, 1],
      [5, 3, 1000, 1],
    ] as const) {
      const chosen = Array.from({ length: T * K }, (_, i) => (i * i * 7 + (i % 5)) % E)
      await sameBits(async (bench) => {
        const experts = int32(bench, chosen, [T, K])
        const [source, place] = [bench.tensor([T * K], 'int32'), bench.tensor([T, K], 'int32')]
        const counts = bench.tensor([runs, E], 'float32')
        native.expertOrder(bench.stream, source, place, experts, E)
        native.expertCounts(bench.stream, counts, experts)
        return [
          await result(bench, source, [T * K], 'int32'),
          await result(bench, place, [T, K], 'int32'),
          await result(bench, counts, [runs, E], 'float32'),
        ]
      })
    }
  })

  test('have places of their own, as many for each expert', async () => {
    const [T, K, E] = [41, 3, 5]
    // Some of no expert.
    const chosen = Array.from({ length: T * K }, (_, i) => ((i * i + (i >> 2)) % (E + 2)) - (i % 17 === 0 ? 2 : 0))
    for (const capacity of [0, 1, 9, 24, T * K]) {
      const [cpu, gpu] = await onBoth(async (bench) => {
        const [source, place] = [bench.tensor([E * capacity], 'int32'), bench.tensor([T, K], 'int32')]
        native.expertSlots(bench.stream, source, place, int32(bench, chosen, [T, K]), E, capacity)
        const placed = await result(bench, place, [T, K], 'int32')
        return capacity === 0 ? [placed] : [placed, await result(bench, source, [E * capacity], 'int32')]
      })
      const places = Array<number>(T * K).fill(E * capacity)
      const sources = Array<number>(E * capacity).fill(-1)
      for (let e = 0; e < E; e++)
        for (const [k, i] of chosen.flatMap((expert, at) => (expert === e ? [at] : [])).entries())
          if (k < capacity) [places[i], sources[e * capacity + k]] = [e * capacity + k, i]
      for (const [placed, source] of [cpu, gpu]) {
        expect([...new Int32Array(placed!.bytes.slice().buffer)]).toEqual(places)
        if (source !== undefined) expect([...new Int32Array(source.bytes.slice().buffer)]).toEqual(sources)
      }
    }
  })

  test('beyond a capacity are dropped, the lightest or the last', async () => {
    const [T, K, E] = [41, 3, 5]
    const chosen = Array.from({ length: T * K }, (_, i) => (i * i + (i >> 2)) % E)
    const weights = Float32Array.from({ length: T * K }, (_, i) => ((i * 7) % 11) / 8) // many are equal
    for (const capacity of [0, 1, 9, 24, T * K])
      for (const byWeight of [true, false]) {
        const [cpu, gpu] = await onBoth(async (bench) => {
          const [experts, capped] = [int32(bench, chosen, [T, K]), bench.tensor([T, K], 'int32')]
          const heavy = byWeight ? bench.tensor([T, K], 'float32', weights) : 0
          native.capExperts(bench.stream, capped, experts, heavy, E, capacity)
          return [await result(bench, capped, [T, K], 'int32')]
        })
        const expected = [...chosen]
        for (let e = 0; e < E; e++) {
          const own = chosen.flatMap((expert, i) => (expert === e ? [i] : []))
          if (byWeight) own.sort((a, b) => weights[b]! - weights[a]! || a - b)
          for (const i of own.slice(capacity)) expected[i] = E
        }
        for (const { bytes } of [cpu[0]!, gpu[0]!]) expect([...new Int32Array(bytes.slice().buffer)]).toEqual(expected)
      }
  })

  // tokens, choices, columns, first row here, rows here, elements before the first and between rows
  const shapes = [
    [7, 2, 37, 0, 14, 0, 0],
    [7, 2, 64, 3, 6, 0, 0],
    [33, 4, 520, 0, 132, 8, 16],
    [5, 1, 1032, 0, 5, 1, 3],
    [4, 3, 8, 12, 0, 0, 0],
  ] as const
  test.each(['float32', 'bfloat16'] as const)('go and come back, in %s', async (dtype) => {
    for (const [T, K, H, first, rows, offset, gap] of shapes) {
      const place = Array.from({ length: T * K }, (_, i) => (i * 13 + 1) % (T * K))
      const source = place.map((_, at) => place.indexOf(at))
      await close(dtype === 'float32' ? 1e-6 : 8e-3, async (bench) => {
        const rowsOf = (name: string, n: number) =>
          bench.tensor([n, H], dtype, randomBytes(name, n * H, dtype), { offset, gap })
        const weights = bench.tensor([T, K], 'float32', randomBytes('w', T * K, 'float32'))
        const [x, sent] = [rowsOf('x', T), rowsOf('sent', rows)]
        const from = int32(bench, source.slice(first, first + rows), [rows])
        const at = int32(bench, place, [T, K])
        const plain = bench.tensor([rows, H], dtype, undefined, { offset, gap })
        const weighed = bench.tensor([rows, H], dtype)
        const [sums, plainSums] = [bench.tensor([T, H], dtype, undefined, { offset, gap }), bench.tensor([T, H], dtype)]
        const dots = bench.tensor([T, K], 'float32')
        native.spreadRows(bench.stream, plain, x, from, 0, K)
        native.spreadRows(bench.stream, weighed, x, from, weights, K)
        native.combineRows(bench.stream, sums, sent, at, weights, first)
        native.combineRows(bench.stream, plainSums, sent, at, 0, first)
        native.combineRowsBackwardWeights(bench.stream, dots, x, sent, at, first)
        return [
          await result(bench, plain, [rows, H], dtype),
          await result(bench, weighed, [rows, H], dtype),
          await result(bench, sums, [T, H], dtype),
          await result(bench, plainSums, [T, H], dtype),
          await result(bench, dots, [T, K], 'float32'),
        ]
      })
    }
  })
})
