// Attention whose keys and values travel from rank to rank, in a ring, while each attends to those that are there (Megatron's form
// `p2p`). Each rank has two runs of every sequence (contextShards.ts); of two runs only what causality lets see is computed, and what
// runs of keys give is merged by their log-sum-exps. Backwards, gradients of keys and values travel on with them, as float32 sums, and
// come home last. Legend as in ops/attention.ts; h: tokens of a run.
import { native } from '../addon/load.js'
import { type AttentionArgs, attentionMask, heads, unpack } from '../ops/attention.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { pointToPoint } from './collectives.js'
import { pick } from './contextShards.js'

export interface RingArgs extends AttentionArgs {
  /** int32 [2 · ranks, B, S]: the first visible key of each query, counted from the start of each run of keys. */
  readonly firstKey?: Tensor | null
  /** int32 [2 · ranks, B] */
  readonly keyEnd?: Tensor | null
  readonly ring: Group
}

type Half = 0 | 1

/** A run of queries and one of keys that it sees something of. */
interface Pair {
  readonly query: Half
  readonly key: Half
  /** The number of the run of keys in the sequence. */
  readonly run: number
  /** Tokens from the first key to the first query. */
  readonly distance: number
}

/** Pairs of this rank's queries and another rank's keys. */
function pairsWith(peer: number, { ring, window = 0 }: RingArgs, length: number): Pair[] {
  const runs = (rank: number) => [rank, 2 * ring.size - 1 - rank] as const
  return runs(ring.rank).flatMap((mine, query) =>
    runs(peer).flatMap((run, key) => {
      const distance = (mine - run) * length
      const seen = distance >= 0 && (window === 0 || distance - length + 1 < window)
      return seen ? [{ query: query as Half, key: key as Half, run, distance }] : []
    }),
  )
}

/** Runs of this rank's packed tokens, and what attention is told of a pair of them. */
class Runs {
  readonly length: number

  constructor(
    readonly ctx: Ctx,
    readonly args: RingArgs,
  ) {
    this.length = (args.qkv.shape[0] as number) / args.batchSize / 2
  }

  /** Of a tensor [B, S, ...]. */
  of(t: Tensor, half: Half): Tensor {
    return t.slice(this.ctx, 1, half * this.length, this.length)
  }

  /** Both runs apart, [2, ...], of what `make` gives for [B, h, G, R, D]. */
  apart(dtype: 'float32' | Tensor['dtype']): Tensor {
    const { batchSize: B, groups: G, queriesPerGroup: R, channels: D } = this.args
    return this.ctx.empty([2, B, this.length, G, R, D], dtype)
  }

  /** Keys and values, run by run: [2, 2, B, h, G, D]. */
  keys(dtype: Tensor['dtype']): Tensor {
    const { batchSize: B, groups: G, channels: D } = this.args
    return this.ctx.empty([2, 2, B, this.length, G, D], dtype)
  }

  /** What attention is told of a pair. */
  mask({ query, run, distance }: Pair) {
    const { firstKey, keyEnd } = this.args
    return attentionMask(
      {
        ...this.args,
        firstKey: firstKey ? this.of(pick(this.ctx, firstKey, run), query) : null,
        keyEnd: keyEnd ? pick(this.ctx, keyEnd, run) : null,
        causal: distance < this.length,
      },
      distance,
    )
  }
}

const halves = [0, 1] as const

/** Writes between packed keys and values and [2, 2, B, h, G, D]. */
function copyKeys(ctx: Ctx, runs: Runs, apart: Tensor, packed: { k: Tensor; v: Tensor }, apartFirst: boolean): void {
  for (const half of halves)
    for (const [i, t] of [packed.k, packed.v].entries()) {
      const [block, run] = [pick(ctx, pick(ctx, apart, half), i), runs.of(t, half)]
      const [to, from] = apartFirst ? [block, run] : [run, block]
      native.copy(ctx.stream.id, to.handle, from.handle)
    }
}

const filled = (ctx: Ctx, t: Tensor, value: number): Tensor => {
  native.fill(ctx.stream.id, t.handle, value)
  return t
}

/** Moves tensors one rank on while the compute stream goes on; returns the stream to wait for. */
function pass(ctx: Ctx, ring: Group, moves: readonly { readonly out: Tensor; readonly into: Tensor }[]) {
  const comm = ctx.comm('cp')
  const next = (ring.rank + 1) % ring.size
  const previous = (ring.rank + ring.size - 1) % ring.size
  pointToPoint(
    comm,
    ring,
    moves.map(({ out }) => ({ tensor: out, peer: next })),
    moves.map(({ into }) => ({ tensor: into, peer: previous })),
  )
  return comm.stream
}

