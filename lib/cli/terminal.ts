// What people see: steps, tables, bars. On a terminal bars redraw in place; elsewhere they become a few plain lines.
// Everything goes to stderr except results, which go to stdout so that they can be piped.
import { createRequire } from 'node:module'
import { styleText } from 'node:util'

type Style = Parameters<typeof styleText>[0]

/** True when stderr is a terminal: bars and colours are drawn. */
export const isTerminal = process.stderr.isTTY === true

/** Text in a style, or plain where colours are not wanted (no terminal, NO_COLOR). */
export function styled(style: Style, text: string): string {
  return isTerminal ? styleText(style, text) : text
}

/** A line for people. */
export function say(line = ''): void {
  process.stderr.write(`${line}\n`)
}

/** A result line on stdout. */
export function print(line = ''): void {
  process.stdout.write(`${line}\n`)
}

/**
 * Rows as an aligned table. Columns whose cells are all numbers are aligned right.
 * @param head - column titles; every row has as many cells.
 */
export function table(head: readonly string[], rows: readonly (readonly (string | number)[])[]): string {
  const cells = [head.map(String), ...rows.map((row) => row.map(String))]
  const widths = head.map((_, c) => Math.max(...cells.map((row) => (row[c] ?? '').length)))
  const numeric = head.map(
    (_, c) => rows.length > 0 && rows.every((row) => /^[-+]?[\d.,]+( ?[kMGT]?i?B|%|x)?$/.test(String(row[c]))),
  )
  const line = (row: readonly string[]) =>
    row
      .map((cell, c) => (numeric[c] ? cell.padStart(widths[c] as number) : cell.padEnd(widths[c] as number)))
      .join('  ')
      .trimEnd()
  const rule = widths.map((w) => '-'.repeat(w)).join('  ')
  return [line(cells[0] as string[]), rule, ...cells.slice(1).map(line)].join('\n')
}

/** Bytes for people: `1.98 GB`, decimal units. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB', 'PB']
  let value = bytes
  let unit = 0
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000
    unit++
  }
  return `${unit === 0 ? value : value.toFixed(value < 10 ? 2 : 1)} ${units[unit]}`
}

/** Seconds for people: `4.2 s`, `3 min 10 s`. */
export function formatSeconds(seconds: number): string {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`
}

/** A running count of long work. */
export interface Progress {
  /** @param done - so far, in the unit of `total`. @param note - shown behind the bar, e.g. the file at hand. */
  update(done: number, note?: string): void
  stop(): void
}

/**
 * A bar on a terminal; elsewhere a line at each tenth.
 * @param unit - `B` prints bytes and a rate; other units print counts.
 */
export function progress(title: string, total: number, unit = '', pace = paceOf(total)): Progress {
  const show = (n: number) => (unit === 'B' ? formatBytes(n) : String(n))
  if (isTerminal) {
    // Loaded when a bar is drawn: `--help` has none.
    const cliProgress = createRequire(import.meta.url)('cli-progress') as typeof import('cli-progress')
    const bar = new cliProgress.SingleBar({
      format: `  ${title.padEnd(12)} {bar} {percentage}% {shown} {note}`,
      barCompleteChar: '█',
      barIncompleteChar: '░',
      barsize: 28,
      hideCursor: true,
      clearOnComplete: true,
      stream: process.stderr,
    })
    bar.start(Math.max(total, 1), 0, { shown: '', note: '' })
    return {
      update(done, note = '') {
        const rate = unit === 'B' ? pace(done) : ''
        bar.update(done, { shown: `${show(done)} of ${show(total)}${rate}`, note })
      },
      stop: () => bar.stop(),
    }
  }
  let tenth = 0
  return {
    update(done, note = '') {
      const now = Math.floor((10 * done) / Math.max(total, 1))
      if (now <= tenth) return
      tenth = now
      say(
        `  ${title}: ${now * 10}% (${show(done)} of ${show(total)}${unit === 'B' ? pace(done) : ''}) ${note}`.trimEnd(),
      )
    },
    stop() {},
  }
}

/** Words for how fast bytes come and how long the rest takes, measured from the first call on: `, 1.2 GB/s, 4.2 s left`. */
function paceOf(total: number): (done: number) => string {
  let first: { readonly at: number; readonly done: number } | null = null
  return (done) => {
    const at = performance.now()
    first ??= { at, done }
    const rate = (1000 * (done - first.done)) / (at - first.at)
    if (!(at - first.at > 200 && rate > 0)) return ''
    return `, ${formatBytes(rate)}/s, ${formatSeconds((total - done) / rate)} left`
  }
}

/** A bar for work that tells bytes done and bytes in all, and what takes it away. Short work draws none. */
export function byteProgress(title: string): {
  readonly onProgress: (done: number, total: number) => void
  stop(): void
} {
  const started = performance.now()
  let bar: Progress | null = null
  let pace: ReturnType<typeof paceOf> | null = null
  return {
    onProgress(done, total) {
      pace ??= paceOf(total)
      pace(done)
      if (bar === null && performance.now() - started < 500) return
      bar ??= progress(title, total, 'B', pace)
      bar.update(Math.min(done, total))
    },
    stop: () => bar?.stop(),
  }
}
