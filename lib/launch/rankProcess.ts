// One rank's process: in a process group of its own, so that what it starts ends with it; its output carried away; how it ended.
import { type ChildProcess, spawn } from 'node:child_process'
import { createWriteStream, mkdirSync, readdirSync, rmSync, type WriteStream } from 'node:fs'
import { constants } from 'node:os'
import { join } from 'node:path'
import type { Readable } from 'node:stream'
import { type RankError, readErrorFile } from '../base/errorFile.js'
import type { RankCommand } from './command.js'
import { Heartbeat } from './heartbeats.js'
import { carry } from './output.js'

export interface RankSetup {
  readonly rank: number
  readonly localRank: number
  readonly command: RankCommand
  readonly env: NodeJS.ProcessEnv
  readonly errorFile: string
  /** Touched by the rank while it lives. */
  readonly heartbeatFile: string
  /** Where `stdout.log` and `stderr.log` go; null: no files. */
  readonly logFolder: string | null
  readonly redirects: number
  readonly tee: number
  readonly shown: boolean
  readonly prefix: boolean
}

/** How a rank ended. */
export interface RankEnd {
  readonly rank: number
  readonly localRank: number
  readonly pid: number
  /** Null when a signal ended it. */
  readonly exitCode: number | null
  readonly signal: NodeJS.Signals | null
  /** When this was noticed. */
  readonly timeMs: number
  readonly error: RankError | null
  /** The launcher had sent this signal before. */
  readonly stopped: boolean
  /** For how long there was no sign of life when the launcher killed it, and how the process was; null for all others. */
  readonly silence: { readonly ms: number; readonly state: string } | null
}

/** Exit code as a shell would give it. */
export function shellCode(end: { readonly exitCode: number | null; readonly signal: NodeJS.Signals | null }): number {
  return end.exitCode ?? 128 + (end.signal === null ? 1 : constants.signals[end.signal])
}

// A process that left the group may keep the output open for ever.
const outputPatienceMs = 1000

const sharedMemory = '/dev/shm'

/** A rank that is killed between making and unlinking the memory of a group leaves it (native/cpu/shm_link.cc names it). */
function removeSharedMemory(pid: number): void {
  try {
    for (const name of readdirSync(sharedMemory))
      if (name.startsWith(`viaduct-${pid}-`)) rmSync(join(sharedMemory, name), { force: true })
  } catch {
    // No such folder here.
  }
}

export class RankProcess {
  readonly rank: number
  readonly pid: number
  readonly heartbeat: Heartbeat
  /** Resolves when the process has ended and its output is out. Never rejects. */
  readonly ended: Promise<RankEnd>
  readonly #child: ChildProcess
  readonly #sent = new Set<NodeJS.Signals>()
  #over = false

  constructor(setup: RankSetup) {
    this.rank = setup.rank
    const { program, args, beats } = setup.command
    this.heartbeat = new Heartbeat(setup.heartbeatFile, beats)
    this.#child = spawn(program, args, { env: setup.env, detached: true, stdio: ['ignore', 'pipe', 'pipe'] })
    this.pid = this.#child.pid ?? 0
    const files = this.#carry(setup)
    this.ended = this.#watch(setup, files)
  }

  get over(): boolean {
    return this.#over
  }

  /** Sends a signal to the rank and all that it started. */
  signalGroup(signal: NodeJS.Signals): void {
    // When the rank has ended its group was killed with it, and the number may be another's.
    if (this.#over || this.pid <= 0) return
    this.#sent.add(signal)
    this.#killGroup(signal)
  }

  #killGroup(signal: NodeJS.Signals): void {
    try {
      process.kill(-this.pid, signal)
    } catch {
      // Nobody of the group is left.
    }
  }

  /** Sends a signal to the rank's own process only. */
  signal(signal: NodeJS.Signals): void {
    if (this.#over || this.pid <= 0) return
    this.#child.kill(signal)
  }

  #carry(setup: RankSetup): WriteStream[] {
    const files: WriteStream[] = []
    const prefix = setup.prefix ? `[rank${setup.rank}] ` : ''
    const streams = [
      { from: this.#child.stdout, terminal: process.stdout, name: 'stdout', bit: 1 },
      { from: this.#child.stderr, terminal: process.stderr, name: 'stderr', bit: 2 },
    ]
    for (const { from, terminal, name, bit } of streams) {
      const places: { to: NodeJS.WritableStream; prefix: string }[] = []
      const onlyFile = (setup.redirects & bit) !== 0
      if (setup.logFolder !== null && (onlyFile || (setup.tee & bit) !== 0)) {
        mkdirSync(setup.logFolder, { recursive: true })
        const file = createWriteStream(join(setup.logFolder, `${name}.log`))
        file.on('error', (error) => process.stderr.write(`viaduct run: ${file.path}: ${error.message}\n`))
        files.push(file)
        places.push({ to: file, prefix: '' })
      }
      if (setup.shown && !onlyFile) places.push({ to: terminal, prefix })
      carry(from as Readable, places as never)
    }
    return files
  }

  async #watch(setup: RankSetup, files: WriteStream[]): Promise<RankEnd> {
    const child = this.#child
    const closed = new Promise<void>((resolve) => child.once('close', () => resolve()))
    const how = await new Promise<Pick<RankEnd, 'exitCode' | 'signal' | 'error'>>((resolve) => {
      child.once('error', (error) => {
        const message = `${setup.command.program} could not be started: ${error.message}`
        resolve({ exitCode: 127, signal: null, error: { message, code: null, timeMs: null } })
      })
      child.once('exit', (exitCode, signal) => resolve({ exitCode, signal, error: null }))
    })
    const timeMs = Date.now()
    this.#over = true
    const stopped = how.signal !== null && this.#sent.has(how.signal)
    if (this.pid > 0) {
      this.#killGroup('SIGKILL')
      removeSharedMemory(this.pid)
      let timer: NodeJS.Timeout | undefined
      const patience = new Promise<void>((resolve) => {
        timer = setTimeout(resolve, outputPatienceMs)
      })
      await Promise.race([closed, patience])
      clearTimeout(timer)
    }
    await Promise.all(files.map((file) => new Promise<void>((resolve) => file.end(() => resolve()))))
    const { rank, localRank } = setup
    return {
      rank,
      localRank,
      pid: this.pid,
      timeMs,
      stopped,
      silence: null,
      ...how,
      error: how.error ?? readErrorFile(setup.errorFile),
    }
  }
}
