// Token ids of the benchmarks, and the batch that our side makes of them.
import type { TokenBatch } from '../lib/models/batch.js'

/** Repeatable token ids (mulberry32). */
export function randomTokens(rows: number, length: number, vocabulary: number, seed: number): number[][] {
  let state = seed
  const next = () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
  return Array.from({ length: rows }, () => Array.from({ length }, () => Math.floor(next() * vocabulary)))
}

/** Labels are the next tokens; the last position has none. */
export function batchOf(tokens: readonly (readonly number[])[]): TokenBatch {
  const seqLength = tokens[0]?.length ?? 0
  return {
    batchSize: tokens.length,
    seqLength,
    tokens: Int32Array.from(tokens.flat()),
    labels: Int32Array.from(tokens.flatMap((row) => [...row.slice(1), -100])),
  }
}
