// The guard against regressions of speed: which rows it holds against which, and when it fails.
import { expect, test } from 'vitest'
import { compareRows, guardTable } from '../../../bench/guardReport.js'
import type { Row } from '../../../bench/results.js'

const row = (work: string, peer: string, median: number | null): Row =>
  ({ suite: 'train', work, peer, ratio: median === null ? null : { median }, pairs: [] }) as unknown as Row

test('a ratio below 0.9 of the committed one fails, whatever it is beside 1', () => {
  const committed = [row('a', 'tuned', 2), row('b', 'tuned', 1.2), row('c', 'tuned', 0.8)]
  const found = compareRows([row('a', 'tuned', 1.79), row('b', 'tuned', 1.09), row('c', 'tuned', 0.73)], committed)
  expect(found.map(({ work, holds }) => [work, holds])).toEqual([
    ['a', false],
    ['b', true],
    ['c', true],
  ])
  expect(guardTable(found)).toMatch(/^SLOW {2}a, tuned {2}1\.79x, committed 2\.00x {2}90%\nok {4}b, tuned/)
  expect(guardTable(found)).toMatch(/1 of 3 ratios are below 0.9/)
})

test('rows are held against the same work and peer alone; a number that is none fails', () => {
  const committed = [row('a', 'tuned', 1), row('a', 'as it comes', 3), row('memory', 'tuned', null)]
  const found = compareRows(
    [row('a', 'as it comes', 2.9), row('a', 'tuned', Number.NaN), row('memory', 'tuned', null)],
    committed,
  )
  expect(found.map(({ peer, holds }) => [peer, holds])).toEqual([
    ['as it comes', true],
    ['tuned', false],
  ])
})

test('looking at nothing is an error', () => {
  expect(() => compareRows([row('new', 'tuned', 1)], [row('old', 'tuned', 1)])).toThrow(/bench\/results/)
})
