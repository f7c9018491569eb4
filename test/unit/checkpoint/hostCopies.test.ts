// Which ranks of a host share what they read. That the bytes arrive is seen with real ranks in test/ranks/online.test.ts.
import { describe, expect, it } from 'vitest'
import { areAlike, partsOfHosts } from '../../../lib/checkpoint/hostCopies.js'

/** Ranks with their hosts in a grid with tp fastest: the groups along tp and along dp. */
function grid(hosts: string, tp: number) {
  const all = [...hosts].map((host, rank) => ({ host, rank }))
  const along = (same: (rank: number) => number) =>
    partsOfHosts(
      all.map(({ host, rank }) => ({ host, ranks: all.map((r) => r.rank).filter((r) => same(r) === same(rank)) })),
    )
  return { tp: along((r) => Math.floor(r / tp)), dp: along((r) => r % tp) }
}

describe('partsOfHosts', () => {
  it('keeps the groups of one host, in the order of the world', () => {
    const { tp, dp } = grid('AAAA', 2)
    expect([tp, dp]).toEqual([
      [
        [0, 1],
        [2, 3],
      ],
      [
        [0, 2],
        [1, 3],
      ],
    ])
    expect(areAlike(tp, dp)).toBe(true)
  })
  it('cuts groups where hosts do', () => {
    const { tp, dp } = grid('AABBAABB', 4)
    expect(tp).toEqual([
      [0, 1],
      [2, 3],
      [4, 5],
      [6, 7],
    ])
    expect(dp).toEqual([
      [0, 4],
      [1, 5],
      [2, 6],
      [3, 7],
    ])
    expect(areAlike(tp, dp)).toBe(true)
  })
  it('sees where copies of one tensor-parallel group would not agree on who reads', () => {
    const { tp, dp } = grid('AAAAABBB', 2)
    expect(tp).toEqual([[0, 1], [2, 3], [4], [5], [6, 7]])
    expect(dp).toEqual([[0, 2, 4], [1, 3], [5, 7], [6]])
    expect(areAlike(tp, dp)).toBe(false)
  })
})
