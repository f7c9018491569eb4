// Hosts that are lost while a job runs: frozen (launcher and ranks stopped), or their launcher killed. The others end in time and
// name the host and its ranks, a frozen one ends what it has when it wakes, and with restarts all come back, or a successor does.
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { plainEnvironment, viaductFile } from '../cli/commandLine.js'
import { freePort, type Launched, leftWith, processesWith, startCommand } from './launched.js'

const timeoutMs = 3000
const slackMs = 5000
/** For a host that wakes: 2 s until its ranks are killed, its farewells that nobody hears, and a machine with other work. */
const wakingMs = 20_000

/** Ranks that never end in the first attempt, whatever SIGTERM says, and do at once in the next. */
const waiting = `
  if (process.env.TORCHELASTIC_RESTART_COUNT !== '0') {
    console.log('again ' + process.env.RANK + ' of ' + process.env.WORLD_SIZE + ', attempt ' + process.env.TORCHELASTIC_RESTART_COUNT)
  } else {
    process.on('SIGTERM', () => {})
    console.log('ready')
    setInterval(() => {}, 1000)
  }
`

const lightRank = ['--no-python', process.execPath, '-e', waiting]

let job = 0
const started: string[] = []

/** A job of several hosts. */
class Job {
  readonly #id = `host-${process.pid}-${job++}`
  readonly #flags: readonly string[]

  constructor(nnodes: number, rdzvEndpoint: string, ...flags: string[]) {
    const timeout = flags.includes('--heartbeat-timeout') ? [] : ['--heartbeat-timeout', String(timeoutMs / 1000)]
    const where = ['--nnodes', String(nnodes), '--rdzv-endpoint', rdzvEndpoint, '--rdzv-id', this.#id]
    this.#flags = ['run', ...where, ...timeout, ...flags]
  }

  #mark(host: string): string {
    return `HOST_UNDER_TEST=${this.#id}/${host}`
  }

