// Logits, loss and gradients of tiny random Llamas against Transformers in float32, all fixtures; and that the gate turns red when
// a part is changed that a careless reader might get wrong.
import { readdirSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { uploadBatch } from '../../lib/models/batch.js'
import { GPTModel } from '../../lib/models/gpt.js'
import type { TransformerConfig } from '../../lib/models/transformerConfig.js'
import { Tape } from '../../lib/ops/tape.js'
import { Ctx, soloGroups } from '../../lib/tensor/ctx.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { llamaFixtures } from '../fixtures/safetensorsFile.js'
import { gate, type Result } from './gate.js'
import { type Fixture, pack, readFixture, runsOf } from './llamaLayout.js'

interface Changes {
  readonly config?: Partial<TransformerConfig>
  readonly weight?: (name: string, values: Float32Array, config: TransformerConfig) => Float32Array
  readonly labels?: (labels: Int32Array) => Int32Array
  readonly recompute?: boolean
  /** Rows of the vocabulary in memory. */
  readonly padded?: number
}

async function compute(fixture: Fixture, changes: Changes = {}): Promise<Result> {
  const config = { ...fixture.config, ...changes.config }
  const ctx = Ctx.create({ device: 'cpu' })
  const model = new GPTModel(config, {
    groups: soloGroups,
    recompute: { recomputeGranularity: changes.recompute ? 'full' : null },
    ...(changes.padded ? { paddedVocabSize: changes.padded } : {}),
  })
  for (const [name, parameter] of model.namedParameters()) {
    const values = pack(runsOf(name, config), fixture.weights)
    const filled = new Float32Array(parameter.shard.localShape.reduce((a, b) => a * b, 1))
    filled.set(changes.weight ? changes.weight(name, values, config) : values)
    parameter.data = Tensor.fromHost(ctx, filled, parameter.shard.localShape, 'float32').keep()
  }
  const ints = (name: string) => (fixture.expected.has(name) ? Int32Array.from(fixture.expected.get(name)!.data) : null)
  const [batchSize, seqLength] = fixture.expected.get('input_ids')!.shape as [number, number]
  const raw = ints('labels')!
  let labels: Int32Array = raw.map((_, t) => (t % seqLength === seqLength - 1 ? -100 : raw[t + 1]!))
  if (changes.labels) labels = changes.labels(labels)
  const positionIds = ints('position_ids')
  const mask = ints('attention_mask')
  const host = {
    batchSize,
    seqLength,
    tokens: ints('input_ids')!,
    labels,
    ...(positionIds ? { positionIds } : {}),
    ...(mask ? { attentionMask: Uint8Array.from(mask) } : {}),
  }
  const batch = uploadBatch(ctx, host, config)
  const logits = await model.gatherLogits(ctx, await model.forward(ctx, batch))
  const tape = new Tape()
  const { lossSum } = await model.loss(ctx.with({ tape }), batch)
  const factor = Tensor.fromHost(ctx, [1 / batch.numTokens], [1], 'float32')
  await tape.backward(ctx, [lossSum], [factor])
  const gradients = new Map<string, Float32Array>()
  for (const [name, parameter] of model.namedParameters()) {
    const length = pack(runsOf(name, fixture.config), fixture.weights).length
    gradients.set(name, (await parameter.mainGrad!.toFloat32Array()).subarray(0, length))
  }
  const loss = (await lossSum.item()) / batch.numTokens
  tape.dispose()
  model.dispose()
  ctx.scope.close()
  return { logits, loss, gradients }
}

const names = readdirSync(llamaFixtures).sort()

describe('parity with Transformers, float32', () => {
  for (const name of names) {
    test(name, async () => {
      const fixture = readFixture(name)
      const slots = Ctx.create({ device: 'cpu' }).device.liveSlots()
      const report = gate(fixture, await compute(fixture))
      expect(report.red).toEqual([])
      // Looser would hide a mistake: the noise between two correct implementations is some 1e-6.
      expect(report.logits).toBeLessThan(3e-6)
      expect(report.gradients).toBeLessThan(1e-5)
      expect(Ctx.create({ device: 'cpu' }).device.liveSlots()).toBe(slots)
    })
  }

  test('recompute gives the same bits', async () => {
    const fixture = readFixture('padded_left')
    expect(await compute(fixture, { recompute: true })).toEqual(await compute(fixture))
  })

  test('padding of the vocabulary changes nothing', async () => {
    const fixture = readFixture('tied_bias')
    expect(gate(fixture, await compute(fixture, { padded: 128 })).red).toEqual([])
  })
})

function swapRows(values: Float32Array, rows: number, a: number, b: number, count: number): Float32Array {
  const width = values.length / rows
  const out = values.slice()
  out.set(values.subarray(a * width, (a + count) * width), b * width)
  out.set(values.subarray(b * width, (b + count) * width), a * width)
  return out
}

describe('the gate turns red for', () => {
  const mutations: Record<string, Changes> = {
    'heads transposed': {
      weight: (name, v, c) =>
        name.endsWith('linear_qkv.weight')
          ? swapRows(v, (c.numAttentionHeads + 2 * c.numQueryGroups) * c.kvChannels, 0, c.kvChannels, c.kvChannels)
          : v,
    },
    'gate and up swapped': {
      weight: (name, v, c) =>
        name.endsWith('linear_fc1.weight') ? swapRows(v, 2 * c.ffnHiddenSize, 0, c.ffnHiddenSize, c.ffnHiddenSize) : v,
    },
    'interleaved rotation': { config: { rotaryInterleaved: true } },
    'labels shifted once more': { labels: (l) => l.map((_, t) => l[t + 1] ?? -100) },
    'a norm weight dropped': {
      weight: (name, v) => (name === 'decoder.layers.1.mlp.linear_fc1.layer_norm_weight' ? v.fill(1) : v),
    },
    'eps 1e-6 for 1e-5': { config: { layernormEpsilon: 1e-6 } },
  }
  for (const [name, changes] of Object.entries(mutations)) {
    test(name, async () => {
      const fixture = readFixture('plain')
      expect(gate(fixture, await compute(fixture, changes)).red).not.toEqual([])
    })
  }
})
