// What is measured: one function a suite. Each makes the same work for both sides, holds their results against each other, and
// gives rows. Sizes are those of peer.py.
import { spawnSync } from 'node:child_process'
import { existsSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { alternate, type Runner } from './alternate.js'
import type { EnqueueCost } from './enqueue.js'
import { describeMachine, ownVersions } from './machine.js'
import { type Pair, quantile, ratioOf } from './pairs.js'
import { type PeerKind, peerKinds, startOurs, startPeer } from './peers.js'
import type { Row } from './results.js'
import type { Side } from './side.js'

export type SizeName = 'a' | 'b'
export type DtypeName = 'float32' | 'bfloat16'

export interface BenchOptions {
  readonly sizes: readonly SizeName[]
  readonly dtypes: readonly DtypeName[]
  readonly pairs: number
  /** No further pair begins after this long, once three are there. */
  readonly limitSeconds: number
  readonly threads: number
  readonly python: string
  /** Folder for models and conversions. */
  readonly work: string
  readonly gigabytes: number
  readonly newTokens: number
}

const sizes = {
  a: { batch: 8, seqLength: 256, vocabulary: 8192, text: '4 layers of 256, vocabulary 8192, batch 8×256' },
  b: { batch: 4, seqLength: 512, vocabulary: 32000, text: '8 layers of 512, vocabulary 32000, batch 4×512' },
} as const

/** Repeatable token ids (mulberry32). */
function randomTokens(rows: number, length: number, vocabulary: number, seed: number): number[][] {
  let state = seed
  const next = () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), state | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
  return Array.from({ length: rows }, () => Array.from({ length }, () => Math.floor(next() * vocabulary)))
}

interface Sides {
  readonly ours: Side
  readonly peers: readonly { readonly kind: PeerKind; readonly side: Side }[]
}

async function withSides<T>(
  options: BenchOptions,
  kinds: readonly PeerKind[],
  work: (sides: Sides) => Promise<T>,
): Promise<T> {
  const peers = kinds.map((kind) => ({ kind, side: startPeer(kind, options.python, options.threads) }))
  const ours = startOurs(options.threads)
  try {
    return await work({ ours, peers })
  } finally {
    for (const side of [ours, ...peers.map(({ side }) => side)]) side.end()
  }
}

type About = Pick<Row, 'suite' | 'work' | 'peer'> & Partial<Pick<Row, 'figure' | 'parity' | 'note'>>

async function rowOf(options: BenchOptions, about: About, pairs: readonly Pair[], peer?: Side): Promise<Row> {
  const versions = {
    ...ownVersions(),
    ...(peer === undefined ? {} : await peer.call<Record<string, string>>('versions')),
  }
  const ratio = pairs.length > 0 ? ratioOf(pairs) : null
  return {
    ...about,
    pairs,
    ratio,
    threads: options.threads,
    at: new Date().toISOString(),
    versions,
    machine: describeMachine(),
  }
}

const isMade = (folder: string) => existsSync(join(folder, 'config.json'))

async function modelFolder(options: BenchOptions, size: SizeName, peer: Side | undefined): Promise<string> {
  const folder = join(options.work, size)
  if (!isMade(folder)) await peer?.call('make', { folder, size })
  return folder
}

interface Trained extends Record<string, unknown> {
  readonly seconds: number[]
  readonly losses: number[]
}

/** A side that trains: its losses so far. */
class Trainer implements Runner {
  readonly losses: number[] = []
  constructor(
    readonly side: Side,
    private readonly tokens: number[][],
  ) {}

  async run(): Promise<number> {
    const { seconds, losses } = await this.side.call<Trained>('train', { tokens: this.tokens, steps: 1 })
    this.losses.push(...losses)
    return seconds[0] as number
  }
}

/** Loss of each step: float32 sums in other orders differ by 1e-6 at first and drift; bfloat16 rounds to 3 digits. */
const lossTolerance = { float32: 1e-4, bfloat16: 1e-2 } as const
const comparedSteps = 6

function compareLosses(ours: readonly number[], theirs: readonly number[], dtype: DtypeName, where: string): string {
  const steps = Math.min(comparedSteps, ours.length, theirs.length)
  let worst = 0
  for (let i = 0; i < steps; i++) worst = Math.max(worst, Math.abs((ours[i] as number) / (theirs[i] as number) - 1))
  if (!(worst <= lossTolerance[dtype])) {
    throw new Error(
      `${where}: expected equal losses, got ${ours.slice(0, steps).join(', ')} and ${theirs.slice(0, steps).join(', ')}`,
    )
  }
  return `losses of ${steps} steps within ${worst.toExponential(0)}`
}

