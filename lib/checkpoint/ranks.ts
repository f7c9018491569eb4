// The processes that save or load together, as this folder needs them: small host values gathered from all. An error on one
// rank becomes an error on all, so that none waits for one that is gone.
import { ViaductError } from '../base/errors.js'
import { GrowingFolder } from '../io/growingFolder.js'
import { allGatherObject } from '../parallel/collectives.js'
import type { Mesh } from '../parallel/mesh.js'

/** The ranks of a save or load. */
export interface Ranks {
  readonly rank: number
  readonly size: number
  /** Every rank's value, in rank order. A collective: each rank calls it. */
  gather<T>(value: T): Promise<T[]>
}

/** One process. */
export const solo: Ranks = { rank: 0, size: 1, gather: async (value) => [value] }

/** All ranks of a mesh. */
export function ranksOf(mesh: Mesh): Ranks {
  const group = mesh.get('world')
  if (group.size === 1) return solo
  return { rank: group.rank, size: group.size, gather: (value) => allGatherObject(value, group) }
}

type Outcome<T> = { readonly value: T } | { readonly failed: { code: string; where: string; message: string } }

/**
 * Runs `work` on this rank and gathers all results. When a rank fails, all fail: the rank itself with its own error, the
 * others with ERR_RANK_FAILED naming the first failed rank and its error.
 */
export async function together<T>(ranks: Ranks, work: () => Promise<T>): Promise<T[]> {
  let own: unknown
  let outcome: Outcome<T>
  try {
    outcome = { value: await work() }
  } catch (error) {
    own = error
    const known = error instanceof ViaductError ? error : null
    outcome = {
      failed: { code: known?.code ?? 'ERR_NATIVE', where: known?.where ?? 'rank', message: (error as Error).message },
    }
  }
  const all = await ranks.gather(outcome)
  if (own !== undefined) throw own
  const first = all.findIndex((o) => 'failed' in o)
  if (first >= 0) {
    const { failed } = all[first] as { failed: { code: string; message: string } }
    throw new ViaductError('ERR_RANK_FAILED', 'ranks', `rank ${first} failed: ${failed.code} ${failed.message}`, {
      rank: first,
      code: failed.code,
    })
  }
  return all.map((o) => (o as { value: T }).value)
}

/** As `together`, with work for rank 0 alone; all get its result. */
export async function onFirst<T>(ranks: Ranks, work: () => Promise<T>): Promise<T> {
  const all = await together(ranks, async () => (ranks.rank === 0 ? { result: await work() } : {}))
  return (all[0] as { result: T }).result
}

/**
 * A folder that all ranks fill beside its target. Rank 0 makes it, and gives it the target's name by `commit` as a part of its own
 * work; when any rank fails nothing of it is left.
 * @param admit - on rank 0, before anything is made: refuses the target.
 */
export async function growTogether(
  ranks: Ranks,
  target: string,
  admit: () => Promise<void>,
  fill: (folder: string, commit: () => Promise<void>) => Promise<void>,
): Promise<void> {
  let growing = null as GrowingFolder | null
  const folder = await onFirst(ranks, async () => {
    await admit()
    growing = await GrowingFolder.begin(target)
    return growing.folder
  })
  try {
    await fill(folder, async () => growing?.commit())
  } catch (error) {
    await growing?.abandon()
    throw error
  }
}
