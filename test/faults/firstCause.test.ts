// Which rank the launcher names when the others can only wait for it, how soon the job ends then, and that nobody is left: dead
// inside an all-reduce, stopped, stuck, gone too early. F34 of the fault list.
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import type { LaunchOptions } from '../../lib/launch/launcher.js'
import { leftWith, start } from './launched.js'

const script = join(import.meta.dirname, 'lostRank.ts')

interface Ended {
  readonly code: number | null
  readonly err: string
  /** From the fault to the end of the launcher. */
  readonly ms: number
  readonly left: number[]
}

let job = 0

/** Runs the scenario on `size` ranks; rank 1 is the one that is lost. */
async function lose(
  scenario: string,
  timeoutMs: number,
  size: number,
  options: Partial<LaunchOptions>,
): Promise<Ended> {
  const rdzvId = `lost-${process.pid}-${job++}`
  const launched = start({ script, args: [scenario, String(timeoutMs)], nprocPerNode: size, rdzvId, ...options })
  await launched.until(/rank 1 is lost now/)
  const begin = Date.now()
  const { code, err } = await launched.ended
  const ms = Date.now() - begin
  return { code, err, ms, left: await leftWith(`TORCHELASTIC_RUN_ID=${rdzvId}`) }
}

// Beyond the timeout: 1 s for the others to fail by themselves, 3 s until what is left is killed, and noticing.
const slack = 5000

describe('the first cause', () => {
  it('is a rank of four that was killed inside an all-reduce', async () => {
    const { code, err, ms, left } = await lose('kill', 10_000, 4, {})
    expect(code, err).toBe(137)
    expect(err).toMatch(/^viaduct run: rank 1 \(local rank 1, process \d+\) failed first: signal SIGKILL$/m)
    // The others fail by themselves, each naming it.
    const named =
      /^ {2}then rank [023]: exit code 1: ERR_COMM \[allReduce\] operation \d+ of group world .*(?:lost rank 1\b|not heard from rank 1\b)/gm
    expect(err.match(named), err).toHaveLength(3)
    expect(left).toEqual([])
    // At once, long before the timeout.
    expect(ms).toBeLessThan(slack)
  })

  it('is a stopped rank, by its heartbeat', async () => {
    const { code, err, ms, left } = await lose('stop', 600_000, 3, { heartbeatTimeout: 3 })
    expect(code, err).toBe(137)
    expect(err).toMatch(
      /viaduct run: rank 1 \(local rank 1, process \d+\) failed first: no heartbeat for 3\.\d s, a signal has stopped it/,
    )
    // The others need no signal: they notice that it was killed.
    expect(err).toMatch(/then rank [02]: exit code 1: ERR_COMM \[allReduce\] operation \d+ of group world lost rank 1/)
    expect(left).toEqual([])
    expect(ms).toBeLessThan(3000 + slack)
  })

  it('is a stopped rank, when the others time out before', async () => {
    const { err, ms, left } = await lose('stop', 4000, 3, {})
    expect(err).toMatch(/rank 1 \(local rank 1, process \d+\) failed first: no heartbeat for \d\.\d s, a signal has/)
    expect(err).toMatch(
      /ERR_TIMEOUT \[allReduce\] expected all ranks in operation \d+ of group world within 4\.0 s, not heard from rank 1/,
    )
    expect(left).toEqual([])
    expect(ms).toBeLessThan(4000 + slack)
  })

  it('is a rank that lives but does not come', async () => {
    const { code, err, ms, left } = await lose('stuck', 2000, 3, { heartbeatTimeout: 60 })
    expect(code, err).not.toBe(0)
    expect(err).toMatch(
      /rank 1 \(local rank 1, process \d+\) failed first: was lost in or never entered operation \d+ of group world, ranks 0, 2 waited/,
    )
    expect(err).toMatch(/then rank 0: exit code 1: ERR_/)
    expect(left).toEqual([])
    expect(ms).toBeLessThan(2000 + slack)
  })

  it('is a rank that left the others', async () => {
    const { code, err, left } = await lose('leave', 10_000, 2, {})
    expect(code, err).toBe(1)
    expect(err).toMatch(/rank 1 .*failed first: exit code 0, was lost in or never entered operation \d+ of group world/)
    expect(left).toEqual([])
  })
})
