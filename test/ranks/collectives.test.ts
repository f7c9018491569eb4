// Collectives between 2, 3 and 4 processes, bit for bit; see collectivesRank.ts for what is checked.
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { startRanks } from './startRanks.js'

const script = join(import.meta.dirname, 'collectivesRank.ts')

describe('collectives', () => {
  it.each([2, 3, 4])('are exact and equal on %i ranks, over shared memory and Gloo', async (size) => {
    const results = await startRanks(size, script, []).results
    for (const { rank, code, out } of results)
      expect({ rank, code, out }).toEqual({ rank, code: 0, out: expect.stringContaining('fine after') })
  })
})