/** Training steps: forward, loss, backward, clipping, AdamW. Our bfloat16 is with float32 masters, the peer's is autocast. */
export async function trainSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  for (const size of options.sizes) {
    const { batch, seqLength, vocabulary } = sizes[size]
    const tokens = randomTokens(batch, seqLength, vocabulary, 1)
    for (const dtype of options.dtypes) {
      const work = `training step (${size}), ${dtype}`
      process.stderr.write(`${work} `)
      await withSides(options, peerKinds, async ({ ours, peers }) => {
        const folder = await modelFolder(options, size, peers[0]?.side)
        const mixed = dtype === 'bfloat16'
        await ours.call('load', { folder, mode: mixed ? 'mixed' : 'float32', train: true, batch: [batch, seqLength] })
        const own = new Trainer(ours, tokens)
        const trainers: Trainer[] = []
        for (const { kind, side } of peers) {
          await side.call('load', { folder, mode: mixed ? 'autocast' : 'float32', compile: kind.compile })
          trainers.push(new Trainer(side, tokens))
        }
        // Two steps before: compilation, first touch of memory.
        for (const trainer of [own, ...trainers]) for (let i = 0; i < 2; i++) await trainer.run()
        const pairs = await alternate(own, trainers, options.pairs, options.limitSeconds)
        for (const [i, { kind, side }] of peers.entries()) {
          const parity = compareLosses(own.losses, (trainers[i] as Trainer).losses, dtype, work)
          const note = `${sizes[size].text}; the peer is PyTorch ${kind.name}${kind.compile ? ', compiled' : ''}${mixed ? ', autocast' : ''}`
          rows.push(
            await rowOf(
              options,
              { suite: 'train', work, peer: `PyTorch ${kind.name}`, parity, note },
              pairs[i] ?? [],
              side,
            ),
          )
        }
      })
    }
  }
  return rows
}

const promptLength = 32

/** Greedy decoding of one sequence; the prompt's forward pass is in it. */
export async function decodeSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  for (const size of options.sizes) {
    const tokens = randomTokens(1, promptLength, sizes[size].vocabulary, 2)
    for (const mode of options.dtypes) {
      const work = `greedy decoding (${size}), ${mode}, ${options.newTokens} tokens after ${promptLength}`
      process.stderr.write(`${work} `)
      await withSides(options, peerKinds, async ({ ours, peers }) => {
        const folder = await modelFolder(options, size, peers[0]?.side)
        const given = new Map<Side, string>()
        const runner = (side: Side): Runner => ({
          side,
          async run() {
            const answer = await side.call<{ seconds: number; tokens: number[] }>('generate', {
              tokens,
              new_tokens: options.newTokens,
            })
            given.set(side, answer.tokens.join())
            return answer.seconds
          },
        })
        await ours.call('load', { folder, mode, train: false })
        for (const { side } of peers) await side.call('load', { folder, mode, train: false })
        const own = runner(ours)
        const others = peers.map(({ side }) => runner(side))
        for (const each of [own, ...others]) await each.run()
        const pairs = await alternate(own, others, options.pairs, options.limitSeconds)
        for (const [i, { kind, side }] of peers.entries()) {
          const same = sharedStart(given.get(ours) ?? '', given.get(side) ?? '')
          if (mode === 'float32' && same < options.newTokens)
            throw new Error(`${work}: expected equal tokens, got ${given.get(ours)} and ${given.get(side)}`)
          const parity = `first ${same} tokens equal`
          rows.push(
            await rowOf(options, { suite: 'decode', work, peer: `PyTorch ${kind.name}`, parity }, pairs[i] ?? [], side),
          )
        }
      })
    }
  }
  return rows
}

function sharedStart(ours: string, theirs: string): number {
  const [a, b] = [ours.split(','), theirs.split(',')]
  const differs = a.findIndex((token, i) => token !== b[i])
  return differs < 0 ? a.length : differs
}

/** Import and export of a folder. Both sides begin with nothing left to write to disk; ours ends with everything on disk. */
/** Loads of a warm folder, beside plain reads of its bytes in our own process and beside safetensors with warm malloc memory. */
export async function loadSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  const folder = join(options.work, `big-${options.gigabytes}`)
  await withSides(options, peerKinds.slice(1), async ({ ours, peers }) => {
    const { side } = peers[0] as { side: Side }
    if (!isMade(folder)) await side.call('make_big', { folder, gigabytes: options.gigabytes, shards: 3 })
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
      for (const [i, peer] of ['plain reads of the files, as they are', 'safetensors and PyTorch, tuned'].entries())
        rows.push(await rowOf(options, { suite: 'load', work, peer }, pairs[i] ?? [], side))
    }
  })
  return rows
}

