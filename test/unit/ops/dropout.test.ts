// Dropout by place: the share that it drops, the same mask backward, and independence of how tokens are laid out.
import { afterAll, describe, expect, test } from 'vitest'
import { dropout } from '../../../lib/ops/dropout.js'
import { cast } from '../../../lib/ops/elementwise.js'
import { Tape } from '../../../lib/ops/tape.js'
import { Ctx } from '../../../lib/tensor/ctx.js'
import { Tensor } from '../../../lib/tensor/tensor.js'

const root = Ctx.create({ device: 'cpu' })
afterAll(() => root.scope.close())

interface Place {
  readonly samples: readonly number[]
  readonly positions: readonly number[]
  readonly seed?: number
  readonly step?: number
  readonly site?: number
  readonly channelStart?: number
}

const C = 64

function place({ samples, positions, seed = 1, step = 2 }: Place): Ctx {
  const n = samples.length
  return root.with({
    tape: new Tape(),
    rng: { seed, step, rngSlot: Tensor.fromHost(root, [BigInt(seed), BigInt(step)], [2], 'int64') },
    batch: {
      sampleIds: Tensor.fromHost(root, samples.map(BigInt), [n], 'int64'),
      positions: Tensor.fromHost(root, [...positions], [n], 'int32'),
    },
  })
}

async function drop(at: Place, channels = C): Promise<Float32Array> {
  const x = Tensor.full(root, [at.samples.length, channels], 'float32', 1)
  const y = dropout(place(at), { x, p: 0.25, site: at.site ?? 0, channelStart: at.channelStart ?? 0 })
  return await y.toFloat32Array()
}

describe('dropout', () => {
  const many = {
    samples: Array.from({ length: 500 }, (_, i) => i % 7),
    positions: Array.from({ length: 500 }, (_, i) => i),
  }

  test('drops a share p and keeps the mean', async () => {
    const y = await drop(many)
    const dropped = y.filter((v) => v === 0).length / y.length
    // Five standard errors of a share of 32000 draws.
    expect(Math.abs(dropped - 0.25)).toBeLessThan(5 * Math.sqrt((0.25 * 0.75) / y.length))
    expect(new Set(y)).toEqual(new Set([0, Math.fround(1 / 0.75)]))
  })

  test('the gradient is dropped by the same mask', async () => {
    const ctx = place(many)
    const tape = ctx.tape as Tape
    const x = Tensor.full(root, [500, C], 'float32', 1)
    tape.watch(x)
    const y = dropout(ctx, { x: cast(ctx, { x, dtype: 'float32' }).y, p: 0.25, site: 3 })
    const found = await tape.backward(ctx, [y], [Tensor.full(root, [500, C], 'float32', 1)])
    expect(await found.get(x)!.toFloat32Array()).toEqual(await y.toFloat32Array())
  })

  test('a draw depends on seed, step, sample, position, site and channel, and on nothing else', async () => {
    const base = { samples: [4, 9], positions: [5, 6] }
    const y = await drop(base)
    const turned = await drop({ samples: [9, 4], positions: [6, 5] })
    expect([...turned.subarray(C), ...turned.subarray(0, C)]).toEqual([...y])
    const right = await drop({ ...base, channelStart: 16 }, C - 16)
    expect([...right.subarray(0, C - 16)]).toEqual([...y.subarray(16, C)])
    for (const other of [{ seed: 2 }, { step: 3 }, { site: 1 }, { samples: [5, 10] }, { positions: [7, 8] }]) {
      expect([...(await drop({ ...base, ...other }))]).not.toEqual([...y])
    }
  })

  test('p = 0 is the tensor itself; without coordinates it is an error', () => {
    const x = Tensor.full(root, [1, 4], 'float32', 1)
    expect(dropout(root, { x, p: 0, site: 0 })).toBe(x)
    expect(() => dropout(root, { x, p: 0.5, site: 0 })).toThrowError(expect.objectContaining({ code: 'ERR_CONFIG' }))
  })
})
