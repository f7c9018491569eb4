// `viaduct run`: starts the ranks of this node with torchrun's variables, restarts all of them after a failure where that was
// asked for, passes signals on, and leaves no process behind. Command lines are parsed in lib/cli, flags in options.ts.
import { mkdtempSync, rmSync } from 'node:fs'
import { availableParallelism, constants, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { childEnvironment, envText } from '../base/env.js'
import { Attempt, failureReport } from './attempt.js'
import { type RankCommand, rankCommand } from './command.js'
import { type AttemptEnd, Nodes } from './nodes.js'
import { type LaunchOptions, type LaunchPlan, planLaunch } from './options.js'
import type { RankSetup } from './rankProcess.js'
import { Watchdog } from './watchdog.js'

export type { LaunchOptions } from './options.js'

const ending: readonly NodeJS.Signals[] = ['SIGINT', 'SIGTERM', 'SIGHUP']

const consequenceDelayMs = 500

const say = (lines: readonly string[]) => {
  for (const line of lines) process.stderr.write(`${line}\n`)
}

/**
 * Runs a script or program on the ranks of this node until all nodes' ranks are done.
 * @returns the exit code: 0, that of the rank that failed first (128 + n when signal n killed it), or 128 + n after the launcher
 *   was asked to end by signal n.
 * @throws ERR_USAGE, ERR_FILE_MISSING before anything is started; ERR_TIMEOUT naming a node that did not come; ERR_COMM when the
 *   port is taken.
 */
export async function launch(options: LaunchOptions): Promise<number> {
  const plan = planLaunch(options)
  const command = rankCommand(plan.script, plan.args, plan.noPython)
  const scratch = mkdtempSync(join(tmpdir(), 'viaduct-run-'))
  const watchdog = new Watchdog()
  const signals = new Signals()
  try {
    const nodes = await Nodes.join(plan)
    try {
      return await new Launch(plan, command, nodes, watchdog, signals, scratch).run()
    } finally {
      await nodes.leave()
    }
  } finally {
    signals.close()
    watchdog.close()
    rmSync(scratch, { recursive: true, force: true })
  }
}

/** The signals that the launcher takes while it runs, for the attempt that is running. */
class Signals {
  /** The first that asked to end. */
  asked: NodeJS.Signals | null = null
  #attempt: Attempt | null = null
  #wake: () => void = () => {}
  /** Resolves when the launcher was asked to end. */
  readonly came = new Promise<void>((wake) => {
    this.#wake = wake
  })

  readonly #end = (signal: NodeJS.Signals) => {
    const again = this.asked !== null
    this.asked ??= signal
    this.#wake()
    if (again && signal === 'SIGINT') this.#attempt?.kill()
    else this.#attempt?.stop(signal)
  }
  readonly #forward = (signal: NodeJS.Signals) => this.#attempt?.forward(signal)

  constructor() {
    for (const signal of ending) process.on(signal, this.#end)
    process.on('SIGUSR1', this.#forward)
  }

  attach(attempt: Attempt | null): void {
    this.#attempt = attempt
    if (this.asked !== null) attempt?.stop(this.asked)
  }

  close(): void {
    for (const signal of ending) process.off(signal, this.#end)
    process.off('SIGUSR1', this.#forward)
  }
}

class Launch {
  constructor(
    readonly plan: LaunchPlan,
    readonly command: RankCommand,
    readonly nodes: Nodes,
    readonly watchdog: Watchdog,
    readonly signals: Signals,
    readonly scratch: string,
  ) {}

  async run(): Promise<number> {
    for (let attempt = 0; ; attempt++) {
      const end = await this.#once(attempt)
      if (this.signals.asked !== null) return 128 + constants.signals[this.signals.asked]
      if (end.kind === 'done') return 0
      if (end.kind === 'signal' || attempt >= this.plan.maxRestarts) return end.exitCode
      say([`viaduct run: starting all ranks again, restart ${attempt + 1} of ${this.plan.maxRestarts}`])
      await this.nodes.stopped(attempt, this.plan.graceMs + this.plan.joinMs)
    }
  }

  async #once(number: number): Promise<AttemptEnd> {
    const { nodes, signals } = this
    const attempt = new Attempt(this.#setups(number), this.watchdog, this.plan)
    signals.attach(attempt)
    const lost = (error: unknown): AttemptEnd => {
      const summary = `the launcher of node 0 is gone: ${(error as Error).message}`
      return { kind: 'failed', node: nodes.rank, exitCode: 1, summary }
    }
    const everywhere = nodes.end(number).catch(lost)
    try {
      const here = attempt.verdict.then((well) => ({ well }))
      const first = await Promise.race([here, everywhere])
      const wellHere = 'well' in first && first.well
      if (!wellHere) await attempt.fail()
      const ends = await attempt.ended
      if (signals.asked !== null) {
        const summary = `node ${nodes.rank} was asked to end by ${signals.asked}`
        const exitCode = 128 + constants.signals[signals.asked]
        await nodes.tell(number, { kind: 'signal', node: nodes.rank, exitCode, summary }).catch(() => {})
      } else if (wellHere) {
        await nodes.done(number)
      } else {
        const { lines, exitCode, summary, consequence } = failureReport(ends, nodes.count === 1 ? null : nodes.rank)
        // What ended because another node said so is no news.
        if ('well' in first) {
          say(lines)
          // The node with the cause is to be the first to tell.
          if (consequence && nodes.count > 1) await new Promise((go) => setTimeout(go, consequenceDelayMs))
          await nodes.tell(number, { kind: 'failed', node: nodes.rank, exitCode, summary }).catch(() => {})
        }
      }
      const asked = signals.came.then(
        (): AttemptEnd => ({ kind: 'signal', node: nodes.rank, exitCode: 1, summary: '' }),
      )
      const end = await Promise.race([everywhere, asked])
      if (end.kind !== 'done' && !('well' in first && !first.well) && end.summary !== '') {
        say([`viaduct run: node ${end.node} ended the run: ${end.summary}`])
        attempt.stop('SIGTERM')
        await attempt.ended
      }
      return end
    } finally {
      signals.attach(null)
    }
  }

  #setups(attempt: number): RankSetup[] {
    const { plan, nodes } = this
    const folder = join(plan.logDir === null ? this.scratch : resolve(plan.logDir, plan.jobId), `attempt_${attempt}`)
    const threads = Math.max(1, Math.floor(availableParallelism() / plan.localSize))
    return Array.from({ length: plan.localSize }, (_, localRank) => {
      const rank = nodes.firstRank + localRank
      const own = join(folder, String(localRank))
      const errorFile = join(
        plan.logDir === null ? own : join(this.scratch, `attempt_${attempt}`, String(localRank)),
        'error.json',
      )
      const heartbeatFile = join(this.scratch, `heartbeat_${attempt}_${localRank}`)
      return {
        rank,
        localRank,
        command: this.command,
        errorFile,
        heartbeatFile,
        logFolder: plan.logDir === null ? null : own,
        redirects: plan.logDir === null ? 0 : (plan.redirects[localRank] ?? 0),
        tee: plan.tee[localRank] ?? 0,
        shown: plan.shown[localRank] ?? true,
        prefix: plan.prefix,
        env: childEnvironment({
          ...(envText('OMP_NUM_THREADS') === undefined ? { OMP_NUM_THREADS: String(threads) } : {}),
          ...plan.env,
          RANK: String(rank),
          LOCAL_RANK: String(localRank),
          WORLD_SIZE: String(nodes.worldSize),
          LOCAL_WORLD_SIZE: String(plan.localSize),
          GROUP_RANK: String(nodes.rank),
          GROUP_WORLD_SIZE: String(nodes.count),
          ROLE_NAME: 'default',
          ROLE_RANK: String(rank),
          ROLE_WORLD_SIZE: String(nodes.worldSize),
          MASTER_ADDR: plan.masterAddr,
          MASTER_PORT: String(nodes.port),
          TORCHELASTIC_RESTART_COUNT: String(attempt),
          TORCHELASTIC_MAX_RESTARTS: String(plan.maxRestarts),
          TORCHELASTIC_RUN_ID: plan.jobId,
          TORCHELASTIC_USE_AGENT_STORE: 'True',
          TORCHELASTIC_ERROR_FILE: errorFile,
          VIADUCT_HEARTBEAT_FILE: heartbeatFile,
          VIADUCT_AGENT_STORE: '1',
        }),
      }
    })
  }
}
