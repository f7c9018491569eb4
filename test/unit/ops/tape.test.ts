// The tape: who is kept alive how long, what is checked, and that schedules and recompute change no bit.
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { native } from '../../../lib/addon/load.js'
import { gatedActivation } from '../../../lib/ops/activation.js'
import { crossEntropy } from '../../../lib/ops/crossEntropy.js'
import { defineOp } from '../../../lib/ops/define.js'
import { dropout } from '../../../lib/ops/dropout.js'
import { add, mul } from '../../../lib/ops/elementwise.js'
import { embedding } from '../../../lib/ops/embedding.js'
import { linear } from '../../../lib/ops/linear.js'
import { rmsNorm } from '../../../lib/ops/norm.js'
import { recompute } from '../../../lib/ops/recompute.js'
import { Tape } from '../../../lib/ops/tape.js'
import type { TrainableWeight } from '../../../lib/ops/weight.js'
import { Ctx } from '../../../lib/tensor/ctx.js'
import { Scope, withScope } from '../../../lib/tensor/scope.js'
import { Tensor } from '../../../lib/tensor/tensor.js'
import { normals } from '../../ops/normals.js'

const [V, H, F] = [13, 8, 12]

type Net = Record<
  'words' | 'norm1' | 'fc1' | 'fc2' | 'norm2',
  { -readonly [K in keyof TrainableWeight]: TrainableWeight[K] }
>

let root: Ctx
let net: Net
let before: number

function weight(name: string, shape: number[], constant?: number): Net['words'] {
  const random = normals(name)
  const n = shape.reduce((a, b) => a * b, 1)
  const values = Array.from({ length: n }, () => constant ?? 0.5 * random())
  return { name, data: Tensor.fromHost(root, values, shape, 'float32').keep(), requiresGrad: true, mainGrad: null }
}

beforeEach(() => {
  root = Ctx.create({ device: 'cpu' })
  before = root.device.liveSlots()
  net = {
    words: weight('words', [V, H]),
    norm1: weight('norm1', [H], 1),
    fc1: weight('fc1', [2 * F, H]),
    fc2: weight('fc2', [H, F]),
    norm2: weight('norm2', [H], 1),
  }
})

afterEach(() => {
  for (const w of Object.values(net)) {
    w.data.dispose()
    w.mainGrad?.dispose()
  }
  root.scope.close()
  expect(root.device.liveSlots()).toBe(before)
})

/** A small language model with tied embeddings, a residual and dropout; `again` recomputes its middle. */
async function loss(ctx: Ctx, again = false): Promise<Tensor> {
  return await withScope(ctx, async (outer) => {
    const int = (values: number[], dtype: 'int32' | 'int64') =>
      Tensor.fromHost(outer, dtype === 'int64' ? values.map(BigInt) : values, [values.length], dtype)
    const batch = { sampleIds: int([0, 0, 0, 1, 1, 1], 'int64'), positions: int([0, 1, 2, 0, 1, 2], 'int32') }
    const rngSlot = Tensor.fromHost(outer, [7n, 3n], [2], 'int64')
    const c = outer.with({ batch, rng: { seed: 7, step: 3, rngSlot } })
    const x = embedding(c, { ids: int([1, 5, 12, 0, 5, 5], 'int32'), weight: net.words }).y
    const middle = async (k: Ctx, [h]: readonly Tensor[]) => {
      const { y } = rmsNorm(k, { x: h as Tensor, weight: net.norm1, eps: 1e-5 })
      const inner = gatedActivation(k, { x: linear(k, { x: y, weight: net.fc1 }).y, kind: 'silu' }).y
      return dropout(k, { x: linear(k, { x: inner, weight: net.fc2 }).y, p: 0.25, site: 4 })
    }
    const mixed = again ? await recompute(c, [x], middle) : await middle(c, [x])
    const { y } = rmsNorm(c, { x: mixed, residual: x, weight: net.norm2, eps: 1e-5 })
    const logits = linear(c, { x: y, weight: net.words }).y
    return crossEntropy(c, { logits, labels: int([5, 12, -100, 5, 5, 2], 'int32'), vocabSize: V }).lossSum
  })
}

