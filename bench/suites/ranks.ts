// What ranks cost and gain: the same work on two ranks and on one with their threads, twice the work on two ranks, and how the time of
// a step follows micro-batches, layers and tokens. Both sides are ours.
import { alternate, type Runner } from '../alternate.js'
import type { LayoutArgs, Shape } from '../layoutRun.js'
import type { Pair } from '../pairs.js'
import { startOurs } from '../peers.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
import { type BenchOptions, type DenseSize, type DtypeName, randomTokens, sizes } from './options.js'
import { rowOf } from './rows.js'

// The models of peer.py.
const shapes: Readonly<Record<DenseSize, Shape>> = {
  a: { layers: 4, hidden: 256, ffn: 688, heads: 4, kvHeads: 2, vocabulary: sizes.a.vocabulary },
  b: { layers: 8, hidden: 512, ffn: 1376, heads: 8, kvHeads: 4, vocabulary: sizes.b.vocabulary },
}

/** A started world, and the losses of its steps. */
class Layout implements Runner {
  readonly losses: number[] = []
  #tokens: number[][] = []

  constructor(
    readonly side: Side,
    private readonly seed = 1,
  ) {}

  /** A model; two steps warm it up. */
  async load(args: LayoutArgs): Promise<void> {
    await this.side.call('load_layout', args)
    this.#tokens = randomTokens(args.batch[0], args.batch[1], args.shape.vocabulary, this.seed)
    for (let step = 0; step < 2; step++) await this.run()
  }

  async run(): Promise<number> {
    const { seconds, loss } = await this.side.call<{ seconds: number; loss: number }>('train_layout', {
      tokens: this.#tokens,
    })
    this.losses.push(loss)
    return seconds
  }

  /** The fastest of some steps: what else the machine does only adds to a step. */
  async fastest(steps: number): Promise<number> {
    let best = Number.POSITIVE_INFINITY
    for (let i = 0; i < steps; i++) best = Math.min(best, await this.run())
    return best
  }
}

/** Sums have another order in another layout: 1e-6 in float32, three digits in bfloat16. */
const lossTolerance = { float32: 1e-4, bfloat16: 1e-2 } as const

function compare(one: Layout, other: Layout, dtype: DtypeName): string {
  const steps = Math.min(6, one.losses.length, other.losses.length)
  let worst = 0
  for (let i = 0; i < steps; i++)
    worst = Math.max(worst, Math.abs((one.losses[i] as number) / (other.losses[i] as number) - 1))
  if (!(worst <= lossTolerance[dtype])) throw new Error(`expected equal losses, got differences up to ${worst}`)
  return `losses of ${steps} steps within ${worst.toExponential(0)}`
}

/** Pairs of two sides that both ran in each round beside a third. */
const between = (ours: readonly Pair[], theirs: readonly Pair[]): Pair[] =>
  ours.map((pair, i) => {
    const other = theirs[i] as Pair
    return { peer: other.peer, ours: pair.peer, foreign: Math.max(pair.foreign, other.foreign) }
  })

const stepOf = (size: DenseSize, dtype: DtypeName) => `training step (${size}), ${dtype}, 2 ranks of 1 thread`
const growthOf = (dtype: DtypeName) => `time of a step (a), ${dtype}`

async function twoRanks(options: BenchOptions, size: DenseSize, dtype: DtypeName): Promise<Row[]> {
  const { batch, seqLength } = sizes[size]
  const args = (rows: number, tp: number): LayoutArgs => ({
    shape: shapes[size],
    dtype,
    tp,
    batch: [rows, seqLength],
    microBatches: 1,
  })
  process.stderr.write(`${stepOf(size, dtype)} `)
  const dp2 = new Layout(startOurs(2, 2))
  const tp2 = new Layout(startOurs(2, 2))
  const one = new Layout(startOurs(2))
  const half = new Layout(startOurs(1))
  const all = [dp2, tp2, one, half]
  try {
    // One after the other: each takes both cores.
    await dp2.load(args(batch, 1))
    await tp2.load(args(batch, 2))
    await one.load(args(batch, 1))
    await half.load(args(batch / 2, 1))
    const [toOne = [], toTp = [], toHalf = []] = await alternate(
      dp2,
      [one, tp2, half],
      options.pairs,
      options.limitSeconds,
    )
    const work = (layout: string) => `${stepOf(size, dtype)}: ${layout}`
    const suite = 'ranks'
    const peer = '1 rank of 2 threads'
    const note = sizes[size].text
    return [
      await rowOf(options, { suite, work: work('dp 2'), peer, parity: compare(dp2, one, dtype), note }, toOne),
      await rowOf(
        options,
        { suite, work: work('tp 2 with sp'), peer, parity: compare(tp2, one, dtype), note },
        between(toTp, toOne),
      ),
      await rowOf(options, { suite, work: work('dp 2'), peer: '1 rank of 1 thread, half of the work', note }, toHalf),
    ]
  } finally {
    for (const { side } of all) side.end()
  }
}

const overlapOf = (size: DenseSize, dtype: DtypeName) =>
  `${stepOf(size, dtype)}: tp 2 with sp, collectives beside products`

