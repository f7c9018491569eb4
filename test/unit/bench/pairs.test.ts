// Statistics of alternated pairs: which count, and what is made of them.
import { expect, test } from 'vitest'
import { foreignShare, type Pair, quantile, ratioOf } from '../../../bench/pairs.js'

const pair = (peer: number, ours: number, foreign = 0): Pair => ({ peer, ours, foreign })

test('quantiles are interpolated, whatever the order', () => {
  expect(quantile([3, 1, 2], 0.5)).toBe(2)
  expect(quantile([4, 1, 3, 2], 0.5)).toBe(2.5)
  expect(quantile([4, 1, 3, 2], 0.25)).toBe(1.75)
  expect(quantile([10, 9], 0)).toBe(9)
  expect(quantile([7], 0.25)).toBe(7)
})

test('the median of ratios is taken, not the ratio of medians', () => {
  const found = ratioOf([pair(2, 1), pair(30, 10), pair(100, 25)])
  expect(found).toEqual({ median: 3, lowerQuartile: 2.5, peerSeconds: 30, oursSeconds: 10, pairs: 3, dropped: 0 })
})

test('disturbed pairs are dropped', () => {
  const found = ratioOf([pair(2, 1, 0.06), pair(9, 1, 0.07), pair(2, 1), pair(2, 1)])
  expect([found.median, found.pairs, found.dropped]).toEqual([2, 3, 1])
})

test('where most are disturbed, the less disturbed half counts', () => {
  const found = ratioOf([pair(9, 1, 0.9), pair(2, 1, 0.2), pair(3, 1, 0.3), pair(8, 1, 0.8), pair(4, 1, 0.01)])
  expect([found.median, found.pairs, found.dropped]).toEqual([3, 3, 2])
})

test('what others took is the busy time that is not of the measured processes, and never below 0', () => {
  const before = { busy: 100, own: 50, at: 0 }
  const alone = foreignShare(before, { busy: 200, own: 150, at: 1000 })
  const beside = foreignShare(before, { busy: 200, own: 100, at: 1000 })
  const twice = foreignShare(before, { busy: 200, own: 100, at: 500 })
  expect(alone).toBe(0)
  expect(beside).toBeGreaterThan(0)
  expect(twice).toBeCloseTo(2 * beside, 12)
  expect(foreignShare(before, { busy: 100, own: 60, at: 1000 })).toBe(0)
})
