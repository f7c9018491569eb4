// The linears of tensor parallelism with their collectives beside the products, over real processes; see overlapRank.ts.
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { startRanks } from './startRanks.js'

const script = join(import.meta.dirname, 'overlapRank.ts')

describe('collectives of tensor parallelism beside the products', () => {
  it.each([2, 3, 4])(
    '%i ranks: the bits and bytes of each linear without, and work goes on while one is late',
    async (size) => {
      const results = await startRanks(size, script, []).results
      for (const { rank, code, out } of results)
        expect({ rank, code, out }).toEqual({ rank, code: 0, out: expect.stringContaining('passes are equal') })
    },
    120_000,
  )
})
