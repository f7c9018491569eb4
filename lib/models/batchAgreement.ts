// Each rank of a copy of the model has every micro-batch: all of their shapes, positions, bounds of sequences and sample ids, whether it
// reads the tokens or not. This checks that they are the same ones, since ranks that differ would wait for one another, or add up
// parts of different things.
import { createHash } from 'node:crypto'
import { ViaductError } from '../base/errors.js'
import { allGatherObject } from '../parallel/collectives.js'
import type { Ctx } from '../tensor/ctx.js'
import type { TokenBatch } from './batch.js'

const arrays = [
  'tokens',
  'labels',
  'positionIds',
  'attentionMask',
  'firstKeys',
  'sampleIds',
] as const satisfies readonly (keyof TokenBatch)[]

/** A batch by field, its arrays by what they hash to. */
type Described = Readonly<Record<string, number | boolean | string | null>>

interface Told {
  readonly rank: number
  readonly batches: readonly Described[]
}

const hashOf = (data: string | Uint8Array) => createHash('sha256').update(data).digest('base64')

function describe(batch: TokenBatch): Described {
  const { batchSize, seqLength, packed = false, start = 0 } = batch
  const hashes = arrays.map((name) => {
    const data = batch[name]
    if (data === undefined) return [name, null]
    return [name, hashOf(new Uint8Array(data.buffer, data.byteOffset, data.byteLength))]
  })
  return { batchSize, seqLength, packed, start, ...Object.fromEntries(hashes) }
}

/**
 * Compares micro-batches over the ranks of a copy of the model; each of these calls it. One short exchange where they are the same.
 * @throws ERR_DATA on each of these ranks, naming a rank and the first difference.
 */
export async function checkSameBatches(ctx: Ctx, microBatches: readonly TokenBatch[]): Promise<void> {
  const group = ctx.groups.get('tp_pp')
  if (group.size === 1) return
  const own = microBatches.map(describe)
  const hashes = await allGatherObject(hashOf(JSON.stringify(own)).slice(0, 8), group)
  const odd = hashes.findIndex((hash) => hash !== hashes[0])
  if (odd < 0) return
  const all = await allGatherObject({ rank: ctx.groups.get('world').rank, batches: own }, group)
  const [{ rank: a, batches: first }, { rank: b, batches: other }] = [all[0], all[odd]] as [Told, Told]
  const told = (text: string) =>
    new ViaductError(
      'ERR_DATA',
      'batch',
      `expected the same micro-batches on all ranks of a copy of the model, got ${text}: give each rank of tp and pp the data of its data-parallel rank`,
      { ranks: [a, b] },
    )
  if (first.length !== other.length) throw told(`${first.length} on rank ${a} and ${other.length} on rank ${b}`)
  const m = first.findIndex((batch, i) => JSON.stringify(batch) !== JSON.stringify(other[i]))
  const [x, y] = [first[m] as Described, other[m] as Described]
  const field = Object.keys(x).find((key) => x[key] !== y[key]) as string
  const isArray = (arrays as readonly string[]).includes(field)
  const values = isArray ? 'other values' : `${x[field]} on rank ${a} and ${y[field]}`
  throw told(`${field} of micro-batch ${m} with ${values} on rank ${b}`)
}
