// The list of steps that the quickstart shows: on a terminal the running step has a bar below its line, both overwritten; elsewhere
// plain lines. No line is longer than the terminal is wide, since a line that wraps cannot be overwritten.

/** Where the list is drawn: process.stdout, or what a test reads. */
export interface Screen {
  readonly isTTY?: boolean
  readonly columns?: number
  write(text: string): unknown
}

/** @param share - done so far, 0 to 1. @param note - what to tell beside the bar. */
export type StepProgress = (share: number, note: string) => void

const clearLine = '\r\x1b[2K'
const clearTwoLines = `${clearLine}\x1b[1A${clearLine}`

export class StepList {
  #number = 0

  constructor(
    readonly total: number,
    readonly screen: Screen = process.stdout,
  ) {}

  /** Runs a step and tells its time and result. */
  async step(title: string, work: (progress: StepProgress) => Promise<string>): Promise<void> {
    this.#number++
    const { screen } = this
    const head = `${this.#number}/${this.total} ${title}`
    const started = performance.now()
    let tenth = 0
    screen.write(`${this.#cut(`  … ${head}`)}\n`)
    const result = await work((share, note) => {
      const percent = `${(100 * share).toFixed(0)}% ${note}`
      if (screen.isTTY) {
        const filled = Math.round(24 * share)
        screen.write(`${clearLine}${this.#cut(`    ${'█'.repeat(filled)}${'░'.repeat(24 - filled)} ${percent}`)}`)
      } else if (Math.floor(10 * share) > tenth) {
        tenth = Math.floor(10 * share)
        screen.write(`    ${tenth * 10}% ${note}\n`)
      }
    })
    const seconds = ((performance.now() - started) / 1000).toFixed(1)
    if (screen.isTTY) screen.write(clearTwoLines)
    screen.write(`  ✓ ${head} (${seconds} s)\n    ${result.replaceAll('\n', '\n    ')}\n`)
  }

  #cut(line: string): string {
    const { isTTY, columns = 80 } = this.screen
    return isTTY && line.length >= columns ? `${line.slice(0, Math.max(1, columns - 2))}…` : line
  }
}
