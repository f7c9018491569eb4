// How much two tensors in files differ, element by element, read in stretches: memory does not grow with them. Equal dtypes are
// compared by bits; numbers are looked at only where bits differ, or where dtypes do.
import { type DType, dtypeBytes, dtypes } from '../../base/dtype.js'
import { type BoxMove, compareRanges, readRegion, settleAll } from '../../io/blocks.js'
import { Ctx } from '../../tensor/ctx.js'
import { composeRegions, stretches, volume } from '../../tensor/region.js'
import { withScope } from '../../tensor/scope.js'
import { Tensor } from '../../tensor/tensor.js'
import type { TensorView } from './modelSide.js'

/** What two tensors of one shape differ by. Numbers are null where a dtype is not a float, or a difference not finite. */
export interface TensorDifference {
  /** Elements whose bits (with two dtypes: whose values) differ. */
  readonly differing: number
  /** Row-major index of the first of them, -1 where none does. */
  readonly first: number
  readonly maxDifference: number | null
  /** Over all elements. */
  readonly meanDifference: number | null
  /** √Σ(a−b)² / √Σa². */
  readonly relativeL2: number | null
}

/** Elements of a stretch: some 64 MiB as float64 on both sides. */
const mostElements = 4 * 2 ** 20

/** Compares two tensors of the same shape. */
export async function tensorDifference(a: TensorView, b: TensorView): Promise<TensorDifference> {
  const [left, right] = [a.moves(), b.moves()]
  const byBits = a.dtype === b.dtype
  if (byBits && ((await areSameRanges(left, right, a)) || (await haveSameBits(left, right, a))))
    return { differing: 0, first: -1, maxDifference: 0, meanDifference: 0, relativeL2: 0 }
  const sums = new Sums()
  const isFloat = dtypes[a.dtype].isFloat && dtypes[b.dtype].isFloat
  await inStretches(a.shape, async (read) => {
    // Whole numbers of two dtypes are compared as those of `a`.
    const [x, y] = isFloat ? [floats(await read(left, 'float64')), floats(await read(right, 'float64'))] : []
    const bits = byBits || !isFloat ? ([await read(left, a.dtype), await read(right, a.dtype)] as const) : null
    sums.add(x ?? null, y ?? null, bits, dtypeBytes(a.dtype))
    return true
  })
  return sums.result(isFloat)
}

type ReadBox = (moves: readonly BoxMove[], dtype: DType) => Promise<Uint8Array>

/** Goes through a tensor as long as `work` says so; `read` gives the bytes of the stretch at hand. */
async function inStretches(shape: readonly number[], work: (read: ReadBox) => Promise<boolean>): Promise<boolean> {
  const ctx = Ctx.create({ device: 'cpu' })
  try {
    for (const { start, size } of stretches(shape, mostElements)) {
      const goesOn = await withScope(ctx, (inner) =>
        work(async (moves, dtype) => (await readBox(inner, moves, start, size, dtype)).bytes()),
      )
      if (!goesOn) return false
    }
    return true
  } finally {
    ctx.scope.close()
  }
}

function haveSameBits(left: readonly BoxMove[], right: readonly BoxMove[], { shape, dtype }: TensorView) {
  return inStretches(shape, async (read) => Buffer.from(await read(left, dtype)).equals(await read(right, dtype)))
}

/** Both lie in one piece each, and the pieces are byte for byte the same: the quick way. */
async function areSameRanges(left: readonly BoxMove[], right: readonly BoxMove[], view: TensorView): Promise<boolean> {
  const wholeOf = (moves: readonly BoxMove[]) => {
    const [move] = moves
    const [region] = move?.regions ?? []
    const isWhole =
      moves.length === 1 &&
      move?.regions.length === 1 &&
      region?.size.join() === view.shape.join() &&
      move.place.shape.join() === view.shape.join()
    return isWhole ? move.place : null
  }
  const [a, b] = [wholeOf(left), wholeOf(right)]
  if (a === null || b === null) return false
  return (await compareRanges(a, b, volume(view.shape) * dtypeBytes(view.dtype))).differing === 0
}

/** One box of a tensor, cast on the way. */
async function readBox(
  ctx: Ctx,
  moves: readonly BoxMove[],
  start: readonly number[],
  size: readonly number[],
  dtype: DType,
): Promise<Tensor> {
  const box = Tensor.empty(ctx, size, dtype)
  const wanted = [{ from: start, to: size.map(() => 0), size }]
  await settleAll(
    moves.flatMap(({ place, regions }) =>
      composeRegions(regions, wanted).map((region) => readRegion(place, box, region)),
    ),
  )
  return box
}

function floats(bytes: Uint8Array): Float64Array {
  return new Float64Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 8)
}

class Sums {
  #elements = 0
  #differing = 0
  #first = -1
  #most = 0
  #absolute = 0
  #squares = 0
  #reference = 0

  /** The next stretch: its values where they are floats, and its bytes where these decide what differs. */
  add(
    a: Float64Array | null,
    b: Float64Array | null,
    bits: readonly [Uint8Array, Uint8Array] | null,
    width: number,
  ): void {
    const count = a?.length ?? (bits as readonly Uint8Array[])[0]!.length / width
    for (let i = 0; i < count; i++) {
      const [x, y] = [a?.[i] ?? 0, b?.[i] ?? 0]
      this.#reference += x * x
      if (bits ? sameBytes(...bits, i * width, width) : x === y || (Number.isNaN(x) && Number.isNaN(y))) continue
      this.#differing++
      if (this.#first < 0) this.#first = this.#elements + i
      const apart = x === y || (Number.isNaN(x) && Number.isNaN(y)) ? 0 : Math.abs(x - y)
      const d = Number.isNaN(apart) ? Number.POSITIVE_INFINITY : apart
      this.#most = Math.max(this.#most, d)
      this.#absolute += d
      this.#squares += d * d
    }
    this.#elements += count
  }

  result(isFloat: boolean): TensorDifference {
    const number = (value: number) => (isFloat && Number.isFinite(value) ? value : null)
    return {
      differing: this.#differing,
      first: this.#first,
      maxDifference: number(this.#most),
      meanDifference: number(this.#absolute / Math.max(1, this.#elements)),
      relativeL2: number(this.#squares === 0 ? 0 : Math.sqrt(this.#squares / this.#reference)),
    }
  }
}

function sameBytes(a: Uint8Array, b: Uint8Array, at: number, width: number): boolean {
  for (let k = at; k < at + width; k++) if (a[k] !== b[k]) return false
  return true
}
