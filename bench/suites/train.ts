// Training steps, and whether both sides' losses agree.
import { alternate, type Runner } from '../alternate.js'
import { peerKinds } from '../peers.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
import { type BenchOptions, type DtypeName, modelFolder, randomTokens, sizes } from './options.js'
import { rowOf, withSides } from './rows.js'

interface Trained extends Record<string, unknown> {
  readonly seconds: number[]
  readonly losses: number[]
}

/** A side that trains: its losses so far. */
export class Trainer implements Runner {
  readonly losses: number[] = []
  /** @param how - more arguments of `train`. */
  constructor(
    readonly side: Side,
    private readonly tokens: number[][],
    private readonly how: Record<string, unknown> = {},
  ) {}

  async run(): Promise<number> {
    const args = { tokens: this.tokens, steps: 1, ...this.how }
    const { seconds, losses } = await this.side.call<Trained>('train', args)
    this.losses.push(...losses)
    return seconds[0] as number
  }
}

/** Loss of each step: float32 sums in other orders differ by 1e-6 at first and drift; bfloat16 rounds to 3 digits. */
const lossTolerance = { float32: 1e-4, bfloat16: 1e-2 } as const
const comparedSteps = 6

/** How far the losses of the first steps are from each other, the largest share. */
export function apart(ours: readonly number[], theirs: readonly number[]): { steps: number; worst: number } {
  const steps = Math.min(comparedSteps, ours.length, theirs.length)
  let worst = 0
  for (let i = 0; i < steps; i++) worst = Math.max(worst, Math.abs((ours[i] as number) / (theirs[i] as number) - 1))
  return { steps, worst }
}

/** Says in words how near the losses of the first steps are. @throws when they are not. */
export function compareLosses(
  ours: readonly number[],
  theirs: readonly number[],
  dtype: DtypeName,
  where: string,
): string {
  const { steps, worst } = apart(ours, theirs)
  if (!(worst <= lossTolerance[dtype])) {
    throw new Error(
      `${where}: expected equal losses, got ${ours.slice(0, steps).join(', ')} and ${theirs.slice(0, steps).join(', ')}`,
    )
  }
  return `losses of ${steps} steps within ${worst.toExponential(0)}`
}

/** How each side loads: as `load` of ours.ts and of peer.py names it. */
const modes = {
  float32: [{ name: 'float32', ours: 'float32', peer: 'float32' }],
  bfloat16: [
    { name: 'bfloat16', ours: 'mixed', peer: 'autocast' },
    { name: 'pure bfloat16', ours: 'bfloat16', peer: 'bfloat16' },
  ],
} as const

/** The most memory of our process, Node included; the peers' in words. */
async function memoryRow(
  options: BenchOptions,
  work: string,
  ours: Side,
  peers: readonly (readonly [name: string, side: Side])[],
): Promise<Row> {
  const own = await ours.call<{ peak_mib: number; tensors_mib: number }>('memory')
  const others = await Promise.all(
    peers.map(
      async ([name, side]) =>
        `PyTorch ${name} ${(await side.call<{ peak_mib: number }>('memory')).peak_mib.toFixed(0)} MiB`,
    ),
  )
  const note = `of it ${own.tensors_mib.toFixed(0)} MiB in tensors; ${others.join(', ')}`
  const figure = { value: own.peak_mib, unit: 'MiB' }
  return await rowOf(options, { suite: 'train', work: `${work}: peak memory`, peer: null, figure, note }, [])
}

/** Training steps: forward, loss, backward, clipping, AdamW. Our bfloat16 is with float32 masters, the peer's is autocast. */
export async function trainSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  for (const size of options.sizes) {
    const { batch, seqLength, vocabulary } = sizes[size]
    const tokens = randomTokens(batch, seqLength, vocabulary, 1)
    for (const [dtype, mode] of options.dtypes.flatMap((name) => modes[name].map((each) => [name, each] as const))) {
      const work = `training step (${size}), ${mode.name}`
      if (!work.includes(options.only)) continue
      process.stderr.write(`${work} `)
      await withSides(options, peerKinds, async ({ ours, peers }) => {
        const folder = await modelFolder(options, size, peers[0]?.side)
        await ours.call('load', { folder, mode: mode.ours, train: true, batch: [batch, seqLength] })
        const own = new Trainer(ours, tokens)
        const trainers: Trainer[] = []
        for (const { kind, side } of peers) {
          await side.call('load', { folder, mode: mode.peer, compile: kind.compile })
          trainers.push(new Trainer(side, tokens))
        }
        // Two steps before: compilation, first touch of memory.
        for (const trainer of [own, ...trainers]) for (let i = 0; i < 2; i++) await trainer.run()
        const pairs = await alternate(own, trainers, options.pairs, options.limitSeconds)
        for (const [i, { kind, side }] of peers.entries()) {
          const parity = compareLosses(own.losses, (trainers[i] as Trainer).losses, dtype, work)
          const note = `${sizes[size].text}; the peer is PyTorch ${kind.name}${kind.compile ? ', compiled' : ''}${mode.peer === 'autocast' ? ', autocast' : ''}`
          rows.push(
            await rowOf(
              options,
              { suite: 'train', work, peer: `PyTorch ${kind.name}`, parity, note },
              pairs[i] ?? [],
              side,
            ),
          )
        }
        rows.push(
          await memoryRow(
            options,
            work,
            ours,
            peers.map(({ kind, side }) => [kind.name, side] as const),
          ),
        )
      })
    }
  }
  return rows
}
