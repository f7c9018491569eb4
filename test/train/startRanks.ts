// Starts ranks of worker.ts through `viaduct run`, as real processes, and reads what they leave.
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Work } from './worker.js'

const here = dirname(fileURLToPath(import.meta.url))
const root = join(here, '../..')

/** A started run: its output so far, and its end. */
export interface Started {
  readonly child: ChildProcess
  readonly lines: string[]
  /** Resolves with the exit code, or the signal's name. */
  readonly end: Promise<number | NodeJS.Signals>
  /** Resolves when a line fits. */
  line(pattern: RegExp): Promise<void>
}

/** Starts `ranks` processes; one runs without the launcher. One thread each, so that any number of ranks computes alike. */
export function start(task: Work | readonly Work[], ranks = 1): Started {
  return startScript('worker.ts', [JSON.stringify(task)], ranks)
}

/** Starts a script of this folder. */
export function startScript(name: string, args: readonly string[], ranks: number): Started {
  const script = join(here, name)
  const launcher =
    ranks === 1 ? [] : [join(root, 'lib/cli/main.ts'), 'run', '--standalone', '--nproc-per-node', String(ranks)]
  const child = spawn(process.execPath, ['--import', 'tsx', ...launcher, script, ...args], {
    cwd: root,
    env: { ...process.env, VIADUCT_NUM_THREADS: '1' },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const lines: string[] = []
  const waiting: { pattern: RegExp; done: () => void }[] = []
  let rest = ''
  const read = (chunk: Buffer) => {
    const parts = (rest + chunk.toString()).split('\n')
    rest = parts.pop() ?? ''
    for (const line of parts) {
      lines.push(line)
      for (const waiter of waiting.filter(({ pattern }) => pattern.test(line))) waiter.done()
    }
  }
  child.stdout.on('data', read)
  child.stderr.on('data', read)
  const end = new Promise<number | NodeJS.Signals>((resolve) => {
    child.on('close', (code, signal) => {
      for (const waiter of waiting) waiter.done()
      resolve(code ?? signal ?? 1)
    })
  })
  return { child, lines, end, line: (pattern) => new Promise((done) => waiting.push({ pattern, done })) }
}

/** Runs to the end; throws with the output when it fails. */
export async function run(task: Work | readonly Work[], ranks = 1): Promise<Started> {
  const started = start(task, ranks)
  const code = await started.end
  if (code !== 0) throw new Error(`${ranks} ranks ended with ${code}:\n${started.lines.join('\n')}`)
  return started
}

/** A step as the metrics file has it. */
export interface Step {
  readonly step: number
  readonly loss: number
  readonly gradNorm: number
  readonly lr: number
  readonly metrics: Readonly<Record<string, number>>
}

/** Steps of a metrics file, in the order in which they were made. A last line that a kill cut short is left out. */
export function steps(path: string): Step[] {
  if (!existsSync(path)) return []
  return readFileSync(path, 'utf8')
    .split('\n')
    .slice(0, -1)
    .map((line) => JSON.parse(line) as Step & { kind: string })
    .filter(({ kind }) => kind === 'step')
}
