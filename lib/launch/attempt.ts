// One attempt: this node's ranks from their start to the end of the last, stopped together when one fails, a signal comes or
// another node says so. Who failed first is decided here.
import type { RankError } from '../base/errorFile.js'
import { type RankEnd, RankProcess, type RankSetup, shellCode } from './rankProcess.js'
import type { Watchdog } from './watchdog.js'

// Errors of a rank that lost others: hardly ever the first cause.
const consequences = ['ERR_COMM', 'ERR_TIMEOUT', 'ERR_ABORTED', 'ERR_RANK_FAILED']

const failed = (end: RankEnd) => end.exitCode !== 0

/** Whether the rank's error says that it lost others. */
export function isConsequence(error: RankError | null): boolean {
  return error?.code != null && consequences.includes(error.code)
}

/** The rank whose failure came first: causes before consequences, then by time. Ranks that were stopped do not count. */
export function firstFailure(ends: readonly RankEnd[]): RankEnd | undefined {
  const own = ends.filter((end) => failed(end) && !end.stopped)
  const time = (end: RankEnd) => Math.min(end.timeMs, end.error?.timeMs ?? Number.POSITIVE_INFINITY)
  return own.sort(
    (a, b) => Number(isConsequence(a.error)) - Number(isConsequence(b.error)) || time(a) - time(b) || a.rank - b.rank,
  )[0]
}

/** `exit code 3` or `signal SIGKILL`. */
export function howEnded(end: RankEnd): string {
  return end.exitCode === null ? `signal ${end.signal}` : `exit code ${end.exitCode}`
}

export class Attempt {
  readonly #ranks: readonly RankProcess[]
  readonly #graceMs: number
  #killer: NodeJS.Timeout | undefined
  #over = false
  /** All ranks' ends, when the last one has ended. */
  readonly ended: Promise<readonly RankEnd[]>
  /** True when all ranks ended well, false as soon as one did not. */
  readonly verdict: Promise<boolean>

  constructor(setups: readonly RankSetup[], watchdog: Watchdog, graceMs: number) {
    this.#graceMs = graceMs
    this.#ranks = setups.map((setup) => {
      const rank = new RankProcess(setup)
      if (rank.pid > 0) watchdog.add(rank.pid)
      return rank
    })
    const ends = this.#ranks.map(async (rank) => {
      const end = await rank.ended
      watchdog.remove(rank.pid)
      return end
    })
    this.ended = Promise.all(ends).then((all) => {
      this.#over = true
      clearTimeout(this.#killer)
      return all
    })
    this.verdict = new Promise((resolve) => {
      for (const end of ends) void end.then((e) => failed(e) && resolve(false))
      void this.ended.then(() => resolve(true))
    })
  }

  get pids(): readonly number[] {
    return this.#ranks.map((rank) => rank.pid)
  }

  /** Asks all ranks to end; after the grace they are killed. */
  stop(signal: NodeJS.Signals): void {
    if (this.#over) return
    for (const rank of this.#ranks) rank.signalGroup(signal)
    this.#killer ??= setTimeout(() => this.kill(), this.#graceMs)
  }

  /** Ends all ranks at once. */
  kill(): void {
    for (const rank of this.#ranks) rank.signalGroup('SIGKILL')
  }

  /** A message to the ranks' own processes, e.g. SIGUSR1 before a pre-emption. */
  forward(signal: NodeJS.Signals): void {
    for (const rank of this.#ranks) rank.signal(signal)
  }
}

/** What there is to tell about a failed attempt. */
export interface FailureReport {
  readonly lines: readonly string[]
  readonly exitCode: number
  readonly summary: string
  /** The first failure here was that of a rank that lost others. */
  readonly consequence: boolean
}

/** Tells about a failed attempt; `node` where there are several. */
export function failureReport(ends: readonly RankEnd[], node: number | null): FailureReport {
  const first = firstFailure(ends) ?? ends.find(failed)
  if (first === undefined) return { lines: [], exitCode: 0, summary: '', consequence: true }
  const where = node === null ? '' : ` on node ${node}`
  const what = `rank ${first.rank} (local rank ${first.localRank}, process ${first.pid}) failed first${where}: ${howEnded(first)}`
  const lines = [`viaduct run: ${what}`]
  if (first.error !== null) lines.push(...first.error.message.split('\n').map((line) => `  ${line}`))
  if (first.error?.message.includes('Top-level await is currently not supported')) {
    lines.push('  a .ts script is CommonJS here: name it .mts, or put "type": "module" into package.json')
  }
  const others = ends.filter((end) => end !== first && failed(end))
  for (const end of others) {
    const why = end.error === null ? '' : `: ${end.error.message.split('\n')[0]}`
    lines.push(`  then rank ${end.rank}: ${howEnded(end)}${end.stopped ? ', stopped by the launcher' : ''}${why}`)
  }
  return { lines, exitCode: shellCode(first), summary: what, consequence: isConsequence(first.error) }
}
