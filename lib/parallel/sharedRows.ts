// Rows of a batch shared out over the ranks of a group in equal runs, in rank order: what sequence parallelism has between the linears.
// Any number of rows goes: where the ranks do not divide it, rows of zeros fill the last runs up. They reach no linear, attention or
// loss, and their gradient is 0.
import { native } from '../addon/load.js'
import type { Ctx, Group } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { gatherRows, reduceScatterInto } from './collectives.js'

/** Rows of each rank's run. */
export const sharedRows = (rows: number, { size }: Pick<Group, 'size'>): number => Math.ceil(rows / size)

/** All ranks' runs, without what fills them up: [rows, ...rest]. Owned by the scope. */
export function gatherShared(ctx: Ctx, run: Tensor, rows: number, group: Group): Tensor {
  const all = gatherRows(ctx, run, group)
  if (all.shape[0] === rows) return all
  const real = all.slice(ctx, 0, 0, rows)
  all.dispose()
  return real
}

/** This rank's run of the sum over the group. Owned by the scope. */
export function reduceScatterShared(ctx: Ctx, rows: Tensor, group: Group): Tensor {
  const out = ctx.empty([sharedRows(rows.shape[0] as number, group), ...rows.shape.slice(1)], rows.dtype)
  reduceScatterSharedInto(ctx, out, rows, group)
  return out
}

/** As reduceScatterShared, into a tensor that is there. */
export function reduceScatterSharedInto(ctx: Ctx, out: Tensor, rows: Tensor, group: Group): void {
  const full = filled(ctx, rows, group)
  reduceScatterInto(ctx, out, full, group)
  if (full !== rows) full.dispose()
}

/** This rank's run of rows that every rank has. Owned by the scope. */
export function ownRun(ctx: Ctx, rows: Tensor, group: Group): Tensor {
  const count = sharedRows(rows.shape[0] as number, group)
  const full = filled(ctx, rows, group)
  const run = full.slice(ctx, 0, group.rank * count, count)
  if (full !== rows) full.dispose()
  return run
}

/** The rows with zeros behind them; themselves where the ranks divide them. */
function filled(ctx: Ctx, rows: Tensor, group: Group): Tensor {
  const [count = 0, ...rest] = rows.shape
  const total = sharedRows(count, group) * group.size
  if (total === count) return rows
  const full = ctx.empty([total, ...rest], rows.dtype)
  using real = full.slice(ctx, 0, 0, count)
  using filler = full.slice(ctx, 0, count, total - count)
  native.copy(ctx.stream.id, real.handle, rows.handle)
  native.fill(ctx.stream.id, filler.handle, 0)
  return full
}
