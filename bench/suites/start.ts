// What a user waits for: the help of the command, and the first training step of the quickstart model, from the start of the program.
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { packageRoot } from '../../lib/base/packageRoot.js'
import { quantile } from '../pairs.js'
import type { Row } from '../results.js'
import type { BenchOptions } from './options.js'
import { rowOf } from './rows.js'

/** Seconds from the start of `viaduct` to the first output that `shows` finds, or to its end. */
async function secondsTo(
  args: readonly string[],
  shows: RegExp | null,
  threads: number,
  folder: string,
): Promise<number> {
  const from = performance.now()
  const child = spawn(process.execPath, [join(packageRoot(), 'dist/lib/cli/main.js'), ...args], {
    cwd: folder,
    env: { ...process.env, VIADUCT_NUM_THREADS: String(threads) },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  let text = ''
  let seen: number | null = null
  child.stdout.on('data', (data: Buffer) => {
    text += data.toString()
    if (seen === null && shows?.test(text)) seen = performance.now()
  })
  const code = await new Promise<number | null>((resolve) => child.on('close', resolve))
  if (code !== 0 || (shows !== null && seen === null))
    throw new Error(`expected viaduct ${args.join(' ')} to end well, got exit ${code} and:\n${text}`)
  return ((seen ?? performance.now()) - from) / 1000
}

const works = [
  { work: 'viaduct --help', args: ['--help'], shows: null },
  {
    work: 'first training step of the quickstart model, from the start of the program',
    args: ['train', 'llama_tiny_cpu_pretrain_config', 'train.train_iters=2', 'validation.eval_iters=0'],
    shows: /^ +1 .*\n/m,
  },
]

export async function startSuite(options: BenchOptions): Promise<Row[]> {
  const folder = mkdtempSync(join(tmpdir(), 'viaduct-bench-start-'))
  const rows: Row[] = []
  try {
    for (const { work, args, shows } of works) {
      await secondsTo(args, shows, options.threads, folder) // files come into the page cache
      const seconds: number[] = []
      for (let i = 0; i < options.pairs; i++) seconds.push(await secondsTo(args, shows, options.threads, folder))
      const figure = { value: quantile(seconds, 0.5) * 1000, unit: 'ms' }
      const note = `median of ${seconds.length} starts, the fastest ${(Math.min(...seconds) * 1000).toFixed(0)} ms`
      rows.push(await rowOf(options, { suite: 'start', work, peer: null, figure, note }, []))
    }
  } finally {
    rmSync(folder, { recursive: true })
  }
  return rows
}
