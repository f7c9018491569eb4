// Commands on several ranks: stand-alone, the ranks of the layout are started through the launcher and run this same command
// line; under a launcher, this process is one of them.
import { extname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { initDistributed } from '../parallel/world.js'
import { detectWorld } from '../parallel/worldFacts.js'

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

/** How ranks are started. */
export interface StartOptions {
  /** Without a launcher: what can be wrong is found here, before a process is started. Arguments that it gives are put behind theirs. */
  readonly check?: () => Promise<readonly string[]>
  /** How often all ranks are started again after a failure, where they are started here. */
  readonly maxRestarts?: number | undefined
}

/**
 * Runs `work` in so many processes of this host, or in the launcher's; sets the exit code of the first failure.
 */
export async function onRanks(count: number, work: () => Promise<void>, options: StartOptions = {}): Promise<void> {
  const { check, maxRestarts = 0 } = options
  const launched = launchedRanks()
  const more = launched === null ? ((await check?.()) ?? []) : []
  if (launched === null && (count > 1 || maxRestarts > 0)) {
    const { launch } = await import('../launch/launcher.js')
    process.exitCode = await launch({
      script: commandFile(),
      args: [...process.argv.slice(2), ...more],
      nprocPerNode: count,
      standalone: true,
      maxRestarts,
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
