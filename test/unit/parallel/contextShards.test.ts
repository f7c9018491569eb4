// Which tokens a rank of cp has: each of every sequence on one rank, runs from both ends, as much attention on each rank.
import { expect, it } from 'vitest'
import { ownPlaces, runLength, runStarts } from '../../../lib/parallel/contextShards.js'

it.each([
  [1, 8, 2],
  [2, 8, 2],
  [2, 16, 4],
  [3, 10, 2],
  [1, 5, 4],
  [2, 24, 3],
])('%i sequences of %i tokens on %i ranks', (B, S, size) => {
  const all = Array.from({ length: size }, (_, rank) => ownPlaces(B, S, { rank, size }))
  const length = runLength(S, { size })
  expect(all.every((places) => places.length === B * 2 * length)).toBe(true)
  const real = all.flatMap((places) => Array.from(places)).filter((at) => at >= 0)
  expect(real.sort((a, b) => a - b)).toEqual(Array.from({ length: B * S }, (_, i) => i))
  // What fills up stands at the end of the sequence, which the first rank has.
  const fillers = all.map((places) => places.filter((at) => at < 0).length)
  expect(fillers.reduce((sum, n) => sum + n, 0)).toBe(B * (2 * size * length - S))
  // Each rank's queries look at as many keys.
  const keys = Array.from({ length: size }, (_, rank) =>
    runStarts(S, { rank, size }).reduce((sum, start) => sum + length * start + (length * (length + 1)) / 2, 0),
  )
  expect(new Set(keys).size).toBe(1)
})
