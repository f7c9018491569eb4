// Import and export of a large folder, by a library call in a warm process (or in each of two, that share the work), beside cp,
// beside SHA-256 alone and beside a script. All begin with nothing left to write to disk; ours and cp end with all of it there.
import { spawnSync } from 'node:child_process'
import { existsSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { alternate, type Runner } from '../alternate.js'
import { peerKinds } from '../peers.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
import { commandRows } from './commands.js'
import { type BenchOptions, syntheticFolder } from './options.js'
import { rowOf, withSides } from './rows.js'

interface Case {
  readonly way: 'import' | 'export'
  readonly tp: number
  readonly processes: number
  readonly sha256: boolean
}

const cases: readonly Case[] = (['import', 'export'] as const).flatMap((way) => [
  { way, tp: 1, processes: 1, sha256: false },
  { way, tp: 2, processes: 1, sha256: false },
  { way, tp: 2, processes: 2, sha256: false },
  { way, tp: 1, processes: 1, sha256: true },
  { way, tp: 2, processes: 1, sha256: true },
])

function nameOf({ way, tp, processes, sha256 }: Case, options: BenchOptions): string {
  const more = [...(sha256 ? ['with SHA-256'] : []), ...(processes > 1 ? [`${processes} processes`] : [])]
  return [`${way}, TP ${tp} (${options.gigabytes} GB, bfloat16)`, ...more].join(', ')
}

interface Converted extends Record<string, unknown> {
  readonly seconds: number
  readonly peak_mib?: number
}

/** Where the folders of a suite stand. */
export class Places {
  constructor(
    readonly hf: string,
    private readonly work: string,
    private readonly gigabytes: number,
  ) {}
  readonly output = () => join(this.work, 'converted')
  readonly copy = () => join(this.work, 'copied')
  /** What exports begin with: our checkpoint, the script's files. */
  readonly checkpoint = (tp: number) => join(this.work, `checkpoint-${this.gigabytes}-tp${tp}`)
  readonly split = (tp: number) => join(this.work, `split-${this.gigabytes}-tp${tp}`)
}

/** Removes what an earlier run wrote, and waits until the disk has nothing left to do. */
export function clear(...folders: string[]): void {
  for (const folder of folders) rmSync(folder, { recursive: true, force: true })
  spawnSync('sync')
}

/** cp and flush; with SHA-256, a pass of it too, and what takes longer. */
function copying(side: Side, places: Places, sha256: boolean): Runner {
  return {
    side,
    clear: () => clear(places.copy()),
    async run() {
      const copied = await side.call<Converted>('copy_folder', { folder: places.hf, target: places.copy() })
      const hashed = sha256 ? await side.call<Converted>('hash_folder', { folder: places.hf }) : null
      return Math.max(copied.seconds, hashed?.seconds ?? 0)
    },
  }
}

function script(side: Side, places: Places, { way, tp }: Case, flush: boolean): Runner {
  const args = { target: places.copy(), flush }
  return {
    side,
    clear: () => clear(places.copy()),
    async run() {
      const command = way === 'import' ? 'split_folder' : 'merge_folder'
      const from = way === 'import' ? { folder: places.hf, parts: tp } : { folder: places.split(tp), source: places.hf }
      return (await side.call<Converted>(command, { ...args, ...from })).seconds
    },
  }
}

/** One case: its rows beside each peer, and the peak of memory. */
async function race(options: BenchOptions, of: Case, places: Places, ours: Side, peer: Side): Promise<Row[]> {
  const work = nameOf(of, options)
  process.stderr.write(`${work} `)
  const peaks: number[] = []
  const { way, tp, sha256 } = of
  const own: Runner = {
    side: ours,
    clear: () => clear(places.output()),
    async run() {
      const folder = way === 'import' ? places.hf : places.checkpoint(tp)
      const answer = await ours.call<Converted>(`${way}_folder`, { folder, target: places.output(), tp, sha256 })
      if (answer.peak_mib !== undefined) peaks.push(answer.peak_mib)
      return answer.seconds
    },
  }
  const copies = sha256 ? 'the slower of cp with fsync and one SHA-256 pass' : 'cp with fsync'
  const peers: [string, Runner][] = [[copies, copying(peer, places, sha256)]]
  if (!sha256) {
    const what = way === 'import' ? 'a script that splits with PyTorch and safetensors' : 'a script that joins so'
    peers.push([what, script(peer, places, of, false)], [`${what}, flushed`, script(peer, places, of, true)])
  }
  own.clear?.()
  await own.run() // warm
  peaks.length = 0
  const runners = peers.map(([, runner]) => runner)
  const pairs = await alternate(own, runners, options.pairs, options.limitSeconds)
  const rows: Row[] = []
  for (const [i, [name]] of peers.entries())
    rows.push(await rowOf(options, { suite: 'convert', work, peer: name }, pairs[i] ?? [], peer))
  if (peaks.length > 0) {
    const figure = { value: Math.max(...peaks), unit: 'MiB' }
    rows.push(await rowOf(options, { suite: 'convert', work: `${work}: peak memory`, peer: null, figure }, []))
  }
  return rows
}

export async function convertSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  const places = new Places(syntheticFolder(options), options.work, options.gigabytes)
  for (const of of cases.filter((of) => nameOf(of, options).includes(options.only))) {
    await withSides(
      options,
      peerKinds.slice(0, 1),
      async ({ ours, peers }) => {
        const peer = (peers[0] as { side: Side }).side
        const { tp } = of
        clear()
        if (of.way === 'export') {
          const from = { folder: places.hf, tp, sha256: false }
          if (!existsSync(places.checkpoint(tp)))
            await ours.call('import_folder', { ...from, target: places.checkpoint(tp) })
          if (!of.sha256 && !existsSync(places.split(tp)))
            await peer.call('split_folder', { folder: places.hf, target: places.split(tp), parts: tp, flush: true })
        }
        rows.push(...(await race(options, of, places, ours, peer)))
      },
      of.processes,
    )
  }
  for (const way of ['import', 'export'] as const) rows.push(...(await commandRows(options, places, way)))
  clear(...[1, 2].flatMap((tp) => [places.checkpoint(tp), places.split(tp)]))
  return rows
}