/** What it gains to run collectives of tensor parallelism beside products, over what ranks of one host and of several have. */
async function tpOverlap(options: BenchOptions, size: DenseSize, dtype: DtypeName): Promise<Row[]> {
  const { batch, seqLength, text } = sizes[size]
  const rows: Row[] = []
  for (const [transport, env] of [
    ['shared memory', {}],
    ['TCP', { VIADUCT_TRANSPORT: 'gloo' }],
  ] as const) {
    process.stderr.write(`${overlapOf(size, dtype)}, ${transport} `)
    const [beside, behind] = [new Layout(startOurs(2, 2, env)), new Layout(startOurs(2, 2, env))]
    try {
      for (const [layout, tpCommOverlap] of [[beside, true] as const, [behind, false] as const])
        await layout.load({
          shape: shapes[size],
          dtype,
          tp: 2,
          tpCommOverlap,
          batch: [batch, seqLength],
          microBatches: 1,
        })
      const [pairs = []] = await alternate(beside, [behind], options.pairs, options.limitSeconds)
      if (beside.losses.join() !== behind.losses.join())
        throw new Error('expected equal bits beside and behind products')
      const about = {
        suite: 'ranks',
        work: `${overlapOf(size, dtype)}, ${transport}`,
        peer: 'behind products',
        note: text,
      }
      rows.push(await rowOf(options, { ...about, parity: 'losses equal to the bit' }, pairs))
    } finally {
      for (const { side } of [beside, behind]) side.end()
    }
  }
  return rows
}

/** The largest distance of times from the best line through them, in parts of the time. */
function offLine(points: readonly (readonly [x: number, seconds: number])[]): number {
  const n = points.length
  const mean = (f: (point: readonly [number, number]) => number) => points.reduce((sum, p) => sum + f(p), 0) / n
  const [x, y] = [mean((p) => p[0]), mean((p) => p[1])]
  const slope = mean((p) => (p[0] - x) * (p[1] - y)) / mean((p) => (p[0] - x) ** 2)
  return Math.max(...points.map(([at, seconds]) => Math.abs(y + slope * (at - x) - seconds) / seconds))
}

const micro = [1, 2, 4, 8, 16, 32, 64]
const repeats = 3
const doubled = [1, 2, 4, 8]

/** How the time of a step grows with what it does, on one rank. */
async function growth(options: BenchOptions, dtype: DtypeName): Promise<Row[]> {
  const layout = new Layout(startOurs(options.threads))
  const shape = shapes.a
  const base = { shape, dtype, tp: 1, microBatches: 1, batch: [1, 256] } as const
  const suite = 'ranks'
  const seconds = async (changes: Partial<LayoutArgs>): Promise<number> => {
    await layout.load({ ...base, ...changes })
    process.stderr.write('.')
    return await layout.fastest(repeats)
  }
  const figure = (work: string, value: number, unit: string, note: string) =>
    rowOf(options, { suite, work, peer: null, figure: { value, unit }, note }, [])
  try {
    process.stderr.write(`${growthOf(dtype)} `)
    const each: number[] = []
    for (const microBatches of micro)
      each.push((await seconds({ microBatches, batch: [2 * microBatches, 256] })) / microBatches)
    const layers: [number, number][] = []
    for (const factor of doubled)
      layers.push([factor, await seconds({ shape: { ...shape, layers: factor * 4 }, batch: [4, 256] })])
    const tokens: [number, number][] = []
    for (const factor of doubled) tokens.push([factor, await seconds({ batch: [2 * factor, 256] })])
    const listed = (times: readonly number[]) => times.map((t) => `${(1000 * t).toFixed(0)} ms`).join(', ')
    // The optimizer's share of a step falls with the micro-batches; from the second on, each adds the same.
    return [
      await figure(
        `${growthOf(dtype)}, of a token: 64 micro-batches over 1`,
        (each.at(-1) as number) / (each[0] as number),
        '×',
        `${micro.join(', ')} micro-batches of 2×256: ${listed(each)} each`,
      ),
      await figure(
        `${growthOf(dtype)}, 4 to 32 layers: distance from a line`,
        100 * offLine(layers),
        '%',
        listed(layers.map(([, t]) => t)),
      ),
      await figure(
        `${growthOf(dtype)}, 512 to 4096 tokens: distance from a line`,
        100 * offLine(tokens),
        '%',
        listed(tokens.map(([, t]) => t)),
      ),
    ]
  } finally {
    process.stderr.write('\n')
    layout.side.end()
  }
}

/** Two ranks beside one, and the growth of a step's time. */
export async function ranksSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  for (const dtype of options.dtypes) {
    for (const size of options.sizes.filter((name): name is DenseSize => name !== 'moe')) {
      if (stepOf(size, dtype).includes(options.only)) rows.push(...(await twoRanks(options, size, dtype)))
      if (overlapOf(size, dtype).includes(options.only)) rows.push(...(await tpOverlap(options, size, dtype)))
    }
    if (growthOf(dtype).includes(options.only)) rows.push(...(await growth(options, dtype)))
  }
  return rows
}
