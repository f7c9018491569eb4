// One side of a benchmark: a child process that answers JSON lines. Both sides speak the same protocol.
import { type ChildProcess, spawn } from 'node:child_process'
import { createInterface } from 'node:readline'

type Answer = Record<string, unknown>

/** A process that runs benchmark commands one at a time. */
export class Side {
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

  get pid(): number {
    return this.#child.pid ?? 0
  }

  /** Runs one command. @throws what the side reports, or its death. */
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
