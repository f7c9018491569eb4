// Collectives on tensors, enqueued on ctx.stream, and small host values. Sums are taken in rank order, bf16 and f16 in float32:
// the same bits on all ranks. Every rank of the group calls the same collectives in the same order. One rank: nothing or a copy.
import { createHash } from 'node:crypto'
import { native } from '../addon/load.js'
import { ViaductError } from '../base/errors.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'

/** How values of several ranks become one. */
export type Reduction = 'sum' | 'max' | 'min'

const codes: Readonly<Record<Reduction, number>> = { sum: 0, max: 1, min: 2 }

/**
 * Reduces over the group, in place; every rank has the result. NaN wins over any number in max and min.
 * @returns `t`
 * @throws ERR_LAYOUT unless contiguous, ERR_DTYPE for float8; later ERR_COMM, ERR_TIMEOUT on the stream.
 */
export function allReduce(ctx: Ctx, t: Tensor, group: Group, op: Reduction = 'sum'): Tensor {
  if (group.size > 1) native.allReduce(group.comm, ctx.stream.id, t.handle, t.handle, codes[op])
  return t
}

/** Every rank's tensor, in rank order: [size, ...shape]. Owned by the scope. */
export function allGather(ctx: Ctx, t: Tensor, group: Group): Tensor {
  const out = ctx.empty([group.size, ...t.shape], t.dtype)
  if (group.size > 1) native.allGather(group.comm, ctx.stream.id, out.handle, t.handle)
  else native.copy(ctx.stream.id, ctx.view(out, t.shape).handle, t.handle)
  return out
}

/** Every rank's rows, one after the other in rank order: [n, ...rest] gives [size · n, ...rest]. Owned by the scope. */
export function gatherRows(ctx: Ctx, t: Tensor, group: Group): Tensor {
  const [rows = 1, ...rest] = t.shape
  const out = ctx.empty([group.size * rows, ...rest], t.dtype)
  gatherRowsInto(ctx, out, t, group)
  return out
}

/** As gatherRows, into a tensor that is there. */
export function gatherRowsInto(ctx: Ctx, out: Tensor, t: Tensor, group: Group): void {
  if (group.size > 1) native.allGather(group.comm, ctx.stream.id, out.handle, t.handle)
  else native.copy(ctx.stream.id, out.handle, t.handle)
}

/**
 * Reduces over the group; rank r gets block r of the first dim: [n, ...rest] gives [n / size, ...rest]. Owned by the scope.
 * @throws ERR_SHAPE when the group's size does not divide the first dim.
 */
export function reduceScatter(ctx: Ctx, t: Tensor, group: Group, op: Reduction = 'sum'): Tensor {
  const out = ctx.empty([blockRows(t, group, 'reduceScatter'), ...t.shape.slice(1)], t.dtype)
  reduceScatterInto(ctx, out, t, group, op)
  return out
}

/** As reduceScatter, into a tensor that is there. */
export function reduceScatterInto(ctx: Ctx, out: Tensor, t: Tensor, group: Group, op: Reduction = 'sum'): void {
  if (group.size > 1) native.reduceScatter(group.comm, ctx.stream.id, out.handle, t.handle, codes[op])
  else native.copy(ctx.stream.id, out.handle, t.handle)
}

/**
 * Sums over the group in place: block r of the first dim has the sum on rank r, the other blocks stay as they were.
 * @throws ERR_SHAPE when the group's size does not divide the first dim.
 */
export function reduceScatterInPlace(ctx: Ctx, t: Tensor, group: Group): void {
  if (group.size === 1) return
  using own = ownBlock(ctx, t, group, 'reduceScatter')
  native.reduceScatter(group.comm, ctx.stream.id, own.handle, t.handle, codes.sum)
}

/** Rank r gives block r of the first dim to all, in place. @throws ERR_SHAPE when the group's size does not divide the first dim. */
export function allGatherInPlace(ctx: Ctx, t: Tensor, group: Group): void {
  if (group.size === 1) return
  using own = ownBlock(ctx, t, group, 'allGather')
  native.allGather(group.comm, ctx.stream.id, t.handle, own.handle)
}

function ownBlock(ctx: Ctx, t: Tensor, group: Group, op: string): Tensor {
  const rows = blockRows(t, group, op)
  return t.slice(ctx, 0, group.rank * rows, rows)
}

/** Rows of the first dim in the block of one rank. */
function blockRows(t: Tensor, { size }: Group, op: string): number {
  const [first = 1] = t.shape
  if (first % size === 0) return first / size
  throw new ViaductError('ERR_SHAPE', op, `expected a first dim that ${size} ranks divide, got ${t.toString()}`)
}

