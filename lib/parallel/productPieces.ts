// Matrix products beside collectives of tp, piece by piece: a piece of the rows is multiplied while others travel. Collectives run on the
// axis's communication stream. A piece has the bits that its rows have in the product of all rows, so nothing depends on how it is cut.
import { native } from '../addon/load.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Event } from '../tensor/stream.js'
import type { Tensor } from '../tensor/tensor.js'
import { allReduce, reduceScatterInto } from './collectives.js'
import { sharedRows } from './sharedRows.js'

/** The axis on whose communication stream they run. */
export const tensorParallelAxis = 'tp'

/** What rows are multiplied with. */
export interface Factor {
  /** [N, K] with `transposed`, else [K, N]. */
  readonly weight: Tensor
  readonly transposed: boolean
  /** [N] */
  readonly bias?: Tensor | null
}

/** Rows `first` to `first + count` of a batch or of a rank's run. */
interface Rows {
  readonly first: number
  readonly count: number
}

/** Rows of all ranks from which on they are cut: fewer are multiplied before a second thread has woken. */
const leastRows = 64
/** Rows from which on a sum travels in two pieces. Measured: four are no better in shared memory, and worse over TCP. */
const leastTwoPieces = 256

/** Cuts rows into pieces that travel one after the other. */
function piecesOf(rows: number): Rows[] {
  if (rows < leastTwoPieces) return [{ first: 0, count: rows }]
  const half = Math.floor(rows / 2)
  return [
    { first: 0, count: half },
    { first: half, count: rows - half },
  ]
}

/** Where a piece is summed: beside the product of the next one. Behind the last product there is nothing to compute meanwhile. */
const besideNext = (ctx: Ctx, piece: Rows, pieces: readonly Rows[]) =>
  piece === pieces.at(-1) ? ctx : ctx.comm(tensorParallelAxis)

/** The part of rank r's piece that lies within the batch: rows that only fill the last runs up are not multiplied. */
function realRows(rank: number, run: number, { first, count }: Rows, tokens: number): Rows {
  const from = Math.min(tokens, rank * run + first)
  return { first: from, count: Math.min(tokens, rank * run + first + count) - from }
}

/** One row alone: in bfloat16 it would have other bits than among others, so nothing is cut so. */
const isSingle = ({ count }: Rows) => count === 1

/** Rows of y = those of x times the factor, of a product of `tokens` rows. */
function multiplyRows(ctx: Ctx, y: Tensor, x: Tensor, { weight, transposed, bias }: Factor, tokens: number): void {
  const { id } = ctx.stream
  if (x.shape[0] === 0) return
  const biased = bias?.handle ?? 0
  if (x.shape[0] === tokens) native.matmul(id, y.handle, x.handle, weight.handle, biased, false, transposed, false)
  else native.matmulRows(id, y.handle, x.handle, weight.handle, biased, transposed, tokens)
}

/** The rows of all ranks, gathered beside compute. */
export class ArrivingRows {
  /** [tokens, K]; complete for what is enqueued behind `wait`. */
  readonly rows: Tensor
  readonly #own: Tensor
  readonly #group: Group
  #arrival: Event | null

  /**
   * Starts to gather.
   * @param own - this rank's run of rows, [sharedRows(tokens), K].
   */
  constructor(ctx: Ctx, own: Tensor, tokens: number, group: Group) {
    const [run, width] = own.shape as [number, number]
    const all = ctx.empty([run * group.size, width], own.dtype)
    const { stream } = ctx.comm(tensorParallelAxis)
    native.allGather(group.comm, stream.id, all.handle, own.handle)
    this.#arrival = stream.record()
    this.#own = own
    this.#group = group
    this.rows = all.shape[0] === tokens ? all : all.slice(ctx, 0, 0, tokens)
    if (this.rows !== all) all.dispose()
  }

