// One attempt: this node's ranks from their start to the end of the last, stopped together when one fails or falls silent, a
// signal comes or another node says so. Who failed first is decided in firstCause.ts.
import { heartbeatMs } from '../parallel/heartbeat.js'
import { failed, firstCause, howEnded } from './firstCause.js'
import { processState } from './heartbeats.js'
import { type RankEnd, RankProcess, type RankSetup, shellCode } from './rankProcess.js'
import type { Watchdog } from './watchdog.js'

/** Silence that explains a failure which has come already. */
const suspiciousMs = 4 * heartbeatMs

/** Ranks that lost another one fail by themselves, and say which and in what: for so long they may. */
const consequencePatienceMs = 1000

/** After a failure there is nothing left to save together; where a host is lost, ranks may wait for it without end. */
const failureGraceMs = 3000
const lostHostGraceMs = 2000

export interface AttemptTimes {
  /** For ranks to end after a signal before they are killed. */
  readonly graceMs: number
  /** Without a sign of life after which a rank has failed; 0: never. */
  readonly silenceMs: number
}

export class Attempt {
  readonly #ranks: readonly RankProcess[]
  readonly #times: AttemptTimes
  readonly #silences = new Map<number, { ms: number; state: string }>()
  #killer: NodeJS.Timeout | undefined
  #over = false
  /** All ranks' ends, when the last one has ended. */
  readonly ended: Promise<readonly RankEnd[]>
  /** True when all ranks ended well, false as soon as one did not or fell silent. */
  readonly verdict: Promise<boolean>

  constructor(setups: readonly RankSetup[], watchdog: Watchdog, times: AttemptTimes) {
    this.#times = times
    this.#ranks = setups.map((setup) => {
      const rank = new RankProcess(setup)
      if (rank.pid > 0) watchdog.add(rank.pid)
      return rank
    })
    const ends = this.#ranks.map(async (rank) => {
      const end = { ...(await rank.ended), silence: this.#silences.get(rank.rank) ?? null }
      watchdog.remove(rank.pid)
      return end
    })
    let looking: NodeJS.Timeout | undefined
    this.ended = Promise.all(ends).then((all) => {
      this.#over = true
      clearInterval(looking)
      clearTimeout(this.#killer)
      return all
    })
    this.verdict = new Promise((resolve) => {
      looking = setInterval(() => {
        for (const rank of this.#ranks) rank.heartbeat.look()
        if (times.silenceMs > 0 && this.#killSilent(times.silenceMs)) resolve(false)
      }, heartbeatMs)
      for (const end of ends) void end.then((e) => failed(e) && resolve(false))
      void this.ended.then(() => resolve(true))
    })
  }

  get pids(): readonly number[] {
    return this.#ranks.map((rank) => rank.pid)
  }

  /** Asks all ranks to end; after the grace they are killed. */
  stop(signal: NodeJS.Signals, graceMs = this.#times.graceMs): void {
    if (this.#over) return
    for (const rank of this.#ranks) rank.signalGroup(signal)
    this.#killer ??= setTimeout(() => this.kill(), graceMs)
  }

  /**
   * Ends what is left after a failure, here or on another node: silent ranks at once, ranks that lost others by themselves.
   * @param hostLost - nothing shows them that they lost others.
   */
  async fail(hostLost: boolean): Promise<void> {
    this.#killSilent(suspiciousMs)
    if (hostLost) {
      this.stop('SIGTERM', Math.min(lostHostGraceMs, this.#times.graceMs))
      return
    }
    await Promise.race([this.ended, new Promise((go) => setTimeout(go, consequencePatienceMs))])
    this.#killSilent(suspiciousMs)
    this.stop('SIGTERM', Math.min(failureGraceMs, this.#times.graceMs))
  }

  /** A stopped process takes no other signal. @returns whether there was a silent rank. */
  #killSilent(ms: number): boolean {
    const silent = this.#ranks.filter((rank) => !rank.over && rank.heartbeat.silentMs >= ms)
    for (const rank of silent) {
      if (!this.#silences.has(rank.rank))
        this.#silences.set(rank.rank, { ms: rank.heartbeat.silentMs, state: processState(rank.pid) })
      rank.signalGroup('SIGKILL')
    }
    return silent.length > 0
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
  /** Another node may know the cause better. */
  readonly consequence: boolean
}

/**
 * Tells about a failed attempt.
 * @param node - this one, where there are several.
 * @param lostNode - what is known of a node whose launcher is lost: the cause, unless a rank here failed by itself.
 */
export function failureReport(
  ends: readonly RankEnd[],
  node: number | null,
  lostNode: string | null = null,
): FailureReport {
  const first = firstCause(ends)
  if (first === undefined) return { lines: [], exitCode: 0, summary: '', consequence: true }
  const byLostNode = first.drawn && lostNode !== null
  const end = byLostNode ? undefined : first.end
  const where = node === null || end === undefined ? '' : ` on node ${node}`
  const who = end === undefined ? '' : ` (local rank ${end.localRank}, process ${end.pid})`
  const what = byLostNode ? lostNode : `rank ${first.rank}${who} failed first${where}: ${first.what}`
  const lines = [`viaduct run: ${what}`]
  const error = end?.error ?? null
  if (error !== null) lines.push(...error.message.split('\n').map((line) => `  ${line}`))
  if (error?.message.includes('Top-level await is currently not supported')) {
    lines.push('  a .ts script is CommonJS here: name it .mts, or put "type": "module" into package.json')
  }
  const others = ends.filter((other) => other !== end && failed(other))
  for (const other of others) {
    const why = other.error === null ? '' : `: ${other.error.message.split('\n')[0]}`
    lines.push(`  then rank ${other.rank}: ${howEnded(other)}${other.stopped ? ', stopped by the launcher' : ''}${why}`)
  }
  const told = end !== undefined && failed(end) ? end : ends.find((one) => failed(one) && !one.stopped)
  return { lines, exitCode: told === undefined ? 1 : shellCode(told), summary: what, consequence: first.drawn }
}
