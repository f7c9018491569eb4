// The ranks of the world that a launcher has started, for programs that have no mesh.
import { type Ranks, ranksOf, solo } from '../checkpoint/ranks.js'
import { defaultParallel } from '../parallel/config.js'
import { Mesh } from '../parallel/mesh.js'
import { initDistributed } from '../parallel/world.js'

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
