// The results' files and their table. A file bench/results/<date>-<suite>.json holds rows; a row that is measured again on the same
// day replaces its former self. The table in docs/benchmarks.md is made of the newest of each row.
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { packageRoot } from '../lib/base/packageRoot.js'
import type { Machine, Versions } from './machine.js'
import type { Pair, Ratio } from './pairs.js'

/** One line of the table: one piece of work, against one peer. */
export interface Row {
  readonly suite: string
  /** E.g. `training step (a), float32`. */
  readonly work: string
  /** Null where nothing is compared. */
  readonly peer: string | null
  readonly pairs: readonly Pair[]
  readonly ratio: Ratio | null
  /** A number that is no ratio, e.g. microseconds an op. */
  readonly figure?: { readonly value: number; readonly unit: string }
  /** How the results of both sides agree, in words. */
  readonly parity?: string
  readonly note?: string
  readonly threads: number
  readonly at: string
  readonly versions: Versions
  readonly machine: Machine
}

export const resultsFolder = () => join(packageRoot(), 'bench/results')
const keyOf = (row: Row) => `${row.suite}/${row.work}/${row.peer}`

function readRows(file: string): Row[] {
  try {
    return (JSON.parse(readFileSync(file, 'utf8')) as { rows: Row[] }).rows
  } catch {
    return []
  }
}

/** Keeps rows of one suite; returns the file. @param into - default: bench/results. */
export function keep(suite: string, rows: readonly Row[], into = resultsFolder()): string {
  mkdirSync(into, { recursive: true })
  const file = join(into, `${new Date().toISOString().slice(0, 10)}-${suite}.json`)
  const fresh = new Set(rows.map(keyOf))
  const all = [...readRows(file).filter((row) => !fresh.has(keyOf(row))), ...rows]
  writeFileSync(file, `${JSON.stringify({ suite, rows: all }, null, 1)}\n`)
  return file
}

/** The newest of each row of all files, suite by suite. */
export function newestRows(): Row[] {
  const newest = new Map<string, Row>()
  for (const name of readdirSync(resultsFolder())
    .filter((file) => file.endsWith('.json'))
    .sort()) {
    for (const row of readRows(join(resultsFolder(), name))) {
      const other = newest.get(keyOf(row))
      if (other === undefined || other.at <= row.at) newest.set(keyOf(row), row)
    }
  }
  // Rows of GPUs have a table of their own (gpu/table.ts).
  for (const [key, row] of newest) if (row.suite === 'cuda') newest.delete(key)
  const order = ['train', 'packed', 'decode', 'ranks', 'convert', 'load', 'online', 'start', 'ops', 'floors']
  return [...newest.values()].sort(
    (x, y) => order.indexOf(x.suite) - order.indexOf(y.suite) || keyOf(x).localeCompare(keyOf(y)),
  )
}

/** Seconds for people. */
export function time(seconds: number): string {
  return seconds < 1 ? `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms` : `${seconds.toFixed(2)} s`
}

/** Rows as a Markdown table. */
export function table(rows: readonly Row[]): string {
  const lines = [
    '| work | peer | ratio (median) | lower quartile | ours | peer | pairs (dropped) | results agree |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for (const { work, peer, ratio, figure, parity } of rows) {
    const cells =
      ratio === null
        ? ['', '', figure === undefined ? '' : `${figure.value.toFixed(2)} ${figure.unit}`, '', '']
        : [
            `${ratio.median.toFixed(2)}×`,
            `${ratio.lowerQuartile.toFixed(2)}×`,
            time(ratio.oursSeconds),
            time(ratio.peerSeconds),
            `${ratio.pairs} (${ratio.dropped})`,
          ]
    lines.push(`| ${[work, peer ?? '', ...cells, parity ?? ''].join(' | ')} |`)
  }
  return lines.join('\n')
}

const [begin, end] = ['<!-- table: npm run bench -- --table -->', '<!-- end of table -->']

/** Writes the newest rows between the marks in docs/benchmarks.md, and returns what it wrote. */
export function writeTable(): string {
  const rows = newestRows()
  const places = new Map<string, string>()
  for (const { machine: m, versions: v, at, threads } of rows) {
    const what = `${m.cpu} (${m.instructions.join(', ')}), ${m.cores} cores, ${m.memoryGb} GB, ${m.kernel}; ${threads} threads; Node ${v.node}, PyTorch ${v.torch ?? '-'}, Transformers ${v.transformers ?? '-'}`
    places.set(what, at.slice(0, 10))
  }
  const where = [...places].map(([what, date]) => `Measured on ${date}: ${what}.`).join('\n')
  const text = `${where}\n\n${table(rows)}`
  const file = join(packageRoot(), 'docs/benchmarks.md')
  const page = readFileSync(file, 'utf8')
  const from = page.indexOf(begin) + begin.length
  writeFileSync(file, `${page.slice(0, from)}\n${text}\n${page.slice(page.indexOf(end))}`)
  return text
}
