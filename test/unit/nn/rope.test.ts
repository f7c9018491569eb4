// Rotary frequencies of every scaling against what Transformers stored in the fixtures.
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { type RopeConfig, type RopeParameters, ropeFrequencies, ropeTables } from '../../../lib/nn/rope.js'
import { fixtureConfig, llamaFixtures, readSafetensorsFile } from '../../fixtures/safetensorsFile.js'

function camel(key: string): string {
  return key.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase())
}

function ropeConfig(name: string): RopeConfig {
  const config = fixtureConfig(name) as unknown as Record<string, number> & {
    rope_scaling: Record<string, unknown> | null
  }
  const scaling = config.rope_scaling
  const fields = scaling ? Object.fromEntries(Object.entries(scaling).map(([k, v]) => [camel(k), v])) : {}
  const type = (fields['ropeType'] ?? fields['type'] ?? 'default') as RopeParameters['type']
  return {
    channels: config['head_dim'] as number,
    base: config['rope_theta'] as number,
    maxPositionEmbeddings: config['max_position_embeddings'] as number,
    scaling: { ...fields, type },
  }
}

describe('rope frequencies', () => {
  for (const name of ['plain', 'linear', 'dynamic', 'llama3', 'yarn', 'yarn_scaled']) {
    test(`equal Transformers: ${name}`, () => {
      const expected = readSafetensorsFile(join(llamaFixtures, name, 'expected.safetensors'))
      const want = expected.get('inv_freq')!.data
      const length = expected.get('input_ids')!.shape[1] as number
      const { inverse, attentionScaling } = ropeFrequencies(ropeConfig(name), length)
      expect(inverse.length).toBe(want.length)
      let worst = 0
      for (let i = 0; i < want.length; i++)
        worst = Math.max(worst, Math.abs((inverse[i] as number) / (want[i] as number) - 1))
      // 2 units in the last place of float32: torch's vectorised pow is good to 1.
      expect(worst).toBeLessThanOrEqual(2 * 2 ** -23)
      expect(attentionScaling).toBeCloseTo(expected.get('rope_scaling')!.data[0] as number, 6)
    })
  }

  test('dynamic is plain up to the longest position and changes after it', () => {
    const config = ropeConfig('dynamic')
    const plain = ropeFrequencies({ ...config, scaling: { type: 'default' } }, 8).inverse
    expect(ropeFrequencies(config, 8).inverse).toEqual(plain)
    expect(ropeFrequencies(config, 9).inverse).not.toEqual(plain)
  })

  test('tables hold cos and sin of position times frequency', () => {
    const { cos, sin } = ropeTables({ inverse: Float32Array.of(1, 0.5), attentionScaling: 2 }, 3)
    expect([...cos].map((x) => x.toFixed(5))).toEqual([0, 0, 1, 0.5, 2, 1].map((a) => (2 * Math.cos(a)).toFixed(5)))
    expect([...sin].map((x) => x.toFixed(5))).toEqual([0, 0, 1, 0.5, 2, 1].map((a) => (2 * Math.sin(a)).toFixed(5)))
  })
})
