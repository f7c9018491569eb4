// Noise on what a router reads: the numbers of Philox by place, the same back as forward.
import { expect, test } from 'vitest'
import { philox } from '../../../lib/inference/philox.js'
import { jitter } from '../../../lib/ops/routerLosses.js'
import { Tape } from '../../../lib/ops/tape.js'
import { Ctx } from '../../../lib/tensor/ctx.js'
import { Tensor } from '../../../lib/tensor/tensor.js'

const [T, C, eps, site] = [4, 7, 0.25, 3]
const [seed, step] = [1234n, 9n]
const samples = [7n, 2n ** 33n + 1n, 7n, 0n]
const positions = [0, 5, 1, 70000]

/** The key of native/philox.h: SplitMix64's finaliser over seed, use and step. */
function key(): [number, number] {
  const word = (z: bigint) => z & 0xffffffffffffffffn
  const mix = (value: bigint) => {
    let z = word(value)
    z = word((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n)
    z = word((z ^ (z >> 27n)) * 0x94d049bb133111ebn)
    return z ^ (z >> 31n)
  }
  const k = mix(mix(seed + 0xdaa66d2c7ddf743fn) + step)
  return [Number(k & 0xffffffffn), Number(k >> 32n)]
}

function noise(t: number, c: number): number {
  const id = samples[t] as bigint
  const high = (site | (Number(id >> 32n) << 16)) >>> 0
  const draws = philox([Math.floor(c / 4), positions[t] as number, Number(id & 0xffffffffn), high], key())
  return 1 - eps + 2 * eps * ((draws[c % 4] as number) / 2 ** 32)
}

test('numbers are those of their places, and the gradient has the same', async () => {
  const root = Ctx.create({ device: 'cpu', tape: new Tape() })
  const ctx = root.with({
    rng: {
      seed: Number(seed),
      step: Number(step),
      rngSlot: Tensor.fromHost(root, BigInt64Array.of(seed, step), [2], 'int64'),
    },
    batch: {
      sampleIds: Tensor.fromHost(root, BigInt64Array.from(samples), [T], 'int64'),
      positions: Tensor.fromHost(root, Int32Array.from(positions), [T], 'int32'),
    },
  })
  const values = Float32Array.from({ length: T * C }, (_, i) => 1 + i / 8)
  const x = Tensor.fromHost(ctx, values, [T, C], 'float32')
  ;(ctx.tape as Tape).watch(x)
  const y = jitter(ctx, { x, eps, site })
  const gradients = await (ctx.tape as Tape).backward(ctx, [y], [Tensor.full(ctx, [T, C], 'float32', 1)])
  const [got, back] = [await y.toFloat32Array(), await (gradients.get(x) as Tensor).toFloat32Array()]
  for (let i = 0; i < T * C; i++) {
    const n = noise(Math.floor(i / C), i % C)
    expect(back[i]).toBeCloseTo(n, 6)
    expect(got[i]).toBeCloseTo(n * (values[i] as number), 5)
  }
  expect(new Set(back).size).toBe(T * C)
  root.scope.close()
})