/** Attention of queries and keys as they are, to `y` [T, G·R·D] and lse float32 [2, B, G·R, h]. */
export function ringForward(ctx: Ctx, args: RingArgs, y: Tensor, lse: Tensor): void {
  const { qkv, ring, batchSize: B, groups: G, queriesPerGroup: R } = args
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const runs = new Runs(inner, args)
  const { q, k, v } = unpack(inner, qkv, args)
  let [block, spare] = [runs.keys(qkv.dtype), runs.keys(qkv.dtype)]
  copyKeys(inner, runs, block, { k, v }, true)
  const whole = heads(inner, y, args)
  const sums = y.dtype === 'float32' ? null : runs.apart('float32')
  const sum = (half: Half) => (sums === null ? runs.of(whole, half) : pick(inner, sums, half))
  for (const half of halves) filled(inner, sum(half), 0)
  filled(inner, lse, Number.NEGATIVE_INFINITY)
  const part = pick(inner, runs.apart(y.dtype), 0)
  const partLse = inner.empty([B, G * R, runs.length], 'float32')
  for (let step = 0; step < ring.size; step++) {
    const last = step === ring.size - 1
    const comm = last ? null : pass(inner, ring, [{ out: block, into: spare }])
    for (const pair of pairsWith((ring.rank - step + ring.size) % ring.size, args, runs.length)) {
      const keys = pick(inner, block, pair.key)
      native.attentionForward(
        ctx.stream.id,
        part.handle,
        partLse.handle,
        runs.of(q, pair.query).handle,
        pick(inner, keys, 0).handle,
        pick(inner, keys, 1).handle,
        ...runs.mask(pair),
      )
      const into = pick(inner, lse, pair.query)
      native.mergeAttention(ctx.stream.id, sum(pair.query).handle, into.handle, part.handle, partLse.handle)
    }
    if (comm !== null) ctx.stream.wait(comm)
    ;[block, spare] = [spare, block]
  }
  if (sums !== null)
    for (const half of halves) native.copy(ctx.stream.id, runs.of(whole, half).handle, sum(half).handle)
}

/** The gradients of the packed queries, keys and values. */
export function ringBackward(ctx: Ctx, args: RingArgs, dqkv: Tensor, dy: Tensor, y: Tensor, lse: Tensor): void {
  const { qkv, ring } = args
  using scope = new Scope()
  const inner = ctx.with({ scope })
  const { id } = ctx.stream
  const runs = new Runs(inner, args)
  const { q, k, v } = unpack(inner, qkv, args)
  const d = unpack(inner, dqkv, args)
  const [out, dOut] = [heads(inner, y, args), heads(inner, dy, args)]
  let [block, spare] = [runs.keys(qkv.dtype), runs.keys(qkv.dtype)]
  copyKeys(inner, runs, block, { k, v }, true)
  const dq = filled(inner, runs.apart('float32'), 0)
  const dqPart = pick(inner, runs.apart(qkv.dtype), 0)
  let [sum, arriving] = [filled(inner, runs.keys('float32'), 0), runs.keys('float32')]
  for (let step = 0; step < ring.size; step++) {
    const moves = [
      ...(step < ring.size - 1 ? [{ out: block, into: spare }] : []),
      ...(step > 0 ? [{ out: sum, into: arriving }] : []),
    ]
    const comm = pass(inner, ring, moves)
    using stepScope = new Scope()
    const here = inner.with({ scope: stepScope })
    const pairs = pairsWith((ring.rank - step + ring.size) % ring.size, args, runs.length)
    const parts = pairs.map((pair) => {
      const keys = pick(here, block, pair.key)
      const dKeys = here.empty(keys.shape, keys.dtype)
      native.attentionBackward(
        id,
        dqPart.handle,
        pick(here, dKeys, 0).handle,
        pick(here, dKeys, 1).handle,
        runs.of(dOut, pair.query).handle,
        runs.of(q, pair.query).handle,
        pick(here, keys, 0).handle,
        pick(here, keys, 1).handle,
        runs.of(out, pair.query).handle,
        pick(here, lse, pair.query).handle,
        ...runs.mask(pair),
      )
      native.accumulate(id, pick(here, dq, pair.query).handle, dqPart.handle)
      return dKeys
    })
    ctx.stream.wait(comm)
    if (step > 0) [sum, arriving] = [arriving, sum]
    for (const [i, { key }] of pairs.entries())
      native.accumulate(id, pick(here, sum, key).handle, (parts[i] as Tensor).handle)
    ;[block, spare] = [spare, block]
  }
  ctx.stream.wait(pass(inner, ring, [{ out: sum, into: arriving }]))
  copyKeys(inner, runs, arriving, d, false)
  for (const half of halves) native.copy(id, runs.of(d.q, half).handle, pick(inner, dq, half).handle)
}
