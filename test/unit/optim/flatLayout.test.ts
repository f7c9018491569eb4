// Buckets and ranges of flat buffers: every element lies in one range, and says which part of which parameter it is.
import { describe, expect, it } from 'vitest'
import type { DType } from '../../../lib/base/dtype.js'
import { Parameter } from '../../../lib/nn/parameter.js'
import { FlatLayout, intersect } from '../../../lib/optim/flatLayout.js'
import { volume } from '../../../lib/tensor/region.js'
import { replicated } from '../../../lib/tensor/shardSpec.js'

const parameter = (shape: readonly number[], dtype: DType = 'float32') =>
  new Parameter(replicated(shape), dtype, { kind: 'constant', value: 0 })

describe('buckets', () => {
  it('hold whole parameters, fill up from the last one on, and are cut into equal aligned ranges', () => {
    const parameters = [[40, 3], [7], [5, 11], [100], [3]].map((shape) => parameter(shape))
    const layout = new FlatLayout(parameters, { parts: () => 4, bucketSize: 100 })
    expect(layout.buckets.map(({ parameters: held }) => held.map((p) => parameters.indexOf(p)))).toEqual([
      [0, 1, 2],
      [3, 4],
    ])
    let at = 0
    for (const bucket of layout.buckets) {
      expect(bucket.start).toBe(at)
      at += bucket.length
      expect(bucket.length % (4 * 16)).toBe(0)
      const parts = [0, 1, 2, 3].map((i) => layout.part(bucket, i))
      expect(parts.map(({ start }) => start - bucket.start)).toEqual([0, 1, 2, 3].map((i) => (i * bucket.length) / 4))
    }
    expect(layout.length).toBe(at)
  })

  it('hold one dtype', () => {
    const layout = new FlatLayout([parameter([4]), parameter([4], 'bfloat16'), parameter([5], 'bfloat16')])
    expect(layout.buckets.map(({ dtype, parameters }) => [dtype, parameters.length])).toEqual([
      ['float32', 1],
      ['bfloat16', 2],
    ])
  })

  it.each([1, 2, 3, 8])('have each element of each parameter in one of %i ranges', (parts) => {
    const parameters = [[40, 3], [7], [5, 11], [100], [3], [64, 2]].map((shape) => parameter(shape))
    const layout = new FlatLayout(parameters, { parts: () => parts, bucketSize: 90 })
    const seen = new Map(parameters.map((p) => [p, new Uint8Array(volume(p.shard.localShape))]))
    for (const bucket of layout.buckets) {
      for (let i = 0; i < parts; i++) {
        const range = layout.part(bucket, i)
        for (const { parameter: p, begin, count, offset } of layout.segments(bucket, range)) {
          expect(range.start + offset).toBe((layout.offsets.get(p) as number) + begin)
          expect(offset + count).toBeLessThanOrEqual(range.length)
          for (let k = begin; k < begin + count; k++) (seen.get(p) as Uint8Array)[k]! += 1
        }
      }
    }
    for (const counts of seen.values()) expect(counts.every((n) => n === 1)).toBe(true)
  })

  it('share what they share', () => {
    const a = [
      { start: 0, length: 10 },
      { start: 20, length: 10 },
    ]
    expect(intersect(a, [{ start: 5, length: 20 }])).toEqual([
      { start: 5, length: 5 },
      { start: 20, length: 5 },
    ])
    expect(intersect(a, [{ start: 10, length: 10 }])).toEqual([])
  })
})
