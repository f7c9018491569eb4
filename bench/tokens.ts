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

/** Sequences put into rows of `rowLength`, the longest first, each into the first row that has room for it. */
export function packedBatch(sequences: readonly (readonly number[])[], rowLength: number): TokenBatch {
  const rows: (readonly number[])[][] = []
  const lengthOf = (row: readonly (readonly number[])[]) => row.reduce((n, sequence) => n + sequence.length, 0)
  for (const sequence of [...sequences].sort((a, b) => b.length - a.length)) {
    const room = rows.find((row) => lengthOf(row) + sequence.length <= rowLength)
    if (room === undefined) rows.push([sequence])
    else room.push(sequence)
  }
  // What is left of a row is a sequence of its own without labels.
  const filled = rows.map((row) => [...row, Array<number>(rowLength - lengthOf(row)).fill(0)])
  const of = (f: (sequence: readonly number[], last: boolean) => number[]) =>
    Int32Array.from(filled.flatMap((row) => row.flatMap((sequence, i) => f(sequence, i === row.length - 1))))
  return {
    batchSize: rows.length,
    seqLength: rowLength,
    tokens: of((sequence) => [...sequence]),
    labels: of((sequence, fills) => (fills ? sequence.map(() => -100) : [...sequence.slice(1), -100])),
    positionIds: of((sequence) => sequence.map((_, i) => i)),
    packed: true,
  }
}
