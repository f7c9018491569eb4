// Import and export as people start them: one command, from its start to its end. Beside it the script of peer_files.py, which
// imports PyTorch and splits or joins the same matrices.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { packageRoot } from '../../lib/base/packageRoot.js'
import { alternate, type Runner } from '../alternate.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
import { clear, type Places } from './convert.js'
import type { BenchOptions } from './options.js'
import { rowOf } from './rows.js'

/** What is measured are children of this process. */
const children: Side = {
  name: 'commands',
  pids: [process.pid],
  call: async () => Promise.reject(new Error('a command takes no further ones')),
  end() {},
}

function seconds(program: string, args: readonly string[], env: Readonly<Record<string, string>>): number {
  const from = performance.now()
  const { status, stderr } = spawnSync(program, args, { encoding: 'utf8', env: { ...process.env, ...env } })
  if (status !== 0) throw new Error(`${program} ${args.join(' ')} ended with ${status}: ${stderr}`)
  return (performance.now() - from) / 1000
}

/** Rows of one way at TP 2. */
export async function commandRows(options: BenchOptions, places: Places, way: 'import' | 'export'): Promise<Row[]> {
  const tp = 2
  const work = `${way}, TP ${tp} (${options.gigabytes} GB, bfloat16), whole command`
  if (!work.includes(options.only)) return []
  process.stderr.write(`${work} `)
  const threads = String(options.threads)
  const viaduct = (...args: string[]) =>
    seconds(process.execPath, [join(packageRoot(), 'dist/lib/cli/main.js'), ...args], { VIADUCT_NUM_THREADS: threads })
  const python = (command: string, args: object) =>
    seconds(options.python, [join(packageRoot(), 'bench/peer_files.py'), command, JSON.stringify(args)], {
      PEER_THREADS: threads,
      OMP_NUM_THREADS: threads,
    })
  const ours: Runner = {
    side: children,
    clear: () => clear(places.output()),
    run: async () =>
      way === 'import'
        ? viaduct('import', places.hf, places.output(), '--tp', String(tp))
        : viaduct('export', places.checkpoint(tp), places.output()),
  }
  const script = (flush: boolean): Runner => ({
    side: children,
    clear: () => clear(places.copy()),
    run: async () =>
      way === 'import'
        ? python('split_folder', { folder: places.hf, target: places.copy(), parts: tp, flush })
        : python('merge_folder', { folder: places.split(tp), target: places.copy(), source: places.hf, flush }),
  })
  if (way === 'export') {
    if (!existsSync(places.checkpoint(tp))) viaduct('import', places.hf, places.checkpoint(tp), '--tp', String(tp))
    if (!existsSync(places.split(tp)))
      python('split_folder', { folder: places.hf, target: places.split(tp), parts: tp, flush: true })
  }
  clear()
  const peers = ['a script with PyTorch and safetensors', 'a script with PyTorch and safetensors, flushed']
  const pairs = await alternate(ours, [script(false), script(true)], options.pairs, options.limitSeconds)
  return Promise.all(peers.map((peer, i) => rowOf(options, { suite: 'convert', work, peer }, pairs[i] ?? [])))
}
