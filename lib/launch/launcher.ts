// `viaduct run`: starts the ranks of this node with torchrun's variables, restarts all of them after a failure where that was
// asked for, passes signals on, and leaves no process behind. Command lines are parsed in lib/cli, flags in options.ts.
import { mkdtempSync, rmSync } from 'node:fs'
import { availableParallelism, constants, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { childEnvironment, envText } from '../base/env.js'
import { ViaductError } from '../base/errors.js'
import { Attempt, failureReport } from './attempt.js'
import { type RankCommand, rankCommand } from './command.js'
import { type AttemptEnd, Nodes } from './nodes.js'
import { type LaunchOptions, type LaunchPlan, planLaunch } from './options.js'
import type { RankEnd, RankSetup } from './rankProcess.js'
import { Watchdog } from './watchdog.js'

export type { LaunchOptions } from './options.js'

const ending: readonly NodeJS.Signals[] = ['SIGINT', 'SIGTERM', 'SIGHUP']

const consequenceDelayMs = 500

const signalCode = (signal: NodeJS.Signals) => 128 + constants.signals[signal]

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
    const nodes = await Nodes.join(plan, signals.stop)
    try {
      return await new Launch(plan, command, nodes, watchdog, signals, scratch).run()
    } finally {
      await nodes.leave()
    }
  } catch (error) {
    if (signals.asked !== null && error instanceof ViaductError && error.code === 'ERR_ABORTED')
      return signalCode(signals.asked)
    throw error
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
  readonly #stop = new AbortController()
  /** Aborted then. */
  readonly stop = this.#stop.signal

  readonly #end = (signal: NodeJS.Signals) => {
    const again = this.asked !== null
    this.asked ??= signal
    this.#wake()
    this.#stop.abort()
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
    const { nodes, signals } = this
    for (;;) {
      const end = await this.#once()
      if (signals.asked !== null) return signalCode(signals.asked)
      if (end.kind === 'done') return 0
      if (end.kind === 'signal' || nodes.attempt >= nodes.maxRestarts) return end.exitCode
      const missing = end.lost.filter((node) => node !== nodes.rank).map((node) => nodes.describe(node))
      const wait = missing.length === 0 ? '' : `, waiting up to ${this.plan.joinMs / 1000} s for ${missing.join(', ')}`
      say([`viaduct run: starting all ranks again, restart ${nodes.attempt + 1} of ${nodes.maxRestarts}${wait}`])
      await nodes.again(signals.stop)
    }
  }

  async #once(): Promise<AttemptEnd> {
    const { nodes, signals } = this
    const attempt = new Attempt(this.#setups(nodes.attempt), this.watchdog, this.plan)
    signals.attach(attempt)
    const everywhere = nodes.watch()
    const asked = signals.came.then(() => this.#signalEnd())
    try {
      const here = attempt.verdict.then((well) => ({ well }))
      const first = await Promise.race([here, everywhere.end])
      const elsewhere = 'well' in first ? null : first
      const failedHere = 'well' in first && !first.well
      const hostLost = elsewhere !== null && elsewhere.lost.length > 0
      if (elsewhere !== null) this.#sayNews(elsewhere)
      if (hostLost) void this.#tell(elsewhere)
      if (elsewhere !== null || failedHere) await attempt.fail(hostLost)
      const ends = await attempt.ended
      // Null: all is well here, or another node knows already.
      const own = signals.asked !== null ? this.#signalEnd() : failedHere ? await this.#report(ends) : null
      const told = elsewhere !== null || (await Promise.race([this.#tell(own), everywhere.end.then(() => true)]))
      const end = told || own === null ? await Promise.race([everywhere.end, asked]) : own
      const newlyLost = end.lost.length > 0 && (own?.lost.length ?? 0) === 0
      if (elsewhere === null && (!failedHere || newlyLost)) this.#sayNews(end)
      nodes.lost = end.lost
      return end
    } finally {
      everywhere.stop()
      signals.attach(null)
    }
  }

  #signalEnd(): AttemptEnd {
    const { nodes, signals } = this
    const signal = signals.asked ?? 'SIGTERM'
    const summary = `node ${nodes.rank} was asked to end by ${signal}`
    return { kind: 'signal', node: nodes.rank, exitCode: signalCode(signal), summary, lost: [] }
  }

  /** Says what failed here; gives what to tell the others. */
  async #report(ends: readonly RankEnd[]): Promise<AttemptEnd> {
    const { nodes } = this
    const suspect = nodes.suspect()
    const where = nodes.count === 1 ? null : nodes.rank
    const { lines, exitCode, summary, consequence } = failureReport(ends, where, suspect?.summary ?? null)
    say(lines)
    if (consequence && suspect !== null) return suspect
    // The node with the cause is to be the first to tell.
    if (consequence && nodes.count > 1) await new Promise((go) => setTimeout(go, consequenceDelayMs))
    return { kind: 'failed', node: nodes.rank, exitCode, summary, lost: [] }
  }

  /** @returns whether the others know: false where nobody is there to be told. */
  async #tell(end: AttemptEnd | null): Promise<boolean> {
    if (end?.lost.includes(0)) return false
    try {
      await (end === null ? this.nodes.done() : this.nodes.tell(end))
      return true
    } catch {
      return false
    }
  }

  /** Says how another node, or this one's look at the others, ended the attempt. */
  #sayNews(end: AttemptEnd): void {
    if (end.kind === 'done' || end.summary === '') return
    const lost = end.lost.includes(this.nodes.rank) ? 'the others ended the run without this node: ' : ''
    say([`viaduct run: ${end.lost.length > 0 ? lost : `node ${end.node} ended the run: `}${end.summary}`])
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
          TORCHELASTIC_MAX_RESTARTS: String(nodes.maxRestarts),
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
