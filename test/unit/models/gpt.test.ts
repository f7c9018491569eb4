// The assembled model beyond parity: names, cache, dropout, bfloat16, memory.
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { native } from '../../../lib/addon/load.js'
import { type TokenBatch, uploadBatch } from '../../../lib/models/batch.js'
import { GPTModel } from '../../../lib/models/gpt.js'
import { allocateParameter, initializeParameter } from '../../../lib/models/initialize.js'
import { parameterTable } from '../../../lib/models/parameterTable.js'
import type { TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { Tape } from '../../../lib/ops/tape.js'
import { Ctx, soloGroups } from '../../../lib/tensor/ctx.js'
import { Scope } from '../../../lib/tensor/scope.js'
import { Tensor } from '../../../lib/tensor/tensor.js'
import { readFixture } from '../../parity/llamaLayout.js'

const base: TransformerConfig = {
  ...readFixture('wide_heads').config,
  addQkvBias: true,
  addProjBias: true,
  addMlpBias: true,
}
const root = Ctx.create({ device: 'cpu' })
let model: GPTModel

function build(changes: Partial<TransformerConfig> = {}, seed = 5): GPTModel {
  const made = new GPTModel({ ...base, ...changes }, { groups: soloGroups, paddedVocabSize: 128 })
  for (const [, p] of made.namedParameters()) {
    allocateParameter(root, p)
    initializeParameter(root, p, seed)
  }
  return made
}

const [B, S] = [2, 9]
const tokens = Int32Array.from({ length: B * S }, (_, i) => (i * 31 + 7) % base.vocabSize)
const labels = Int32Array.from({ length: B * S }, (_, i) => (i % 5 === 0 ? -100 : (i * 17) % base.vocabSize))
const host: TokenBatch = { batchSize: B, seqLength: S, tokens, labels }

async function logitsOf(
  m: GPTModel,
  batch: TokenBatch,
  cache?: ReturnType<GPTModel['createCache']>,
): Promise<Float32Array> {
  const ctx = root.with({ scope: new Scope() })
  const logits = await m.forward(ctx, uploadBatch(ctx, batch, base), cache)
  const values = await m.gatherLogits(ctx, logits)
  ctx.scope.close()
  return values
}

async function step(m: GPTModel, seed = 1): Promise<{ loss: number; gradients: Map<string, Float32Array> }> {
  const tape = new Tape()
  const scope = new Scope()
  const bare = root.with({ scope, tape })
  const rngSlot = Tensor.fromHost(bare, [BigInt(seed), 0n], [2], 'int64')
  const ctx = bare.with({ rng: { seed, step: 0, rngSlot } })
  const { lossSum } = await m.loss(ctx, uploadBatch(ctx, host, base))
  await tape.backward(ctx, [lossSum], [Tensor.fromHost(ctx, [1], [1], 'float32')])
  const gradients = new Map<string, Float32Array>()
  for (const [name, p] of m.namedParameters()) {
    gradients.set(name, await p.mainGrad!.toFloat32Array())
    p.mainGrad!.dispose()
    p.mainGrad = null
  }
  const loss = await lossSum.item()
  tape.dispose()
  scope.close()
  return { loss, gradients }
}

beforeAll(() => {
  model = build()
})
afterAll(() => {
  model.dispose()
  root.scope.close()
})

describe('GPTModel', () => {
  test('its parameters are those of the table: names, shapes and order-free', () => {
    for (const changes of [
      {},
      { shareEmbeddingsAndOutputWeights: true },
      { normalization: 'LayerNorm' as const, gatedLinearUnit: false },
    ]) {
      const config = { ...base, ...changes }
      const table = parameterTable(config)
        .map((row) => `${row.name} [${row.shape}]`)
        .sort()
      const made = new GPTModel(config, { groups: soloGroups })
      expect([...made.namedParameters()].map(([name, p]) => `${name} [${p.shard.logicalShape}]`).sort()).toEqual(table)
      for (const [name, p] of made.namedParameters()) expect(p.name).toBe(name)
    }
  })

  test('padded rows of the vocabulary are 0 and get no gradient', async () => {
    const words = model.embedding!.wordEmbeddings.weight
    const H = base.hiddenSize
    const rows = (await words.data.toFloat32Array()).subarray(base.vocabSize * H)
    expect(rows.length).toBe((128 - base.vocabSize) * H)
    expect(rows.every((v) => v === 0)).toBe(true)
    const { gradients } = await step(model)
    for (const name of ['embedding.word_embeddings.weight', 'output_layer.weight']) {
      expect(
        gradients
          .get(name)!
          .subarray(base.vocabSize * H)
          .every((v) => v === 0),
      ).toBe(true)
    }
  })

  test('initial values depend on seed, name and place only', async () => {
    const again = build({}, 5)
    const other = build({}, 6)
    for (const [name, p] of model.namedParameters()) {
      const values = await p.data.toFloat32Array()
      expect(await [...again.namedParameters()].find(([n]) => n === name)![1].data.toFloat32Array()).toEqual(values)
      if (p.init.kind === 'constant') continue
      expect(await [...other.namedParameters()].find(([n]) => n === name)![1].data.toFloat32Array()).not.toEqual(values)
      const { std } = p.init
      const n = p.shard.logicalShape.reduce((a, b) => a * b, 1)
      // Five standard errors of the standard deviation of n normal numbers.
      const measured = Math.sqrt(values.reduce((s, v) => s + v * v, 0) / n)
      expect(Math.abs(measured / std - 1)).toBeLessThan(5 / Math.sqrt(2 * n))
    }
    again.dispose()
    other.dispose()
  })

  test('with a cache: token by token equals all at once', async () => {
    const whole = await logitsOf(model, host)
    const ctx = root.with({ scope: new Scope() })
    const cache = model.createCache(ctx, B, S)
    const V = base.vocabSize
    const largest = whole.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
    for (const [start, count] of [
      [0, 4],
      [4, 1],
      [5, 3],
      [8, 1],
    ] as const) {
      const part = Int32Array.from(
        { length: B * count },
        (_, i) => tokens[Math.floor(i / count) * S + start + (i % count)]!,
      )
      const got = await logitsOf(model, { batchSize: B, seqLength: count, tokens: part, start }, cache)
      for (let i = 0; i < got.length; i++) {
        const [b, s] = [Math.floor(i / (count * V)), Math.floor(i / V) % count]
        // float32 sums in another order.
        expect(Math.abs(got[i]! - whole[(b * S + start + s) * V + (i % V)]!)).toBeLessThan(1e-5 * largest)
      }
    }
    expect(cache.length).toBe(S)
    await expect(
      logitsOf(model, { batchSize: B, seqLength: 1, tokens: Int32Array.of(1, 1), start: S }, cache),
    ).rejects.toMatchObject({ code: 'ERR_SHAPE' })
    cache.dispose()
    ctx.scope.close()
  })

  test('left padding under a cache hides what lies before the prompt', async () => {
    const prompt = Int32Array.of(3, 1, 4, 1, 5)
    const alone = await logitsOf(model, { batchSize: 1, seqLength: 5, tokens: prompt })
    const padded = Int32Array.of(0, 0, ...prompt)
    const positionIds = Int32Array.of(0, 0, 0, 1, 2, 3, 4)
    const ctx = root.with({ scope: new Scope() })
    const cache = model.createCache(ctx, 1, 7)
    const part = (from: number, to: number) => ({
      batchSize: 1,
      seqLength: to - from,
      tokens: padded.slice(from, to),
      positionIds: positionIds.slice(from, to),
      firstKeys: Int32Array.of(2),
      start: from,
    })
    await logitsOf(model, part(0, 4), cache)
    const got = await logitsOf(model, part(4, 7), cache)
    const want = alone.subarray(2 * base.vocabSize)
    for (const [i, v] of got.entries()) expect(Math.abs(v - want[i]!)).toBeLessThan(1e-5)
    cache.dispose()
    ctx.scope.close()
  })

  test('dropout: off for evaluation, drawn by seed in training, equal with recompute', async () => {
    const dropped = build({ hiddenDropout: 0.3 })
    const again = new GPTModel(
      { ...base, hiddenDropout: 0.3 },
      { groups: soloGroups, paddedVocabSize: 128, recompute: { recomputeGranularity: 'full' } },
    )
    for (const [, p] of again.namedParameters()) {
      allocateParameter(root, p)
      initializeParameter(root, p, 5)
    }
    dropped.training = false
    expect(await logitsOf(dropped, host)).toEqual(await logitsOf(model, host))
    dropped.training = true
    const first = await step(dropped, 1)
    expect(await step(dropped, 1)).toEqual(first)
    expect(await step(again, 1)).toEqual(first)
    expect((await step(dropped, 2)).loss).not.toBe(first.loss)
    dropped.dispose()
    again.dispose()
  })

  test('bfloat16: float32 gradients, near the float32 model', async () => {
    const half = build({ paramsDtype: 'bfloat16' })
    const [exact, rounded] = [await step(model), await step(half)]
    // Weights and activations have 8 bits: some 4e-3 relative on the way of each logit.
    expect(Math.abs(rounded.loss / exact.loss - 1)).toBeLessThan(1e-2)
    for (const [name, p] of half.namedParameters()) {
      expect(p.data.dtype).toBe('bfloat16')
      const [a, b] = [exact.gradients.get(name)!, rounded.gradients.get(name)!]
      const difference = Math.hypot(...a.map((v, i) => v - b[i]!)) / Math.max(Math.hypot(...a), 1e-2)
      expect(difference, name).toBeLessThan(0.1)
    }
    half.dispose()
  })

  test('live slots are equal after each step', async () => {
    await step(model)
    const slots = root.device.liveSlots()
    await step(model)
    await logitsOf(model, host)
    expect(root.device.liveSlots()).toBe(slots)
  })

  test('the backward pass writes over what nobody needs any more', async () => {
    const inPlace: Record<string, boolean[]> = {}
    // Where each op's gradient goes (first argument after the stream) and what it may overwrite.
    const watched = { gatedActivationBackward: 3, rmsNormBackwardInput: 6, crossEntropyBackward: 2 } as const
    const spies = Object.entries(watched).map(([op, argument]) => {
      const name = op as keyof typeof watched
      const run = native[name] as (...args: unknown[]) => void
      inPlace[name] = []
      return vi.spyOn(native, name).mockImplementation((...args: unknown[]) => {
        if (args[argument] !== 0) inPlace[name]!.push(args[1] === args[argument])
        run.apply(native, args)
      })
    })
    await step(model)
    for (const spy of spies) spy.mockRestore()
    expect(inPlace).toEqual({
      gatedActivationBackward: [true, true],
      crossEntropyBackward: [true],
      // Both norms of each layer: no gradient passes by the final one.
      rmsNormBackwardInput: [true, true, true, true],
    })
  })

  test('a batch without labels has no loss', async () => {
    const ctx = root.with({ scope: new Scope() })
    await expect(model.loss(ctx, uploadBatch(ctx, { batchSize: B, seqLength: S, tokens }, base))).rejects.toMatchObject(
      { code: 'ERR_DATA' },
    )
    ctx.scope.close()
  })
})
