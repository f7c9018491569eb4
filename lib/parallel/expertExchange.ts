// Rows to the ranks that have their experts, and back. Experts are spread over ep, and each is cut over etp: a row goes to the rank of
// ep that has its expert (of the same place in etp), and from there to the others of etp, whose parts of the result are summed on the
// way back. How many rows go where is known on every rank before anything moves: all-to-all with uneven counts, no row is dropped.
import { native } from '../addon/load.js'
import { defineOp } from '../ops/define.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import { Tensor } from '../tensor/tensor.js'
import { allToAll, allToAllInto, gatherRows, reduceScatter } from './collectives.js'

/** This rank's place among those that hold one copy of the experts; etp is the faster axis. */
export interface ExpertPlace {
  readonly ep: number
  readonly etp: number
  readonly epSize: number
  readonly etpSize: number
}

/** What moves where, from how often each rank's tokens chose each expert. */
export interface ExchangePlan {
  /** Rows to and from each rank of ep. */
  readonly sends: readonly number[]
  readonly receives: readonly number[]
  /** Rows that the rank of etp with most of them received: all are filled up to so many. */
  readonly width: number
  /** Which of the etpSize · width gathered rows stands at each place of the experts' order. */
  readonly source: Int32Array
  /** The other way round; -1 for what fills up. */
  readonly place: Int32Array
  /** Rows of each expert of this rank. */
  readonly counts: readonly number[]
}

/**
 * @param chosen - by rank in the order of the axis etp_ep, then by expert.
 */
export function exchangePlan(chosen: readonly (readonly number[])[], at: ExpertPlace): ExchangePlan {
  const { ep, etp, epSize, etpSize } = at
  const perRank = (chosen[0] as readonly number[]).length / epSize
  const experts = Array.from({ length: perRank }, (_, i) => ep * perRank + i)
  const of = (from: number, slice: number) => chosen[from * etpSize + slice] as readonly number[]
  const sum = (counts: readonly number[], first: number) =>
    counts.slice(first, first + perRank).reduce((total, n) => total + n, 0)
  const ranks = Array.from({ length: epSize }, (_, rank) => rank)
  const slices = Array.from({ length: etpSize }, (_, slice) => slice)
  const received = slices.map((slice) => ranks.reduce((total, from) => total + sum(of(from, slice), ep * perRank), 0))
  const width = Math.max(...received)
  // Rows come by slice, of a slice by sender, of a sender by expert.
  const starts = slices.map((slice) => {
    let next = slice * width
    return ranks.map((from) =>
      experts.map((expert) => {
        const start = next
        next += of(from, slice)[expert] as number
        return start
      }),
    )
  })
  const source = new Int32Array(received.reduce((total, n) => total + n, 0))
  const place = new Int32Array(etpSize * width).fill(-1)
  const counts: number[] = []
  let row = 0
  for (const [i, expert] of experts.entries()) {
    const first = row
    for (const slice of slices) {
      for (const from of ranks) {
        const start = starts[slice]?.[from]?.[i] as number
        const count = of(from, slice)[expert] as number
        for (let k = 0; k < count; k++, row++) {
          source[row] = start + k
          place[start + k] = row
        }
      }
    }
    counts.push(row - first)
  }
  return {
    sends: ranks.map((to) => sum(of(ep, etp), to * perRank)),
    receives: ranks.map((from) => sum(of(from, etp), ep * perRank)),
    width,
    source,
    place,
    counts,
  }
}

interface ExchangeArgs {
  readonly x: Tensor
  readonly sends: readonly number[]
  readonly receives: readonly number[]
  readonly group: Group
}

/** Rows to other ranks, by rank; their gradients come back the same way. */
const exchange = defineOp<ExchangeArgs, { y: Tensor }>({
  name: 'exchange',
  shapes: ({ x, receives }) => ({
    y: { shape: [receives.reduce((total, n) => total + n, 0), ...x.shape.slice(1)], dtype: x.dtype },
  }),
  forward: (ctx, { x, sends, receives, group }, { y }) => allToAllInto(ctx, y, x, sends, receives, group),
  inputs: ({ x }) => [x],
  backwardInput: (ctx, { sends, receives, group }, _, { y: dy }) => [
    dy === null ? null : allToAll(ctx, dy, receives, sends, group),
  ],
})

interface SlicesArgs {
  readonly x: Tensor
  readonly width: number
  /** int32 [N] and int32 [etp · width] on the device. */
  readonly source: Tensor
  readonly place: Tensor
  /** Rows of this rank before they are filled up. */
  readonly rows: number
  readonly group: Group
}

