// One side of a benchmark: child processes that answer JSON lines. Both sides speak the same protocol.
import { type ChildProcess, spawn } from 'node:child_process'
import { createInterface } from 'node:readline'

type Answer = Record<string, unknown>

/** What runs benchmark commands one at a time. */
export interface Side {
  readonly name: string
  readonly pids: readonly number[]
  /** Runs one command. @throws what the side reports, or its death. */
  call<T extends Answer>(command: string, args?: Record<string, unknown>): Promise<T>
  end(): void
}

/** A side of one process. */
export class ProcessSide implements Side {
  readonly #child: ChildProcess
  readonly #waiting: { resolve: (answer: Answer) => void; reject: (error: Error) => void }[] = []
  #failure: Error | null = null

  constructor(
    readonly name: string,
    program: string,
    args: readonly string[],
    env: Readonly<Record<string, string>> = {},
  ) {
    this.#child = spawn(program, args, { stdio: ['pipe', 'pipe', 'inherit'], env: { ...process.env, ...env } })
    createInterface({ input: this.#child.stdout as NodeJS.ReadableStream }).on('line', (line) => {
      if (!line.startsWith('{')) return
      const answer = JSON.parse(line) as Answer
      const call = this.#waiting.shift()
      if (typeof answer.error === 'string') call?.reject(new Error(`${this.name}: ${answer.error}`))
      else call?.resolve(answer)
    })
    const fail = (why: string) => {
      this.#failure = new Error(`${this.name}: ${why}`)
      for (const call of this.#waiting.splice(0)) call.reject(this.#failure)
    }
    this.#child.on('error', (error) => fail(error.message))
    this.#child.on('exit', (code, signal) => fail(`ended with ${signal ?? code}`))
  }

  get pids(): readonly number[] {
    return [this.#child.pid ?? 0]
  }

  call<T extends Answer>(command: string, args: Record<string, unknown> = {}): Promise<T> {
    if (this.#failure !== null) return Promise.reject(this.#failure)
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve: resolve as (answer: Answer) => void, reject })
      this.#child.stdin?.write(`${JSON.stringify({ command, ...args })}\n`)
    })
  }

  end(): void {
    this.#child.stdin?.end()
  }
}

/** Processes that run each command together, the ranks of one world. The answer is that of the slowest. */
export class RankSides implements Side {
  constructor(
    readonly name: string,
    private readonly ranks: readonly Side[],
    private readonly close: () => void,
  ) {}

  get pids(): readonly number[] {
    return this.ranks.flatMap(({ pids }) => pids)
  }

  async call<T extends Answer>(command: string, args: Record<string, unknown> = {}): Promise<T> {
    const answers = await Promise.all(this.ranks.map((rank) => rank.call<T>(command, args)))
    return answers.reduce((slowest, next) => (Number(next['seconds']) > Number(slowest['seconds']) ? next : slowest))
  }

  end(): void {
    for (const rank of this.ranks) rank.end()
    this.close()
  }
}