  /** Starts a launcher on a host of this name. */
  start(nodeRank: number, ranks: number, host = String(nodeRank), command: readonly string[] = lightRank): Launched {
    const [name = '', value = ''] = this.#mark(host).split('=')
    started.push(this.#mark(host))
    const who = ['--node-rank', String(nodeRank), '--nproc-per-node', String(ranks)]
    const env = { ...plainEnvironment(), [name]: value }
    return startCommand(process.execPath, [viaductFile, ...this.#flags, ...who, ...command], env)
  }

  /** Launcher, ranks and all else of a host. */
  processes(host: string | number): number[] {
    return processesWith(this.#mark(String(host)))
  }

  /** Those that are there when the launchers have ended. */
  async left(...hosts: (string | number)[]): Promise<number[]> {
    const all = await Promise.all(hosts.map((host) => leftWith(this.#mark(String(host)))))
    return all.flat()
  }

  signal(host: string | number, signal: NodeJS.Signals): void {
    for (const pid of this.processes(host)) process.kill(pid, signal)
  }
}

const endpoint = async () => `127.0.0.1:${await freePort()}`
const ready = (launched: Launched, ranks: number) => launched.until(new RegExp(`(ready[^#]*){${ranks}}`))

/** How a launcher ended, and when. */
async function endOf(launched: Launched, begin: number): Promise<{ code: number | null; err: string; ms: number }> {
  const { code, err } = await launched.ended
  return { code, err, ms: Date.now() - begin }
}

afterAll(() => {
  // What a failed test has left.
  for (const mark of started.splice(0)) {
    for (const pid of processesWith(mark)) {
      try {
        process.kill(pid, 'SIGKILL')
      } catch {
        // Ended meanwhile.
      }
    }
  }
})

describe.concurrent('a lost host', () => {
  it('that is frozen ends the job on the others, which name it and its ranks; awake it ends what it has', async () => {
    const job = new Job(3, await endpoint())
    const nodes = [job.start(0, 1), job.start(1, 1), job.start(2, 2)]
    await Promise.all(nodes.map((node, i) => ready(node, i === 2 ? 2 : 1)))
    job.signal(2, 'SIGSTOP')
    const begin = Date.now()
    for (const { code, err, ms } of await Promise.all(nodes.slice(0, 2).map((node) => endOf(node, begin)))) {
      expect(code, err).toBe(4)
      expect(err).toMatch(
        /^viaduct run: node 2 \(\S+ at 127\.0\.0\.1, ranks 2 to 3\) failed first: its launcher gave no sign of life for \d\.\d s, that host is frozen or out of reach$/m,
      )
      expect(ms).toBeGreaterThan(timeoutMs - 1000)
      expect(ms).toBeLessThan(timeoutMs + slackMs)
    }
    expect(await job.left(0, 1)).toEqual([])
    job.signal(2, 'SIGCONT')
    const { code, err, ms } = await endOf(nodes[2] as Launched, Date.now())
    expect(code, err).toBe(4)
    expect(err).toMatch(/viaduct run: the others ended the run without this node: node 2 \(.* failed first/)
    expect(ms).toBeLessThan(wakingMs)
    expect(await job.left(2)).toEqual([])
  }, 120_000)

  it('may be the one that keeps the store', async () => {
    const job = new Job(2, await endpoint())
    const [first, second] = [job.start(0, 2), job.start(1, 1)]
    await Promise.all([ready(first, 2), ready(second, 1)])
    job.signal(0, 'SIGSTOP')
    const { code, err, ms } = await endOf(second, Date.now())
    expect(code, err).toBe(4)
    expect(err).toMatch(
      /^viaduct run: node 0 \(\S+ at 127\.0\.0\.1, ranks 0 to 1\) failed first: its launcher has not answered for \d\.\d s, that host/m,
    )
    expect(ms).toBeLessThan(timeoutMs + slackMs)
    expect(await job.left(1)).toEqual([])
    job.signal(0, 'SIGCONT')
    const woken = await endOf(first, Date.now())
    expect(woken.code, woken.err).toBe(4)
    expect(woken.err).toMatch(
      /node 1 \(.*, rank 2\) failed first: its launcher is gone, this host itself stood still for \d/,
    )
    expect(woken.ms).toBeLessThan(wakingMs)
    expect(await job.left(0)).toEqual([])
  }, 120_000)

  it('is the cause where the ranks of the others time out before', async () => {
    const job = new Job(2, await endpoint(), '--heartbeat-timeout', '60')
    const sums = [join(import.meta.dirname, 'lostRank.ts'), 'none', '4000']
    const [first, second] = [job.start(0, 1, '0', sums), job.start(1, 1, '1', sums)]
    await second.until(/rank 1 is lost now/)
    job.signal(1, 'SIGSTOP')
    const { code, err, ms } = await endOf(first, Date.now())
    expect(code, err).toBe(4)
    expect(err).toMatch(
      /^viaduct run: node 1 \(.*, rank 1\) failed first: its launcher gave no sign of life for \d\.\d s/m,
    )
    expect(err).toMatch(/then rank 0: exit code 1: ERR_TIMEOUT .* not heard from rank 1/)
    expect(ms).toBeLessThan(4000 + slackMs)
    job.signal(1, 'SIGCONT')
    const { err: late } = await second.ended
    expect(late).toMatch(/the others ended the run without this node|node 0 .* failed first/)
    expect(await job.left(0, 1)).toEqual([])
  }, 120_000)

  it('whose launcher was killed is noticed before the timeout', async () => {
    const job = new Job(2, await endpoint(), '--heartbeat-timeout', '60')
    const [first, second] = [job.start(0, 1), job.start(1, 1)]
    await Promise.all([ready(first, 1), ready(second, 1)])
    second.child.kill('SIGKILL')
    const { code, err, ms } = await endOf(first, Date.now())
    expect(code, err).toBe(4)
    expect(err).toMatch(/node 1 \(.*, rank 1\) failed first: its launcher is gone(?:, this host itself .*)?$/m)
    expect(ms).toBeLessThan(2000 + slackMs)
    expect(await job.left(0, 1)).toEqual([])
  }, 120_000)

  it('is waited for before a restart, and comes back when it wakes', async () => {
    const job = new Job(2, await endpoint(), '--max-restarts', '1')
    const [first, second] = [job.start(0, 1), job.start(1, 1)]
    await Promise.all([ready(first, 1), ready(second, 1)])
    job.signal(1, 'SIGSTOP')
    await first.until(/restart 1 of 1, waiting up to 600 s for node 1 \(.*, rank 1\)/)
    job.signal(1, 'SIGCONT')
    const [a, b] = await Promise.all([first.ended, second.ended])
    expect([a.code, b.code], a.err + b.err).toEqual([0, 0])
    expect(a.out).toContain('again 0 of 2, attempt 1')
    expect(b.out).toContain('again 1 of 2, attempt 1')
    expect(await job.left(0, 1)).toEqual([])
  }, 120_000)

  it('that does not come back ends the others within the rendezvous timeout', async () => {
    const job = new Job(2, await endpoint(), '--max-restarts', '1', '--rdzv-conf', 'join_timeout=10')
    const [first, second] = [job.start(0, 1), job.start(1, 1)]
    await Promise.all([ready(first, 1), ready(second, 1)])
    job.signal(1, 'SIGSTOP')
    await first.until(/restart 1 of 1/)
    const { code, err, ms } = await endOf(first, Date.now())
    expect(code, err).toBe(4)
    expect(err).toMatch(
      /ERR_TIMEOUT \[run\] expected all 2 nodes back within 10 s to start again, node 1 \(.*, rank 1\) did not come: start the launcher there again, or wait longer with --rdzv-conf join_timeout=/,
    )
    expect(ms).toBeLessThan(10_000 + slackMs)
    // Too late.
    job.signal(1, 'SIGCONT')
    const late = await endOf(second, Date.now())
    expect(late.code, late.err).toBe(4)
    expect(late.err).toMatch(/expected all 2 nodes back within 10 s to start again, node 0 \(.*, rank 0\) did not/)
    expect(await job.left(0, 1)).toEqual([])
  }, 120_000)

  it.each([0, 1])(
    'is replaced by a launcher that is started in place of node %i',
    async (lost) => {
      const job = new Job(2, await endpoint(), '--max-restarts', '1')
      const nodes = [job.start(0, 1), job.start(1, 1)]
      await Promise.all(nodes.map((node) => ready(node, 1)))
      job.signal(lost, 'SIGKILL')
      const stays = nodes[1 - lost] as Launched
      await stays.until(/restart 1 of 1/)
      const successor = job.start(lost, 1, 'successor')
      const [a, b] = await Promise.all([stays.ended, successor.ended])
      expect([a.code, b.code], a.err + b.err).toEqual([0, 0])
      expect(a.out).toContain(`again ${1 - lost} of 2, attempt 1`)
      expect(b.out).toContain(`again ${lost} of 2, attempt 1`)
      expect(await job.left(1 - lost, 'successor')).toEqual([])
    },
    120_000,
  )

  it('leaves a launcher that waits for it free to end by a signal', async () => {
    const job = new Job(2, await endpoint())
    const first = job.start(0, 1)
    while (job.processes(0).length < 2) await new Promise((resolve) => setTimeout(resolve, 50))
    first.child.kill('SIGTERM')
    const { code, err, ms } = await endOf(first, Date.now())
    expect(code, err).toBe(143)
    expect(ms).toBeLessThan(slackMs)
  }, 120_000)
})
