// Boxes of elements and how they map between coordinate systems. A mapping between a Hugging Face tensor and our logical
// tensor, a shard of a logical tensor, and a piece in a checkpoint file are all lists of regions; plans are intersections.

/** A box that is copied element by element: `from` start in one tensor, `to` start in another, same `size`. In elements. */
export interface Region {
  readonly from: readonly number[]
  readonly to: readonly number[]
  readonly size: readonly number[]
}

/** Number of elements of a shape or box. */
export function volume(size: readonly number[]): number {
  return size.reduce((product, n) => product * n, 1)
}

/**
 * Composes two maps through the middle tensor: `first` goes A to B, `second` goes B to C; the result goes A to C and covers
 * exactly the elements of B that both touch. Order: by `second`, then by `first`.
 */
export function composeRegions(first: readonly Region[], second: readonly Region[]): Region[] {
  const composed: Region[] = []
  for (const b of second) {
    for (const a of first) {
      const from: number[] = []
      const to: number[] = []
      const size: number[] = []
      let empty = false
      for (let d = 0; d < b.size.length; d++) {
        const aStart = a.to[d] as number
        const bStart = b.from[d] as number
        const start = Math.max(aStart, bStart)
        const end = Math.min(aStart + (a.size[d] as number), bStart + (b.size[d] as number))
        if (end <= start) {
          empty = true
          break
        }
        from.push((a.from[d] as number) + start - aStart)
        to.push((b.to[d] as number) + start - bStart)
        size.push(end - start)
      }
      if (!empty) composed.push({ from, to, size })
    }
  }
  return composed
}

/** The same regions in the other direction. */
export function invertRegions(regions: readonly Region[]): Region[] {
  return regions.map((r) => ({ from: r.to, to: r.from, size: r.size }))
}

/** The region that copies a whole tensor onto itself. A scalar (shape []) has one element. */
export function identityRegion(shape: readonly number[]): Region {
  const zeros = shape.map(() => 0)
  return { from: zeros, to: zeros, size: [...shape] }
}

/**
 * Checks that boxes tile a tensor: inside it, disjoint, together as many elements as the tensor has.
 * @returns null when they do, else the reason, naming the boxes.
 */
export function tilingFault(shape: readonly number[], boxes: readonly Box[]): string | null {
  let covered = 0
  for (const box of boxes) {
    for (let d = 0; d < shape.length; d++) {
      const start = box.start[d] as number
      const size = box.size[d] as number
      if (start < 0 || size < 0 || start + size > (shape[d] as number)) {
        return `box at [${box.start}] of [${box.size}] leaves the tensor [${shape}]`
      }
    }
    covered += volume(box.size)
  }
  const fault = overlap(
    shape,
    boxes.filter((box) => volume(box.size) > 0),
  )
  if (fault !== null) return fault
  const total = volume(shape)
  return covered === total ? null : `${covered} of ${total} elements are covered`
}

interface Box {
  readonly start: readonly number[]
  readonly size: readonly number[]
}

/** Names two boxes that overlap. Sweeps along the dim in which boxes differ most: grids and columns too are looked at once. */
function overlap(shape: readonly number[], boxes: readonly Box[]): string | null {
  if (boxes.length < 2) return null
  if (shape.length === 0) return `${boxes.length} boxes hold the only element`
  const starts = shape.map((_, d) => new Set(boxes.map((box) => box.start[d])).size)
  const along = starts.indexOf(Math.max(...starts))
  const sorted = [...boxes].sort((a, b) => (a.start[along] as number) - (b.start[along] as number))
  for (const [i, a] of sorted.entries()) {
    const end = (a.start[along] as number) + (a.size[along] as number)
    for (let j = i + 1; j < sorted.length; j++) {
      const b = sorted[j] as Box
      if ((b.start[along] as number) >= end) break
      const overlaps = shape.every((_, d) => {
        const aStart = a.start[d] as number
        const bStart = b.start[d] as number
        return aStart < bStart + (b.size[d] as number) && bStart < aStart + (a.size[d] as number)
      })
      if (overlaps) return `boxes at [${a.start}] of [${a.size}] and at [${b.start}] of [${b.size}] overlap`
    }
  }
  return null
}

/**
 * Cuts a tensor into boxes of at most `most` elements, in the order of its elements, each contiguous. Work on large tensors goes by
 * these, so that its memory does not grow with them.
 */
export function* stretches(
  shape: readonly number[],
  most: number,
): Generator<{ readonly start: number[]; readonly size: number[] }> {
  const total = volume(shape)
  if (total === 0) return
  if (total <= most || shape.length === 0) return yield { start: shape.map(() => 0), size: [...shape] }
  const [rows, ...rest] = shape as [number, ...number[]]
  const perRow = total / rows
  if (perRow > most) {
    for (let row = 0; row < rows; row++) {
      for (const { start, size } of stretches(rest, most)) yield { start: [row, ...start], size: [1, ...size] }
    }
    return
  }
  const step = Math.floor(most / perRow)
  const zeros = rest.map(() => 0)
  for (let row = 0; row < rows; row += step)
    yield { start: [row, ...zeros], size: [Math.min(step, rows - row), ...rest] }
}
