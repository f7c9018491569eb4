// The steps of a conversion: a box filled from boxes of other files, or a box handed out to other files, hashed on the way. A
// step can be done again at any time with the same result. When which step is done is decided in conversion.ts.
import { ViaductError } from '../../base/errors.js'
import { type BoxMove, type FileTensor, gatherBox, hashBox, hashRange, scatterBox } from '../../io/blocks.js'
import { type RemoteBytes, rangeOf } from '../../io/hub/remoteBytes.js'
import { tensorBytes } from '../../io/safetensorsHeader.js'
import { invertRegions } from '../../tensor/region.js'

/** Fills all of `to`, row by row. The hash is of what was written. */
export interface Gather {
  readonly kind: 'gather'
  /** Bytes written. */
  readonly bytes: number
  readonly to: FileTensor
  readonly from: readonly BoxMove[]
  /** What must be proved of the sources before; a proof of one name is made once. */
  readonly proofs?: readonly { readonly name: string; readonly prove: () => Promise<void> }[]
}

/** Hands all of `from` out, once for each copy; a copy takes all of it. */
export interface Scatter {
  readonly kind: 'scatter'
  readonly bytes: number
  readonly from: FileTensor
  readonly copies: readonly (readonly BoxMove[])[]
  /** Looks at the hash of what was read. @throws ERR_CHECKPOINT_HASH */
  readonly check: (xxh3: string) => void
}

export type Move = Gather | Scatter

/** What a step writes to. */
export function writtenPaths(move: Move): string[] {
  return move.kind === 'gather' ? [move.to.path] : move.copies.flatMap((copy) => copy.map(({ place }) => place.path))
}

/** The step with sources here, and what lets them go. */
export async function bringHere(
  remote: RemoteBytes | null,
  move: Move,
): Promise<{ readonly move: Move; release(): Promise<void> }> {
  if (remote === null || move.kind === 'scatter') return { move, release: async () => {} }
  const lease = await remote.lease(move.from.flatMap(({ place, regions }) => regions.map((r) => rangeOf(place, r))))
  const from = move.from.map(({ place, regions }) => ({ place: lease.local(place), regions }))
  return { move: { ...move, from }, release: lease.release }
}

/** Carries out a step. @returns the hash of what was written: 128-bit XXH3 in the order of the box, 32 hex digits. */
export async function runMove(move: Move, signal?: AbortSignal): Promise<string> {
  const options = { hash: true, ...(signal ? { signal } : {}) }
  if (move.kind === 'gather') return (await gatherBox(move.to, move.from, options)).xxh3 as string
  const xxh3 = (await scatterBox(move.from, move.copies.flat(), options)).xxh3 as string
  move.check(xxh3)
  return isCast(move) ? hashCopy(move, 0) : xxh3
}

/** True if what the step has written has this hash still. Reads that alone, and writes nothing. */
export async function isDone(move: Move, xxh3: string): Promise<boolean> {
  try {
    if (move.kind === 'scatter') {
      const hashes = await Promise.all(move.copies.map((_, i) => hashCopy(move, i)))
      return hashes.every((hash) => hash === xxh3)
    }
    return (await hashRange(move.to.path, move.to.offset, tensorBytes(move.to.dtype, move.to.shape))) === xxh3
  } catch (error) {
    if (error instanceof ViaductError) return false // cut or gone
    throw error
  }
}

function isCast({ from, copies }: Scatter): boolean {
  return copies.some((copy) => copy.some(({ place }) => place.dtype !== from.dtype))
}

function hashCopy({ from, copies }: Scatter, copy: number): Promise<string> {
  const written = (copies[copy] ?? []).map(({ place, regions }) => ({ place, regions: invertRegions(regions) }))
  return hashBox({ dtype: written[0]?.place.dtype ?? from.dtype, shape: from.shape }, written)
}
