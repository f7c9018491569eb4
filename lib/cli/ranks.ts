// Commands on several ranks: stand-alone, the ranks of the layout are started through the launcher and run this same command
// line; under a launcher, this process is one of them.
import { detectWorld } from '../parallel/worldFacts.js'
import { initDistributed } from '../parallel/world.js'
import { launch } from '../launch/launcher.js'
import { type LayoutFlags, worldSizeOf } from './layout.js'

/** Ranks that a launcher started, or null when there is none. */
export function launchedRanks(): number | null {
  const facts = detectWorld()
  return facts.launcher === 'none' ? null : facts.size
}

/** True on the rank that talks to people. */
export function isFirstRank(): boolean {
  return detectWorld().rank === 0
}

/** Runs `work` on every rank of the layout; sets the exit code of the first failure. */
export async function onRanks(flags: LayoutFlags, work: () => Promise<void>): Promise<void> {
  const launched = launchedRanks()
  const ranks = worldSizeOf(flags, launched)
  if (launched === null && ranks > 1) {
    process.exitCode = await launch({
      nprocPerNode: ranks,
      program: [process.execPath, ...process.execArgv, ...process.argv.slice(1)],
    } as never)
    return
  }
  try {
    await work()
  } finally {
    if (ranks > 1) await (await initDistributed()).dispose()
  }
}
