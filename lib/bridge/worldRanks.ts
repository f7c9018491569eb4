// The ranks of a mesh, for saving and loading together; and the world that a launcher has started, when a program has no mesh.
import { type Ranks, solo } from '../checkpoint/ranks.js'
import { allGatherObject } from '../parallel/collectives.js'
import { defaultParallel } from '../parallel/config.js'
import { Mesh } from '../parallel/mesh.js'
import { initDistributed } from '../parallel/world.js'

/** All ranks of a mesh. */
export function ranksOf(mesh: Mesh): Ranks {
  const group = mesh.get('world')
  if (group.size === 1) return solo
  return { rank: group.rank, size: group.size, gather: (value) => allGatherObject(value, group) }
}

/** Runs `work` with the launcher's ranks, or alone where there is no launcher. */
export async function withWorldRanks<T>(work: (ranks: Ranks) => Promise<T>): Promise<T> {
  const world = await initDistributed()
  if (world.size === 1) return work(solo)
  const mesh = await Mesh.create(defaultParallel, world)
  try {
    return await work(ranksOf(mesh))
  } finally {
    await mesh.dispose()
  }
}
