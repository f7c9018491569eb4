// Runs the same work on our side and on each peer in turn, again and again, and makes pairs of what it took. Who goes first changes
// from pair to pair. What other processes took of the machine meanwhile is noted with each pair.
import { cpuTimes, foreignShare, type Pair } from './pairs.js'
import type { Side } from './side.js'

/** A run of one side: seconds, and what else its answer held. */
export interface Timed {
  readonly seconds: number
  readonly foreign: number
}

/** One side in a race. `run` does the work once and says how long it took; `clear` makes room before and after it. */
export interface Runner {
  readonly side: Side
  run(): Promise<number>
  clear?(): void
}

async function timed(runner: Runner): Promise<Timed> {
  const { pids } = runner.side
  runner.clear?.()
  const before = cpuTimes(pids)
  const seconds = await runner.run()
  const foreign = foreignShare(before, cpuTimes(pids))
  runner.clear?.()
  return { seconds, foreign }
}

/**
 * Alternates and pairs our run with each peer's run of the same round.
 * @param limitSeconds - after this long no further round begins, once three are done.
 * @returns pairs of each peer, in their order.
 */
export async function alternate(
  ours: Runner,
  peers: readonly Runner[],
  rounds: number,
  limitSeconds: number,
): Promise<Pair[][]> {
  const pairs: Pair[][] = peers.map(() => [])
  const began = performance.now()
  for (let round = 0; round < rounds; round++) {
    if (round >= 3 && (performance.now() - began) / 1000 > limitSeconds) break
    const order = [ours, ...peers]
    if (round % 2 === 1) order.reverse()
    const times = new Map<Runner, Timed>()
    for (const runner of order) times.set(runner, await timed(runner))
    const own = times.get(ours) as Timed
    peers.forEach((peer, i) => {
      const theirs = times.get(peer) as Timed
      pairs[i]?.push({ peer: theirs.seconds, ours: own.seconds, foreign: Math.max(theirs.foreign, own.foreign) })
    })
    process.stderr.write('.')
  }
  process.stderr.write('\n')
  return pairs
}