const one = () => Tensor.fromHost(root, [1], [1], 'float32')

async function gradients(): Promise<Record<string, number[]>> {
  const out: Record<string, number[]> = {}
  for (const w of Object.values(net)) {
    out[w.name] = Array.from(await w.mainGrad!.toFloat32Array())
    w.mainGrad!.dispose()
    w.mainGrad = null
  }
  return out
}

async function run(
  options: { again?: boolean; weights?: 'now' | 'defer' } = {},
): Promise<{ loss: number; gradients: Record<string, number[]> }> {
  const tape = new Tape()
  const ctx = root.with({ tape, scope: new Scope() })
  const lossSum = await loss(ctx, options.again)
  await tape.backward(ctx, [lossSum], [one()], { weights: options.weights ?? 'now' })
  if (options.weights === 'defer') {
    expect(net.fc1.mainGrad).toBeNull()
    await tape.backwardWeight(ctx)
  }
  const value = await lossSum.item()
  tape.dispose()
  ctx.scope.close()
  return { loss: value, gradients: await gradients() }
}

describe('tape', () => {
  test('the gradient of the whole is that of finite differences', async () => {
    const { gradients: exact } = await run()
    // Central differences in float32: rounding of the loss (about 1e-6) over the step bounds the error to some 1e-3.
    const h = 2e-2
    for (const [name, element] of [
      ['words', 5 * H + 2],
      ['fc1', 30],
      ['fc2', 17],
      ['norm2', 3],
    ] as const) {
      const w = net[name]
      const values = Array.from(await w.data.toFloat32Array())
      const at = async (delta: number) => {
        native.upload(
          root.stream.id,
          w.data.handle,
          Float32Array.from(values, (v, i) => (i === element ? v + delta : v)),
        )
        const l = await (await loss(root)).item()
        native.upload(root.stream.id, w.data.handle, Float32Array.from(values))
        return l
      }
      const numeric = ((await at(h)) - (await at(-h))) / (2 * h)
      expect(Math.abs(numeric - exact[name]![element]!)).toBeLessThan(5e-3 * Math.max(1, Math.abs(numeric)))
    }
  })

  test('deferred weight gradients are bit-equal', async () => {
    expect(await run({ weights: 'defer' })).toEqual(await run())
  })

  test('an op that has both backward rules at once is asked for both where a weight wants its gradient now', async () => {
    const calls: string[] = []
    const scale = defineOp<{ x: Tensor; weight: TrainableWeight }, { y: Tensor }>({
      ...linear.rule,
      backwardInput(...given) {
        calls.push('input')
        return linear.rule.backwardInput?.(...given) ?? []
      },
      backwardWeight(...given) {
        calls.push('weight')
        linear.rule.backwardWeight?.(...given)
      },
      backward(ctx, args, out, d, wanted) {
        calls.push('both')
        linear.rule.backwardWeight?.(ctx, args, out, d)
        return linear.rule.backwardInput?.(ctx, args, out, d, wanted) ?? []
      },
    })
    const told: string[] = []
    const run = async (weights: 'now' | 'defer') =>
      await withScope(root, async (inner) => {
        const tape = new Tape()
        const x = Tensor.full(inner, [3, H], 'float32', 0.5)
        tape.watch(x)
        const { y } = scale(inner.with({ tape }), { x, weight: net.fc1 })
        const options = { weights, onWeight: ({ name }: TrainableWeight) => told.push(name) }
        const found = await tape.backward(inner, [y], [Tensor.full(inner, y.shape, 'float32', 1)], options)
        await tape.backwardWeight(inner, options)
        return [...((await found.get(x)?.toFloat32Array()) ?? [])]
      })
    const now = await run('now')
    expect(calls.splice(0)).toEqual(['both'])
    expect(await run('defer')).toEqual(now)
    expect(calls.splice(0)).toEqual(['input', 'weight'])
    expect(told).toEqual(['fc1', 'fc1'])
    net.fc1.requiresGrad = false
    expect(await run('now')).toEqual(now)
    expect(calls).toEqual(['input'])
  })

  test('recompute is bit-equal, dropout included, with weight gradients now and deferred', async () => {
    const plain = await run()
    expect(await run({ again: true })).toEqual(plain)
    expect(await run({ again: true, weights: 'defer' })).toEqual(plain)
  })

  test('frees as it goes: live slots are equal after each step', async () => {
    await run()
    const first = root.device.liveSlots()
    await run()
    // `one()` belongs to the root scope and stays: one slot a run.
    expect(root.device.liveSlots()).toBe(first + 1)
    await run({ again: true, weights: 'defer' })
    expect(root.device.liveSlots()).toBe(first + 2)
  })

  test('a changed saved tensor is ERR_VERSION, and nothing leaks', async () => {
    const tape = new Tape()
    const ctx = root.with({ tape })
    const x = Tensor.full(ctx, [2, H], 'float32', 1)
    tape.watch(x)
    const { y } = linear(ctx, { x, weight: net.fc1 })
    native.fill(ctx.stream.id, x.handle, 2)
    const d = Tensor.full(ctx, [2, 2 * F], 'float32', 1)
    await expect(tape.backward(ctx, [y], [d])).rejects.toMatchObject({ code: 'ERR_VERSION', where: 'linear' })
    tape.dispose()
  })

  test('a changed parameter is found too', async () => {
    const tape = new Tape()
    const ctx = root.with({ tape })
    const lossSum = await loss(ctx)
    native.fill(ctx.stream.id, net.fc2.data.handle, 0.5)
    await expect(tape.backward(ctx, [lossSum], [one()])).rejects.toMatchObject({ code: 'ERR_VERSION' })
    tape.dispose()
    tape.dispose()
  })

  test('frozen weights cost nothing: no gradient, no record before the first trainable one', async () => {
    for (const w of Object.values(net)) w.requiresGrad = false
    const tape = new Tape()
    const lossSum = await loss(root.with({ tape }))
    expect(tape.length).toBe(0)
    expect(await tape.backward(root, [lossSum], [one()])).toEqual(new Map())
    net.norm2.requiresGrad = true
    const second = new Tape()
    const again = await loss(root.with({ tape: second }))
    expect(second.length).toBe(3)
    await second.backward(root, [again], [one()])
    expect(net.norm2.mainGrad).not.toBeNull()
    expect(net.words.mainGrad).toBeNull()
  })

  test('several tapes are alive at once, and gradients add up over them', async () => {
    const single = await run()
    const tapes = [new Tape(), new Tape()]
    const losses: Tensor[] = []
    for (const tape of tapes) losses.push(await loss(root.with({ tape })))
    for (const i of [1, 0]) await tapes[i]!.backward(root, [losses[i]!], [one()])
    const twice = await gradients()
    for (const [name, values] of Object.entries(twice)) {
      // x + x is exact; accumulation of sums may round once more per element.
      for (const [i, v] of values.entries()) expect(Math.abs(v - 2 * single.gradients[name]![i]!)).toBeLessThan(1e-5)
    }
  })

  test('a watched tensor in the middle gets its gradient and passes it on', async () => {
    const tape = new Tape()
    const ctx = root.with({ tape })
    const x = Tensor.fromHost(ctx, [3], [1, 1], 'float32')
    tape.watch(x)
    const square = mul(ctx, { a: x, b: x }).y
    tape.watch(square)
    const y = add(ctx, { a: square, b: x }).y
    const found = await tape.backward(ctx, [y], [Tensor.fromHost(ctx, [1], [1, 1], 'float32')])
    expect(await found.get(square)!.item()).toBe(1)
    expect(await found.get(x)!.item()).toBe(7)
  })

  test('the gradient of the logits takes their place only when nobody else holds them', async () => {
    const tape = new Tape()
    const ctx = root.with({ tape })
    const x = Tensor.fromHost(
      ctx,
      Array.from({ length: H }, (_, i) => i / 8),
      [1, H],
      'float32',
    )
    const logits = linear(ctx, { x, weight: net.words }).y
    const seen = await logits.toFloat32Array()
    const { lossSum } = crossEntropy(ctx, { logits, labels: Tensor.fromHost(ctx, [3], [1], 'int32'), vocabSize: V })
    await tape.backward(ctx, [lossSum], [one()])
    expect(await logits.toFloat32Array()).toEqual(seen)
  })
})
