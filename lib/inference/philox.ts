// Philox 4x32-10 on the host, for sampling: a uniform number is a function of (seed, sequence, position) and of nothing else, so
// that every rank of every layout draws the same token. Constants: Salmon et al., SC'11.

const multiplierA = 0xd2511f53
const multiplierB = 0xcd9e8d57
const weylA = 0x9e3779b9
const weylB = 0xbb67ae85

/** High and low half of a 32 × 32 bit product. */
function multiply(a: number, b: number): [number, number] {
  const product = BigInt(a) * BigInt(b)
  return [Number(product >> 32n), Number(product & 0xffffffffn)]
}

/** Four 32-bit numbers of a counter under a key. */
export function philox(
  counter: readonly [number, number, number, number],
  key: readonly [number, number],
): [number, number, number, number] {
  let [c0, c1, c2, c3] = counter
  let [k0, k1] = key
  for (let round = 0; round < 10; round++) {
    const [highA, lowA] = multiply(multiplierA, c0)
    const [highB, lowB] = multiply(multiplierB, c2)
    ;[c0, c1, c2, c3] = [(highB ^ c1 ^ k0) >>> 0, lowB, (highA ^ c3 ^ k1) >>> 0, lowA]
    k0 = (k0 + weylA) >>> 0
    k1 = (k1 + weylB) >>> 0
  }
  return [c0, c1, c2, c3]
}

/** A number of [0, 1) with 53 random bits for a place: key (seed, 0), counter (sequence, position). */
export function uniformAt(seed: number, sequence: number, position: number): number {
  const low = (value: number) => (value % 2 ** 32) >>> 0
  const high = (value: number) => Math.floor(value / 2 ** 32) >>> 0
  const [a, b] = philox([low(sequence), high(sequence), low(position), high(position)], [low(seed), high(seed)])
  return ((a >>> 5) * 2 ** 26 + (b >>> 6)) / 2 ** 53
}
