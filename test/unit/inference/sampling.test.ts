// Sampling on the host: Philox against the published vectors, temperature, top-k, top-p.
import { describe, expect, it } from 'vitest'
import { philox, uniformAt } from '../../../lib/inference/philox.js'
import { checkSampling, sampleToken } from '../../../lib/inference/sampling.js'

describe('philox', () => {
  // Known answers of Random123's philox4x32-10.
  it.each([
    [
      [0, 0, 0, 0],
      [0, 0],
      [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
    ],
    [
      [0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff],
      [0xffffffff, 0xffffffff],
      [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
    ],
    [
      [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
      [0xa4093822, 0x299f31d0],
      [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
    ],
  ] as const)('%j', (counter, key, expected) => {
    expect(philox(counter, key)).toEqual(expected)
  })

  it('gives every place its own number, evenly spread', () => {
    const numbers = Array.from({ length: 4000 }, (_, i) => uniformAt(1, i % 4, Math.floor(i / 4)))
    expect(new Set(numbers).size).toBe(4000)
    // The mean of 4000 even numbers lies within 4 standard deviations, 0.018, of a half.
    expect(Math.abs(numbers.reduce((a, b) => a + b) / 4000 - 0.5)).toBeLessThan(0.018)
    expect(uniformAt(2, 0, 0)).not.toBe(uniformAt(1, 0, 0))
  })
})

describe('sampling', () => {
  const logits = Float32Array.of(1, 3, 2, -1, 3)
  const spread = (options: Parameters<typeof sampleToken>[1]) => {
    const counts = [0, 0, 0, 0, 0]
    for (let i = 0; i < 2000; i++) counts[sampleToken(logits, options, (i + 0.5) / 2000)]!++
    return counts.map((count) => count / 2000)
  }

  it('temperature 0 takes the first of the largest', () => {
    expect(sampleToken(logits, {}, 0.99)).toBe(1)
  })

  it('follows softmax', () => {
    const weights = [...logits].map((x) => Math.exp(x / 0.7))
    const total = weights.reduce((a, b) => a + b)
    // Exact up to one of 2000 places at each border.
    spread({ temperature: 0.7 }).forEach(
      (share, id) => void expect(Math.abs(share - (weights[id] as number) / total)).toBeLessThan(0.0015),
    )
  })

  it('top-k keeps ties with the last, top-p the fewest that reach p', () => {
    expect(spread({ temperature: 1, topK: 1 }).map((share) => share > 0)).toEqual([false, true, false, false, true])
    expect(spread({ temperature: 1, topK: 3 }).map((share) => share > 0)).toEqual([false, true, true, false, true])
    expect(spread({ temperature: 1, topP: 0.3 }).map((share) => share > 0)).toEqual([false, true, false, false, false])
    expect(spread({ temperature: 1, topP: 0.85 }).map((share) => share > 0)).toEqual([false, true, true, false, true])
  })

  it.each([{ temperature: -1 }, { topK: 0 }, { topP: 0 }, { topP: 1.5 }, { temperature: Number.NaN }])(
    '%j is refused',
    (options) => {
      expect(() => checkSampling(options)).toThrow(expect.objectContaining({ code: 'ERR_USAGE' }))
    },
  )
})
