// The proof that boxes tile a tensor: what leaves it, overlaps or is missing is named, whatever dim the boxes are cut along, and many
// columns cost no more than many rows.
import { describe, expect, it } from 'vitest'
import { tilingFault } from '../../../lib/tensor/region.js'

const columns = (count: number) => Array.from({ length: count }, (_, i) => ({ start: [0, i], size: [4, 1] }))

describe('tilingFault', () => {
  it('finds what is wrong', () => {
    expect(tilingFault([4, 3], columns(3))).toBe(null)
    expect(tilingFault([4, 4], columns(3))).toContain('12 of 16')
    expect(tilingFault([4, 2], columns(3))).toContain('leaves the tensor')
    expect(tilingFault([4, 4], [...columns(3), { start: [0, 2], size: [4, 1] }])).toContain('overlap')
    expect(tilingFault([], [{ start: [], size: [] }])).toBe(null)
    const twice = [0, 1].map(() => ({ start: [], size: [] }))
    expect(tilingFault([], twice)).toContain('hold the only element')
    const grid = [0, 2].flatMap((row) => [0, 1].map((column) => ({ start: [row, column], size: [2, 1] })))
    expect(tilingFault([4, 2], grid)).toBe(null)
    const moved = grid.map((box, i) => (i === 3 ? { ...box, start: [1, 1] } : box))
    expect(tilingFault([4, 2], moved)).toContain('overlap')
  })
  it('takes thousands of columns in one sweep', () => {
    const begin = performance.now()
    expect(tilingFault([4, 20_000], columns(20_000))).toBe(null)
    expect(performance.now() - begin).toBeLessThan(2000)
  })
})
