// Loads of a warm folder to tensors: how near they are to plain reads of its bytes, and what safetensors needs.
import { readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { alternate, type Runner } from '../alternate.js'
import { peerKinds } from '../peers.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
import { type BenchOptions, syntheticFolder } from './options.js'
import { rowOf, withSides } from './rows.js'

/** Beside plain reads of its bytes in our own process, and beside safetensors with warm malloc memory. */
export async function loadSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  const folder = syntheticFolder(options)
  const bytes = readdirSync(folder).reduce((n, name) => n + statSync(join(folder, name)).size, 0)
  const rate = (seconds: number) => bytes / 1e9 / seconds
  await withSides(options, peerKinds.slice(1), async ({ ours, peers }) => {
    const { side } = peers[0] as { side: Side }
    const runner = (of: Side, command: string, args: Record<string, unknown>): Runner => ({
      side: of,
      run: async () => (await of.call<{ seconds: number }>(command, { folder, ...args })).seconds,
    })
    for (const dtype of options.dtypes) {
      const work = `load of a warm folder (${options.gigabytes} GB, bfloat16) as ${dtype}`
      process.stderr.write(`${work} `)
      const own = runner(ours, 'load_tensors', { dtype })
      const others = [runner(ours, 'raw_read', { threads: options.threads }), runner(side, 'load_tensors', { dtype })]
      for (const warmUp of [own, ...others]) await warmUp.run()
      const pairs = await alternate(own, others, options.pairs, options.limitSeconds)
      for (const [i, peer] of ['plain reads of the files, as they are', 'safetensors and PyTorch, tuned'].entries()) {
        const row = await rowOf(options, { suite: 'load', work, peer }, pairs[i] ?? [], side)
        if (row.ratio === null) continue
        const note = `${rate(row.ratio.peerSeconds).toFixed(1)} GB/s of the file for the peer`
        rows.push({ ...row, figure: { value: rate(row.ratio.oursSeconds), unit: 'GB/s of the file' }, note })
      }
    }
  })
  return rows
}
