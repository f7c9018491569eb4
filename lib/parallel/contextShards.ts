// Context parallelism: each rank of cp has two runs of every sequence, one from its front and one from its back, so that with causal
// attention all have as many keys to look at: of 2·cp runs rank r has runs r and 2·cp-1-r. Where 2·cp does not divide a sequence, it is
// filled up at its end by tokens that nobody sees and that have no label.
import { native } from '../addon/load.js'
import type { Ctx, Group, Groups } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { allGather, reduceScatterInto } from './collectives.js'

type Place = Pick<Group, 'rank' | 'size'>

/**
 * The ranks that share a sequence and how they work together: those of `heads`, neighbours in cp, exchange tokens for heads; through
 * those of `ring` keys and values travel. Where both are this rank alone, keys and values of all of cp are gathered.
 */
export interface ContextGroups {
  readonly cp: Group
  readonly heads: Group
  readonly ring: Group
}

/** The groups of a mesh; null where each rank has all of its sequences. */
export function contextGroups(groups: Groups): ContextGroups | null {
  const cp = groups.get('cp')
  return cp.size === 1 ? null : { cp, heads: groups.get('cp_heads'), ring: groups.get('cp_ring') }
}

/** Tokens of one of the 2·cp runs. */
export const runLength = (seqLength: number, { size }: Pick<Group, 'size'>): number => Math.ceil(seqLength / (2 * size))

/** Where this rank's two runs begin in the sequence. */
export function runStarts(seqLength: number, { rank, size }: Place): readonly [number, number] {
  const length = runLength(seqLength, { size })
  return [rank * length, (2 * size - 1 - rank) * length]
}

/** Tokens of a sequence with those that fill it up. */
const filledLength = (seqLength: number, cp: Pick<Group, 'size'>) => 2 * cp.size * runLength(seqLength, cp)

/**
 * Of each of this rank's tokens its place in [B, S], row by row; -1 for what fills up.
 * @param filled - tokens of a sequence with those that fill it up.
 */
export function ownPlaces(
  batchSize: number,
  seqLength: number,
  group: Place,
  filled = filledLength(seqLength, group),
): Int32Array {
  const length = runLength(filled, group)
  const starts = runStarts(filled, group)
  const places = new Int32Array(batchSize * 2 * length)
  for (let b = 0, at = 0; b < batchSize; b++)
    for (const start of starts)
      for (let i = start; i < start + length; i++) places[at++] = i < seqLength ? b * seqLength + i : -1
  return places
}

/** What queries see, as attention over shared sequences takes it: keys in runs, each counted from its own first key. */
export interface KeyBounds {
  /** [keyRuns, B, queries] */
  readonly firstKey: Int32Array | null
  /** [keyRuns, B] */
  readonly keyEnd: Int32Array | null
  readonly keyRuns: number
  /** Tokens of a row whose queries attention sees on this rank. */
  readonly queries: number
}

/** @param firstKey - [B, S]. @param keyEnd - [B]. */
export function keyBounds(
  batchSize: number,
  seqLength: number,
  { cp, heads, ring }: ContextGroups,
  firstKey: Int32Array | null,
  keyEnd: Int32Array | null,
): KeyBounds {
  const filled = filledLength(seqLength, cp)
  const gathered = heads.size * ring.size === 1
  const places = ownPlaces(batchSize, seqLength, gathered ? cp : ring, filled)
  const keyRuns = ring.size === 1 ? 1 : 2 * ring.size
  const byRun = (values: Int32Array) =>
    Int32Array.from({ length: keyRuns * values.length }, (_, i) => {
      const run = Math.floor(i / values.length)
      return (values[i % values.length] as number) - (run * filled) / keyRuns
    })
  const seen = firstKey && places.map((at) => (at < 0 ? 0 : (firstKey[at] as number)))
  return { firstKey: seen && byRun(seen), keyEnd: keyEnd && byRun(keyEnd), keyRuns, queries: places.length / batchSize }
}

/** Element i of the first dim. */
export const pick = (ctx: Ctx, t: Tensor, i: number): Tensor => t.slice(ctx, 0, i, 1).reshape(ctx, t.shape.slice(1))

/** The runs of a tensor with the tokens of all ranks as [B, S', ...], of which the first half of each rank's block is its first run. */
export function runViews(ctx: Ctx, whole: Tensor, byRank: Tensor, batchSize: number, group: Pick<Group, 'size'>) {
  const rest = whole.shape.slice(2)
  const length = (whole.shape[1] as number) / (2 * group.size)
  const views: { readonly sequence: Tensor; readonly rank: Tensor }[] = []
  for (let rank = 0; rank < group.size; rank++) {
    const own = byRank.slice(ctx, 0, rank, 1).reshape(ctx, [batchSize, 2 * length, ...rest])
    runStarts(2 * group.size * length, { rank, size: group.size }).forEach((start, half) => {
      const sequence = whole.slice(ctx, 1, start, length)
      views.push({ sequence, rank: own.slice(ctx, 1, half * length, length) })
    })
  }
  return views
}

/** Every rank's tokens [B, s, ...] in the order of the sequences: [B, cp · s, ...]. Owned by the scope. */
export function gatherSequence(ctx: Ctx, own: Tensor, group: Group): Tensor {
  const [B = 0, s = 0, ...rest] = own.shape
  const whole = ctx.empty([B, group.size * s, ...rest], own.dtype)
  using scope = new Scope()
  const inner = ctx.with({ scope })
  for (const { sequence, rank } of runViews(inner, whole, allGather(inner, own, group), B, group))
    native.copy(ctx.stream.id, sequence.handle, rank.handle)
  return whole
}

/** This rank's tokens of the sum over cp of tensors in the order of the sequences; written to `out`, [B, s, ...], contiguous. */
export function reduceScatterSequence(ctx: Ctx, out: Tensor, whole: Tensor, group: Group): void {
  const [B = 0, ...rest] = out.shape
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const byRank = inner.empty([group.size, ...out.shape], whole.dtype)
  for (const { sequence, rank } of runViews(inner, whole, byRank, B, group))
    native.copy(ctx.stream.id, rank.handle, sequence.handle)
  reduceScatterInto(inner, out, byRank.reshape(inner, [group.size * B, ...rest]), group)
}
