// Logits, loss and gradients of tiny random Llamas against Transformers in float32, all fixtures; and that the gate turns red when
// a part is changed that a careless reader might get wrong.
import { readdirSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { Ctx } from '../../lib/tensor/ctx.js'
import { llamaFixtures } from '../fixtures/safetensorsFile.js'
import { type Changes, compute } from './compute.js'
import { gate } from './gate.js'
import { readFixture } from './llamaLayout.js'

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