export async function convertSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  const folder = join(options.work, `big-${options.gigabytes}`)
  const target = (name: string) => join(options.work, name)
  const kinds = peerKinds.slice(0, 1)
  await withSides(options, kinds, async ({ ours, peers }) => {
    const { side } = peers[0] as { side: Side }
    if (!isMade(folder)) await side.call('make_big', { folder, gigabytes: options.gigabytes, shards: 3 })
    const runner = (of: Side, command: string, args: Record<string, unknown>): Runner => ({
      side: of,
      async run() {
        rmSync(String(args['target']), { recursive: true, force: true })
        spawnSync('sync')
        const answer = await of.call<Record<string, number>>(command, args)
        return answer['seconds'] ?? (answer['load_seconds'] as number) + (answer['save_seconds'] as number)
      },
    })
    const what = `${options.gigabytes} GB, bfloat16, 3 files`
    const races = [
      {
        work: `import of a folder (${what})`,
        ours: 'import_folder',
        from: folder,
        to: 'ours-ckpt',
        theirs: 'split_folder',
        peer: 'a script with safetensors',
        extra: { parts: 2 },
      },
      {
        work: `export of a folder (${what})`,
        ours: 'export_folder',
        from: target('ours-ckpt'),
        to: 'ours-hf',
        theirs: 'save_folder',
        peer: 'Transformers, load and save',
        extra: {},
      },
    ]
    for (const race of races) {
      process.stderr.write(`${race.work} `)
      const own = runner(ours, race.ours, { folder: race.from, target: target(race.to) })
      const variants = [false, true].map((flush) =>
        runner(side, race.theirs, { folder, target: target('peer-out'), flush, ...race.extra }),
      )
      const pairs = await alternate(own, variants, options.pairs, options.limitSeconds)
      for (const [i, flushed] of ['', ', flushed to disk'].entries()) {
        rows.push(
          await rowOf(
            options,
            { suite: 'convert', work: race.work, peer: `${race.peer}${flushed}` },
            pairs[i] ?? [],
            side,
          ),
        )
      }
    }
  })
  return rows
}

/** Time to the first tensor of an online export with a plan used again, beside planning anew; and what binding a huge model costs. */
export async function onlineSuite(options: BenchOptions): Promise<Row[]> {
  return await withSides(options, [], async ({ ours }) => {
    type Answer = { seconds: number; tensors: number } & Record<string, unknown>
    const first = (reuse: boolean) => ours.call<Answer>('export_first', { reuse })
    const runner = (reuse: boolean): Runner => ({ side: ours, run: async () => (await first(reuse)).seconds })
    const { tensors } = await first(false)
    await first(true)
    const pairs = await alternate(runner(true), [runner(false)], options.pairs, options.limitSeconds)
    const work = `export online to its first tensor, plan of ${tensors} tensors used again`
    const bound: Answer[] = []
    for (let i = 0; i < options.pairs; i++) bound.push(await ours.call<Answer>('bind_huge', {}))
    const milliseconds = bound.map(({ seconds }) => 1000 * seconds)
    const rules = {
      suite: 'online',
      work: `mapping rules of ${bound[0]?.tensors} tensors, bound and proved`,
      peer: null,
      figure: { value: quantile(milliseconds, 0.5), unit: 'ms' },
    }
    return [
      await rowOf(options, { suite: 'online', work, peer: 'planned anew' }, pairs[0] ?? []),
      await rowOf(options, rules, []),
    ]
  })
}

/** JavaScript and binding of each op enqueued. */
export async function opsSuite(options: BenchOptions): Promise<Row[]> {
  const kinds = isMade(join(options.work, 'a')) ? [] : peerKinds.slice(0, 1)
  return await withSides(options, kinds, async ({ ours, peers }) => {
    // A small batch: the kernels of 500 steps have to run, and are not what is measured.
    const [batch, seqLength] = [1, 16]
    const folder = await modelFolder(options, 'a', peers[0]?.side)
    await ours.call('load', { folder, mode: 'float32', train: true, batch: [batch, seqLength] })
    const tokens = randomTokens(batch, seqLength, sizes.a.vocabulary, 3)
    const cost = await ours.call<EnqueueCost & Record<string, unknown>>('enqueue', { tokens, rounds: 20 })
    const work = `JavaScript and binding an op, training step of ${cost.ops} ops`
    const figure = { value: quantile(cost.microseconds, 0.5), unit: 'µs' }
    const [all, elapsed] = [cost.allThreads, cost.elapsed].map((times) => quantile(times, 0.5).toFixed(2))
    const note = `processor time of the enqueuing thread; of all threads ${all} µs, by the clock ${elapsed} µs`
    return [await rowOf(options, { suite: 'ops', work, peer: null, figure, note }, [])]
  })
}