  /** ctx.stream goes on behind the gather. */
  wait(ctx: Ctx): void {
    if (this.#arrival === null) return
    ctx.stream.wait(this.#arrival)
    this.#arrival.dispose()
    this.#arrival = null
  }

  /** y[tokens, N] = rows · factor: this rank's own at once, those of the others when they have come. */
  multiply(ctx: Ctx, y: Tensor, factor: Factor): void {
    const tokens = y.shape[0] as number
    const { rank } = this.#group
    const run = { first: 0, count: this.#own.shape[0] as number }
    const own = realRows(rank, run.count, run, tokens)
    const end = own.first + own.count
    const others = [
      { first: 0, count: own.first },
      { first: end, count: tokens - end },
    ]
    if (tokens < leastRows || [own, ...others].some(isSingle)) {
      this.wait(ctx)
      multiplyRows(ctx, y, this.rows, factor, tokens)
      return
    }
    const multiply = (from: Tensor, { first, count }: Rows) => {
      using into = y.slice(ctx, 0, first, count)
      multiplyRows(ctx, into, from, factor, tokens)
    }
    using mine = this.#own.slice(ctx, 0, 0, own.count)
    multiply(mine, own)
    this.wait(ctx)
    for (const part of others) {
      using from = this.rows.slice(ctx, 0, part.first, part.count)
      multiply(from, part)
    }
  }

  /** Frees the rows; call it behind `wait`. */
  dispose(): void {
    this.rows.dispose()
  }
}

/** This rank's run of the sum over the group of x[T, K] · factor: a piece is summed while the next one is multiplied. Owned by the scope. */
export function multiplyAndShareOut(ctx: Ctx, x: Tensor, factor: Factor, group: Group): Tensor {
  const tokens = x.shape[0] as number
  const width = factor.weight.shape[factor.transposed ? 0 : 1] as number
  const run = sharedRows(tokens, group)
  const out = ctx.empty([run, width], x.dtype)
  const ranks = Array.from({ length: group.size }, (_, rank) => rank)
  let pieces = piecesOf(run)
  const partsOf = (piece: Rows) => ranks.map((rank) => realRows(rank, run, piece, tokens))
  if (pieces.flatMap(partsOf).some(isSingle)) pieces = [{ first: 0, count: run }]
  const terms = pieces.map((piece) => {
    const term = ctx.empty([group.size * piece.count, width], x.dtype)
    // By rank, as the reduction wants them; what all ranks have in one piece lies so already.
    const parts = pieces.length > 1 ? partsOf(piece) : [{ first: 0, count: tokens }]
    const room = (group.size * piece.count) / parts.length
    let at = 0
    for (const { first, count } of parts) {
      using from = x.slice(ctx, 0, first, count)
      using into = term.slice(ctx, 0, at, count)
      multiplyRows(ctx, into, from, factor, tokens)
      if (count < room) {
        using filler = term.slice(ctx, 0, at + count, room - count)
        native.fill(ctx.stream.id, filler.handle, 0)
      }
      at += room
    }
    using part = out.slice(ctx, 0, piece.first, piece.count)
    reduceScatterInto(besideNext(ctx, piece, pieces), part, term, group)
    return term
  })
  ctx.stream.wait(ctx.device.communication(tensorParallelAxis))
  for (const term of terms) term.dispose()
  return out
}

/** y[T, N] = the sum over the group of x[T, K] · factor, whole on each rank: a piece is summed while the next one is multiplied. */
export function multiplyAndSum(ctx: Ctx, y: Tensor, x: Tensor, factor: Factor, group: Group): void {
  const tokens = x.shape[0] as number
  const pieces = piecesOf(tokens)
  for (const piece of pieces) {
    using from = x.slice(ctx, 0, piece.first, piece.count)
    using into = y.slice(ctx, 0, piece.first, piece.count)
    multiplyRows(ctx, into, from, factor, tokens)
    allReduce(besideNext(ctx, piece, pieces), into, group)
  }
  ctx.stream.wait(ctx.device.communication(tensorParallelAxis))
}