/** Rank `root` of the group gives its tensor to all, in place. Returns `t`. */
export function broadcast(ctx: Ctx, t: Tensor, root: number, group: Group): Tensor {
  if (group.size > 1) native.broadcast(group.comm, ctx.stream.id, t.handle, root)
  return t
}

/**
 * Exchanges rows of the first dim: `sendCounts[p]` rows go to rank p, `recvCounts[p]` come from it, in rank order.
 * Owned by the scope: [sum of recvCounts, ...rest].
 */
export function allToAll(
  ctx: Ctx,
  t: Tensor,
  sendCounts: readonly number[],
  recvCounts: readonly number[],
  group: Group,
): Tensor {
  const rows = recvCounts.reduce((sum, n) => sum + n, 0)
  const out = ctx.empty([rows, ...t.shape.slice(1)], t.dtype)
  allToAllInto(ctx, out, t, sendCounts, recvCounts, group)
  return out
}

/** As allToAll, into a tensor that is there. */
export function allToAllInto(
  ctx: Ctx,
  out: Tensor,
  t: Tensor,
  sendCounts: readonly number[],
  recvCounts: readonly number[],
  group: Group,
): void {
  if (group.size === 1) return native.copy(ctx.stream.id, out.handle, t.handle)
  const row = t.shape.slice(1).reduce((product, n) => product * n, 1)
  const elements = (counts: readonly number[]) => counts.map((n) => n * row)
  native.allToAll(group.comm, ctx.stream.id, out.handle, t.handle, elements(sendCounts), elements(recvCounts))
}

/** A tensor to or from a rank of the group. */
export interface PeerTransfer {
  readonly tensor: Tensor
  readonly peer: number
}

/** Sends and receives that progress together: no order can deadlock. Transfers of one direction with one peer keep order. */
export function pointToPoint(
  ctx: Ctx,
  group: Group,
  sends: readonly PeerTransfer[],
  recvs: readonly PeerTransfer[],
): void {
  if (sends.length === 0 && recvs.length === 0) return
  native.pointToPoint(
    group.comm,
    ctx.stream.id,
    sends.map((s) => s.tensor.handle),
    sends.map((s) => s.peer),
    recvs.map((r) => r.tensor.handle),
    recvs.map((r) => r.peer),
  )
}

/** Resolves when every rank of the group has come here. It does not wait for streams: sync them first where that matters. */
export async function barrier(group: Group): Promise<void> {
  if (group.size > 1) await native.gatherBytes(group.comm, new Uint8Array(0))
}

/** Every rank's value, in rank order, carried as JSON: for small host values. */
export async function allGatherObject<T>(value: T, group: Group): Promise<T[]> {
  const text = JSON.stringify([value])
  if (group.size === 1) return JSON.parse(text) as T[]
  const all = await native.gatherBytes(group.comm, new TextEncoder().encode(text))
  const decoder = new TextDecoder()
  return all.map((bytes) => (JSON.parse(decoder.decode(bytes)) as [T])[0])
}

/**
 * Compares a value over the ranks, e.g. the resolved configuration or the version, and lets nobody go on when it differs.
 * @param what - names the value in the error.
 * @throws ERR_CONFIG on every rank, naming the ranks that differ from rank 0 and the first differing place.
 */
export async function assertSameOnAllRanks(value: unknown, what: string, group: Group): Promise<void> {
  if (group.size === 1) return
  const text = JSON.stringify(value) ?? 'undefined'
  const hash = createHash('sha256').update(text).digest('hex')
  const hashes = await allGatherObject(hash, group)
  const odd = hashes.flatMap((h, rank) => (h === hashes[0] ? [] : [rank]))
  if (odd.length === 0) return
  const texts = await allGatherObject(text.length <= 1 << 20 ? text : `${text.slice(0, 1 << 20)}…`, group)
  const [a, b] = [texts[0] as string, texts[odd[0] as number] as string]
  let at = 0
  while (at < a.length && a[at] === b[at]) at++
  const around = (s: string) => JSON.stringify(s.slice(Math.max(0, at - 40), at + 40))
  throw new ViaductError(
    'ERR_CONFIG',
    'ranks',
    `expected the same ${what} on all ranks, got another on ${odd.length === 1 ? 'rank' : 'ranks'} ${odd.join(', ')}: ` +
      `rank 0 has ${around(a)}, rank ${odd[0]} has ${around(b)}: start all ranks with the same files and arguments`,
    { what, ranks: odd },
  )
}
