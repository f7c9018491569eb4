// The order in which samples are read: a permutation of an epoch that is computed for each place by itself, from (seed, epoch).
// No array, no state: a resumed run asks for the same places and gets the same samples.

/** A well mixed 32-bit number of three. The finaliser's constants are those of MurmurHash3. */
export function mix32(a: number, b: number, c: number): number {
  let h =
    Math.imul(a ^ 0x9e3779b9, 0x85ebca6b) ^
    Math.imul(b + 0x7f4a7c15, 0xc2b2ae35) ^
    Math.imul(c ^ 0x165667b1, 0x27d4eb2f)
  for (let round = 0; round < 2; round++) {
    h ^= h >>> 16
    h = Math.imul(h, 0x85ebca6b)
    h ^= h >>> 13
    h = Math.imul(h, 0xc2b2ae35)
    h ^= h >>> 16
  }
  return h >>> 0
}

/**
 * Place `index` of a permutation of 0 to count - 1: a Feistel network over the next even number of bits, walked until the
 * result is inside.
 */
export function permuted(index: number, count: number, seed: number, epoch: number): number {
  if (count <= 1) return 0
  let half = 1
  while (4 ** half < count) half++
  const size = 2 ** half
  let value = index
  do {
    let left = Math.floor(value / size)
    let right = value % size
    for (let round = 0; round < 6; round++) {
      const next = (left ^ (mix32(seed, epoch * 8 + round, right) & (size - 1))) >>> 0
      left = right
      right = next
    }
    value = left * size + right
  } while (value >= count)
  return value
}

/** Sample to read at place `position` of an endless run over `count` samples, shuffled anew in each epoch. */
export function sampleAt(position: number, count: number, seed: number): number {
  const epoch = Math.floor(position / count)
  return permuted(position % count, count, seed, epoch)
}
