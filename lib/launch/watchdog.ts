// Ends the ranks when the launcher itself is killed: a shell in a session of its own holds the other end of a pipe. Each line
// is the list of process groups to kill; when the pipe closes it kills those of the last line.
import { type ChildProcess, spawn } from 'node:child_process'

const program = `
while read -r line; do groups=$line; done
for group in $groups; do kill -s KILL -- "-$group" 2>/dev/null; done
`

export class Watchdog {
  readonly #shell: ChildProcess
  readonly #groups = new Set<number>()

  constructor() {
    this.#shell = spawn('/bin/sh', ['-c', program], { detached: true, stdio: ['pipe', 'ignore', 'ignore'] })
    // Without a shell the ranks run all the same; a launcher that is killed then leaves them.
    this.#shell.on('error', () => {})
    this.#shell.stdin?.on('error', () => {})
    this.#shell.unref()
  }

  add(group: number): void {
    this.#groups.add(group)
    this.#tell()
  }

  remove(group: number): void {
    this.#groups.delete(group)
    this.#tell()
  }

  /** Lets the shell go; it kills what was not removed. */
  close(): void {
    this.#shell.stdin?.end()
  }

  #tell(): void {
    this.#shell.stdin?.write(`${[...this.#groups].join(' ')}\n`)
  }
}
