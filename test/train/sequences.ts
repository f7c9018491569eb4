// The sequences of a step as micro-batches of several forms: each alone, packed into rows, padded on the left or on the right. Micro-batches
// have their own number of rows and their own length; whatever the form, losses and gradients are the same.
import type { TokenBatch } from '../../lib/models/batch.js'
import { fixtureBatches } from './fixtureRun.js'

export type Form = 'alone' | 'packed' | 'left' | 'right'

interface Sequence {
  readonly id: bigint
  readonly tokens: Int32Array
  readonly labels: Int32Array
}

/** Of unequal lengths, down to one token; of some only a few labels count. */
function sequencesOf(step: number): Sequence[] {
  return fixtureBatches(step, 1).map(({ seqLength, tokens, labels }, m) => {
    const length = 1 + ((7 * m + 5 * step + 4) % seqLength)
    const counted = (labels as Int32Array).slice(0, length).map((label, i) => (m % 3 === 1 && i % 3 > 0 ? -100 : label))
    return { id: BigInt(100 * step + m), tokens: tokens.slice(0, length), labels: counted }
  })
}

/** A row: sequences one behind the other, on the left `left` tokens that are none. */
interface Row {
  readonly sequences: readonly Sequence[]
  readonly left: number
}

const lengthOf = ({ sequences, left }: Row) => sequences.reduce((sum, { tokens }) => sum + tokens.length, left)

/** Rows filled up on the right to the longest. Fillers would change something if anybody saw them. */
function batchOf(rows: readonly Row[], packed: boolean): TokenBatch {
  const [batchSize, seqLength] = [rows.length, Math.max(...rows.map(lengthOf))]
  const T = batchSize * seqLength
  const tokens = new Int32Array(T).fill(99)
  const labels = new Int32Array(T).fill(-100)
  const positionIds = new Int32Array(T)
  const attentionMask = new Uint8Array(T)
  const sampleIds = new BigInt64Array(T).fill(-1n)
  rows.forEach(({ sequences, left }, row) => {
    let at = row * seqLength + left
    for (const { id, tokens: own, labels: ownLabels } of sequences) {
      const end = at + own.length
      tokens.set(own, at)
      labels.set(ownLabels, at)
      positionIds.set(
        own.map((_, i) => i),
        at,
      )
      attentionMask.fill(1, at, end)
      sampleIds.fill(id, at, end)
      at = end
    }
  })
  const isWhole = attentionMask.every((real) => real === 1)
  const mask = isWhole ? {} : { attentionMask }
  return { batchSize, seqLength, tokens, labels, positionIds, sampleIds, ...mask, ...(packed ? { packed } : {}) }
}

/** Which sequences share a row, and which rows a micro-batch: of every other step there is one micro-batch only. */
const plans = [
  [[[0, 1, 2]], [[3], [4, 5]], [[6], [7]]],
  [
    [
      [0, 1, 2, 3],
      [4, 5, 6, 7],
    ],
  ],
]

/** The micro-batches of a step; of those, the ones of a data-parallel rank. */
export function sequenceBatches(form: Form, step: number, rank = 0, dp = 1): TokenBatch[] {
  const sequences = sequencesOf(step)
  const at = (i: number) => sequences[i] as Sequence
  const of = (m: number) => m % dp === rank
  const plan = (plans[step % plans.length] as (typeof plans)[number]).filter((_, m) => of(m))
  const alone = (i: number): Row => ({ sequences: [at(i)], left: 0 })
  if (form === 'alone') return sequences.filter((_, m) => of(m)).map((_, m) => batchOf([alone(m * dp + rank)], false))
  if (form === 'packed')
    return plan.map((rows) =>
      batchOf(
        rows.map((row) => ({ sequences: row.map(at), left: 0 })),
        true,
      ),
    )
  return plan.map((rows) => {
    const one = rows.flat().map(alone)
    const longest = Math.max(...one.map(lengthOf))
    const left = (row: Row) => (form === 'left' ? longest - lengthOf(row) : 0)
    return batchOf(
      one.map((row) => ({ ...row, left: left(row) })),
      false,
    )
  })
}
