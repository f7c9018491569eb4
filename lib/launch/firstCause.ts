// Who failed first: the earliest death, else a rank without heartbeat, else one that the others waited for in vain, which is read
// from their errors (native/cpu/gloo_comm.cc words them).
import type { RankError } from '../base/errorFile.js'
import type { RankEnd } from './rankProcess.js'

// Errors of a rank that lost others: hardly ever the first cause.
const consequences = ['ERR_COMM', 'ERR_TIMEOUT', 'ERR_ABORTED', 'ERR_RANK_FAILED']

/** Whether a rank did not end well. */
export const failed = (end: RankEnd) => end.exitCode !== 0

/** Whether the rank's error says that it lost others. */
function isConsequence(error: RankError | null): boolean {
  return error?.code != null && consequences.includes(error.code)
}

/** The first cause of a failed attempt. */
export interface FirstCause {
  readonly rank: number
  /** How that rank ended; undefined for one of another node. */
  readonly end: RankEnd | undefined
  /** What it did, e.g. `exit code 3` or `no heartbeat for 4.5 s`. */
  readonly what: string
  /** Somebody else may know better: this is drawn from what ranks missed. */
  readonly drawn: boolean
}

/** `exit code 3` or `signal SIGKILL`. */
export function howEnded(end: RankEnd): string {
  return end.exitCode === null ? `signal ${end.signal}` : `exit code ${end.exitCode}`
}

/** What an error says about ranks that did not come. */
interface Wait {
  readonly sequence: number
  /** `operation 3 of group tp`, or null for the first meeting. */
  readonly place: string | null
  readonly missing: readonly number[]
}

function waitOf(error: RankError): Wait | null {
  const missing =
    /(?:not heard from|lost) ranks? (\d+(?:, \d+)*)/.exec(error.message)?.[1] ??
    /ended because ranks? (\d+(?:, \d+)*) gave up: .*the process exits/.exec(error.message)?.[1]
  if (missing === undefined) return null
  const place = /operation (\d+) of group [^\s:]+/.exec(error.message)
  return {
    sequence: Number(place?.[1] ?? -1),
    place: place?.[0] ?? null,
    missing: missing.split(', ').map(Number),
  }
}

/** The rank that others waited for in vain and that did not wait itself; of several the one of the lowest operation. */
function notEntered(ends: readonly RankEnd[]): FirstCause | undefined {
  const waiting = ends.filter((end) => failed(end) && isConsequence(end.error))
  const ranks = waiting.map((end) => end.rank)
  const found = waiting.flatMap((end) => {
    const wait = waitOf(end.error as RankError)
    return (wait?.missing ?? []).filter((rank) => !ranks.includes(rank)).map((rank) => ({ rank, wait: wait as Wait }))
  })
  const [first] = found.sort((a, b) => a.wait.sequence - b.wait.sequence || a.rank - b.rank)
  if (first === undefined) return undefined
  const { rank, wait } = first
  const by = waiting.filter((end) => end.error?.message.includes(wait.place ?? '')).map((end) => end.rank)
  const waited = `rank${by.length === 1 ? '' : 's'} ${by.join(', ')} waited in vain`
  const end = ends.find((one) => one.rank === rank)
  const left = end !== undefined && !failed(end) ? `${howEnded(end)}, ` : ''
  const did = wait.place === null ? 'did not join the others' : `was lost in or never entered ${wait.place}`
  return { rank, end, what: `${left}${did}, ${waited}`, drawn: true }
}

/** The first cause; undefined when no rank failed. */
export function firstCause(ends: readonly RankEnd[]): FirstCause | undefined {
  const time = (end: RankEnd) => Math.min(end.timeMs, end.error?.timeMs ?? Number.POSITIVE_INFINITY)
  const byTime = (list: readonly RankEnd[]) => [...list].sort((a, b) => time(a) - time(b) || a.rank - b.rank)
  const ownFailures = byTime(ends.filter((end) => failed(end) && !end.stopped))
  const known = (end: RankEnd, what = howEnded(end)): FirstCause => ({ rank: end.rank, end, what, drawn: false })

  const death = ownFailures.find((end) => !isConsequence(end.error))
  if (death !== undefined) return known(death)
  const silences = ends.flatMap((end) => (end.silence === null ? [] : [{ end, ...end.silence }]))
  const [silent] = silences.sort((a, b) => b.ms - a.ms)
  if (silent !== undefined)
    return known(silent.end, `no heartbeat for ${(silent.ms / 1000).toFixed(1)} s${silent.state}`)
  const missing = notEntered(ends)
  if (missing !== undefined) return missing
  const [consequence] = ownFailures
  if (consequence !== undefined) return { ...known(consequence), drawn: true }
  const stopped = ends.find(failed)
  return stopped === undefined ? undefined : known(stopped)
}