/** Rows of all ranks of etp in the order of experts: [N, H]. */
function gatherSlices(ctx: Ctx, y: Tensor, x: Tensor, { width, source, rows, group }: SlicesArgs): void {
  const { id } = ctx.stream
  if (group.size === 1) return native.spreadRows(id, y.handle, x.handle, source.handle, 0, 1)
  const filled = ctx.empty([width, ...x.shape.slice(1)], x.dtype)
  using real = filled.slice(ctx, 0, 0, rows)
  using rest = filled.slice(ctx, 0, rows, width - rows)
  native.copy(id, real.handle, x.handle)
  native.fill(id, rest.handle, 0)
  const all = gatherRows(ctx, filled, group)
  filled.dispose()
  native.spreadRows(id, y.handle, all.handle, source.handle, 0, 1)
  all.dispose()
}

/** This rank's rows of the sum over etp, in the order in which they came: [rows, H]. */
function scatterSlices(ctx: Ctx, y: Tensor, x: Tensor, { place, rows, group }: SlicesArgs): void {
  const { id } = ctx.stream
  if (group.size === 1) return native.spreadRows(id, y.handle, x.handle, place.handle, 0, 1)
  const all = ctx.empty([place.numel, ...x.shape.slice(1)], x.dtype)
  native.spreadRows(id, all.handle, x.handle, place.handle, 0, 1)
  const own = reduceScatter(ctx, all, group)
  all.dispose()
  using real = own.slice(ctx, 0, 0, rows)
  native.copy(id, y.handle, real.handle)
  own.dispose()
}

const toSlices = defineOp<SlicesArgs, { y: Tensor }>({
  name: 'toSlices',
  shapes: ({ x, source }) => ({ y: { shape: [source.numel, ...x.shape.slice(1)], dtype: x.dtype } }),
  forward: (ctx, args, { y }) => gatherSlices(ctx, y, args.x, args),
  inputs: ({ x }) => [x],
  saves: ({ place }) => [place],
  backwardInput(ctx, args, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = ctx.empty([args.rows, ...dy.shape.slice(1)], dy.dtype)
    scatterSlices(ctx, dx, dy, args)
    return [dx]
  },
})

const fromSlices = defineOp<SlicesArgs, { y: Tensor }>({
  name: 'fromSlices',
  shapes: ({ x, rows }) => ({ y: { shape: [rows, ...x.shape.slice(1)], dtype: x.dtype } }),
  forward: (ctx, args, { y }) => scatterSlices(ctx, y, args.x, args),
  inputs: ({ x }) => [x],
  saves: ({ source }) => [source],
  backwardInput(ctx, args, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = ctx.empty([args.source.numel, ...dy.shape.slice(1)], dy.dtype)
    gatherSlices(ctx, dx, dy, args)
    return [dx]
  },
})

/** Rows, sorted by expert, on their way through the experts of all ranks. */
export class ExpertExchange {
  readonly counts: readonly number[]
  readonly #plan: ExchangePlan
  readonly #source: Tensor
  readonly #place: Tensor
  readonly #ep: Group
  readonly #etp: Group

  constructor(ctx: Ctx, plan: ExchangePlan, ep: Group, etp: Group) {
    this.#plan = plan
    this.#ep = ep
    this.#etp = etp
    this.counts = plan.counts
    this.#source = Tensor.fromHost(ctx, plan.source, [plan.source.length], 'int32')
    this.#place = Tensor.fromHost(ctx, plan.place, [plan.place.length], 'int32')
  }

  /** This rank's rows, which are freed, to those of this rank's experts. */
  there(ctx: Ctx, x: Tensor): Tensor {
    const { sends, receives } = this.#plan
    const come = exchange(ctx, { x, sends, receives, group: this.#ep }).y
    x.dispose()
    const { y } = toSlices(ctx, this.#slices(come))
    come.dispose()
    return y
  }

  /** The other way round; of several slices the sum. */
  back(ctx: Ctx, x: Tensor): Tensor {
    const { sends, receives } = this.#plan
    const summed = fromSlices(ctx, this.#slices(x)).y
    x.dispose()
    const { y } = exchange(ctx, { x: summed, sends: receives, receives: sends, group: this.#ep })
    summed.dispose()
    return y
  }

  #slices(x: Tensor): SlicesArgs {
    const rows = this.#plan.receives.reduce((total, n) => total + n, 0)
    return { x, width: this.#plan.width, source: this.#source, place: this.#place, rows, group: this.#etp }
  }
}
