// Alternated pairs and their statistics: a claim is a ratio measured in one run. Pairs that other work on the machine
// disturbed are dropped.
import { readdirSync, readFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'

/** One pair: seconds of the peer and of ours for the same work. */
export interface Pair {
  readonly peer: number
  readonly ours: number
  /** Share of the machine that other processes took during the pair, 0 to 1. */
  readonly foreign: number
}

/** Of the pairs that were not disturbed. */
export interface Ratio {
  /** Median of peer / ours: above 1 we are faster. */
  readonly median: number
  readonly lowerQuartile: number
  readonly peerSeconds: number
  readonly oursSeconds: number
  readonly pairs: number
  readonly dropped: number
}

/** A pair with more of the machine taken by others than this is dropped. */
const foreignLimit = 0.06

/** The q-quantile by linear interpolation. */
export function quantile(values: readonly number[], q: number): number {
  const sorted = [...values].sort((a, b) => a - b)
  const at = (sorted.length - 1) * q
  const low = sorted[Math.floor(at)] as number
  const high = sorted[Math.ceil(at)] as number
  return low + (high - low) * (at - Math.floor(at))
}

/** Statistics of alternated pairs; when most were disturbed, the least disturbed half counts and `dropped` says so. */
export function ratioOf(pairs: readonly Pair[]): Ratio {
  let kept = pairs.filter((p) => p.foreign <= foreignLimit)
  if (kept.length < pairs.length / 2) {
    kept = [...pairs].sort((a, b) => a.foreign - b.foreign).slice(0, Math.ceil(pairs.length / 2))
  }
  const ratios = kept.map((p) => p.peer / p.ours)
  return {
    median: quantile(ratios, 0.5),
    lowerQuartile: quantile(ratios, 0.25),
    peerSeconds: quantile(
      kept.map((p) => p.peer),
      0.5,
    ),
    oursSeconds: quantile(
      kept.map((p) => p.ours),
      0.5,
    ),
    pairs: kept.length,
    dropped: pairs.length - kept.length,
  }
}

interface CpuTimes {
  readonly busy: number
  /** Of the processes that are measured, and of the kernel's own threads: those write back what a side wrote. */
  readonly own: number
  readonly at: number
}

const ticksPerSecond = 100

/** Fields of /proc/PID/stat from the state on, which is the third. */
function statFields(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/stat`, 'utf8')
      .replace(/^.*\) /, '')
      .split(' ')
  } catch {
    return [] // ended
  }
}

const sumOf = (fields: readonly string[], of: readonly number[]) => of.reduce((n, i) => n + Number(fields[i] ?? 0), 0)

/** User and system time of a process, and that of its ended children. */
const processTicks = (pid: number) => sumOf(statFields(pid), [11, 12, 13, 14])

const kernelParent = '2'

/** User and system time of the kernel's threads. */
function kernelTicks(): number {
  let ticks = 0
  for (const name of readdirSync('/proc')) {
    if (!/^[0-9]+$/.test(name)) continue
    const fields = statFields(Number(name))
    if (fields[1] === kernelParent) ticks += sumOf(fields, [11, 12])
  }
  return ticks
}

/** CPU time of the machine and of the given processes so far. */
export function cpuTimes(pids: readonly number[]): CpuTimes {
  const cpu = (readFileSync('/proc/stat', 'utf8').split('\n')[0] as string).trim().split(/\s+/).slice(1).map(Number)
  const idle = (cpu[3] ?? 0) + (cpu[4] ?? 0)
  const busy = cpu.slice(0, 8).reduce((a, b) => a + b, 0) - idle
  const own = pids.reduce((sum, pid) => sum + processTicks(pid), kernelTicks())
  return { busy, own, at: performance.now() }
}

/** Share of the machine that others used between two readings. */
export function foreignShare(before: CpuTimes, after: CpuTimes): number {
  const seconds = (after.at - before.at) / 1000
  const foreign = after.busy - before.busy - (after.own - before.own)
  return Math.max(0, foreign / ticksPerSecond / (seconds * availableParallelism()))
}
