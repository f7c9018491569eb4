// Commands on several ranks: stand-alone, the ranks of the layout are started through the launcher and run this same command
// line; under a launcher, this process is one of them.
import { extname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { initDistributed } from '../parallel/world.js'
import { detectWorld } from '../parallel/worldFacts.js'
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

/** The file of this command line, whatever name it was called by (a link in node_modules/.bin has no extension). */
export function commandFile(): string {
  const here = fileURLToPath(import.meta.url)
  return fileURLToPath(new URL(`./main${extname(here)}`, import.meta.url))
}

/**
 * Runs `work` on every rank of the layout; sets the exit code of the first failure.
 * @param check - what can be wrong before a process starts: runs here when ranks are to be started. Arguments that it gives
 *   are put behind theirs.
 */
export async function onRanks(
  flags: LayoutFlags,
  work: () => Promise<void>,
  check: () => Promise<readonly string[]> = async () => [],
): Promise<void> {
  await onProcesses(worldSizeOf(flags, launchedRanks()), work, check)
}

/** As onRanks, in so many processes of this host, or in the launcher's. */
export async function onProcesses(
  count: number,
  work: () => Promise<void>,
  check: () => Promise<readonly string[]> = async () => [],
): Promise<void> {
  const launched = launchedRanks()
  if (launched === null && count > 1) {
    const more = await check()
    const { launch } = await import('../launch/launcher.js')
    process.exitCode = await launch({
      script: commandFile(),
      args: [...process.argv.slice(2), ...more],
      nprocPerNode: count,
      standalone: true,
      prefix: false,
      localRanksFilter: '0',
    })
    return
  }
  try {
    await work()
  } finally {
    if ((launched ?? 1) > 1) await (await initDistributed()).dispose()
  }
}
