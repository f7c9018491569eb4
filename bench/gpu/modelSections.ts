// The sections of models: training steps, decoding and import, each side in turn on the same GPU with the same folder. Where both do
// not fit at once, a side loads before each of its windows and gives the memory back behind it.
import { existsSync, readdirSync, rmSync, statSync } from 'node:fs'
import { join } from 'node:path'
import type { OpTime } from '../../lib/addon/functions.js'
import { alternate, type Runner } from '../alternate.js'
import { type Pair, quantile } from '../pairs.js'
import type { Side } from '../side.js'
import { sharedStart } from '../suites/decode.js'
import { apart, compareLosses } from '../suites/train.js'
import { randomTokens } from '../tokens.js'
import type { GpuBench } from './bench.js'
import type { HfConfig, TrainCase } from './models.js'
import { type Load, watched } from './nvidia.js'
import { gpuRow, type Reached, reached } from './rows.js'

interface Prediction extends Record<string, unknown> {
  readonly parameters: number
  readonly bytes: number
  readonly flopsPerToken: number
}

interface Trained extends Record<string, unknown> {
  readonly seconds: number
  readonly losses: readonly number[]
  readonly peakBytes?: number
  readonly reservedBytes?: number
  readonly busyShare?: number
  readonly ops?: readonly OpTime[]
}

const layersOf = (config: HfConfig) => Number(config['num_hidden_layers'])
const withLayers = (config: HfConfig, layers: number): HfConfig => ({ ...config, num_hidden_layers: layers })
const bytesOf = (folder: string) =>
  readdirSync(folder)
    .filter((name) => name.endsWith('.safetensors'))
    .reduce((sum, name) => sum + statSync(join(folder, name)).size, 0)

/** The config with as many layers as fit, by our plan of memory: what a layer adds is the difference of two and one. */
async function fitted(bench: GpuBench, config: HfConfig, batch: readonly [number, number]): Promise<HfConfig> {
  const { memoryBytes, share } = bench.options
  const bytes = async (layers: number) =>
    (await bench.sides.ours.call<Prediction>('gpu_predict', { config: withLayers(config, layers), batch })).bytes
  const [one, two] = [await bytes(1), await bytes(2)]
  const layers = Math.floor(1 + (memoryBytes * share - one) / (two - one))
  if (layers < 1) throw new Error(`expected room for one layer, got ${memoryBytes} bytes for ${one}`)
  return withLayers(config, Math.min(layers, layersOf(config)))
}

/** The folder of a model, made by our side when it is not there. Of other models none stays: they are large. */
async function folderOf(bench: GpuBench, name: string, config: HfConfig): Promise<string> {
  const folder = join(bench.options.work, `${name}-${layersOf(config)}`)
  if (existsSync(join(folder, 'config.json'))) return folder
  for (const other of readdirSync(bench.options.work))
    rmSync(join(bench.options.work, other), { recursive: true, force: true })
  await bench.sides.ours.call('gpu_make', { folder, config })
  return folder
}

/** A side that trains in windows. */
class Trainer implements Runner {
  losses: readonly number[] = []
  last: Trained | null = null
  load: Load | null = null

  constructor(
    readonly side: Side,
    private readonly args: { readonly load: Record<string, unknown>; readonly train: Record<string, unknown> },
    private readonly steps: number,
    private readonly warm: number,
    /** Whether the model stays between windows. */
    private readonly stays: boolean,
  ) {}

  async run(): Promise<number> {
    if (!this.stays || this.last === null) {
      await this.side.call('gpu_load', this.args.load)
      const before = await this.side.call<Trained>('gpu_train', {
        ...this.args.train,
        steps: 0,
        warm: this.warm,
        ...this.profile(false),
      })
      if (this.last === null) this.losses = before.losses
    }
    const { result, load } = await watched(() =>
      this.side.call<Trained>('gpu_train', { ...this.args.train, steps: this.steps, warm: 0, ...this.profile(true) }),
    )
    if (this.last === null) this.losses = [...this.losses, ...result.losses]
    this.last = result
    this.load = load
    if (!this.stays) await this.side.call('gpu_unload')
    return result.seconds / this.steps
  }

  /** Only our side times its commands. */
  private profile(profile: boolean): Record<string, boolean> {
    return this.side.name === 'Viaduct' ? { profile } : {}
  }

  figures(rate: Reached, tokens: number): Reached {
    const { peakBytes, reservedBytes, busyShare, ops } = this.last ?? {}
    return {
      ...rate,
      tokensPerSecond: tokens / rate.seconds,
      load: this.load,
      ...(peakBytes === undefined ? {} : { peakBytes }),
      ...(reservedBytes === undefined ? {} : { reservedBytes }),
      ...(busyShare === undefined ? {} : { busyByEvents: busyShare }),
      ...(ops === undefined ? {} : { ops }),
    }
  }
}

interface Raced {
  readonly pairs: readonly Pair[]
  /** Median seconds; the peer's is null where it failed. */
  readonly ours: number
  readonly theirs: number | null
  readonly failure?: string
}

/** Alternated windows. Where the peer fails (its memory is not ours to plan) ours is measured alone, and the row says why. */
async function race(bench: GpuBench, own: Runner, other: Runner): Promise<Raced> {
  const { windows } = bench.options
  try {
    const [pairs = []] = await alternate(own, [other], windows, Infinity)
    return { pairs, ours: median(pairs.map((pair) => pair.ours)), theirs: median(pairs.map((pair) => pair.peer)) }
  } catch (error) {
    const failure = error instanceof Error ? error.message : String(error)
    if (!failure.startsWith(other.side.name)) throw error
    process.stderr.write(`the peer FAILED, ours alone: ${failure}\n`)
    other.side.end()
    const seconds: number[] = []
    for (let i = 0; i < windows; i++) seconds.push(await own.run())
    return { pairs: [], ours: median(seconds), theirs: null, failure }
  }
}

/** What the peer takes beside our prediction at most: float32 logits and gradients, and activations that autograd keeps. */
const peerShare = 1.6

const median = (values: readonly number[]) => quantile(values, 0.5)

const failureOf = ({ failure }: Raced) => (failure === undefined ? {} : { failure })

/**
 * How the losses agree. Before the first update they must, else the row is a failure that keeps its figures. Later ones are told alone:
 * a random model falls by a third a step, autocast keeps sums of layers and looked-up embeddings in float32, and the sides part by 1e-2.
 */
function agree(ours: readonly number[], theirs: readonly number[], work: string) {
  try {
    const first = compareLosses(ours.slice(0, 1), theirs.slice(0, 1), 'bfloat16', work)
    const { steps, worst } = apart(ours, theirs)
    return { parity: `${first}, of ${steps} within ${worst.toExponential(0)}` }
  } catch (error) {
    return { failure: (error as Error).message }
  }
}

/** Training steps: forward, loss, backward, clipping, AdamW. Ours is bfloat16 with float32 masters. */
export async function trainSection(bench: GpuBench): Promise<void> {
  const { sizes, windows, steps, warm, memoryBytes, pure } = bench.options
  const { ours, peer } = bench.sides
  const one = async (training: TrainCase, work: string) => {
    const { batch } = training
    const config = await fitted(bench, sizes.models[training.model], batch)
    const predicted = await ours.call<Prediction>('gpu_predict', { config, batch })
    const folder = await folderOf(bench, training.model, config)
    const tokens = randomTokens(batch[0], batch[1], Number(config['vocab_size']), 1)
    const stays = predicted.bytes * (1 + peerShare) < memoryBytes
    await bench.sides.peer.call('gpu_unload')
    const own = new Trainer(ours, { load: { folder, train: true, batch }, train: { tokens } }, steps, warm, stays)
    const other = new Trainer(peer, { load: { folder, train: true, pure }, train: { tokens } }, steps, warm, stays)
    const raced = await race(bench, own, other)
    await ours.call('gpu_unload')
    await peer.call('gpu_unload')
    const count = batch[0] * batch[1]
    const counts = { flops: predicted.flopsPerToken * count }
    const figures = (of: Trainer, seconds: number) => of.figures(reached(seconds, counts, bench.ceilings), count)
    const agreement = raced.theirs === null ? {} : agree(own.losses, other.losses, work)
    const note = `${layersOf(config)} of ${layersOf(sizes.models[training.model])} layers, ${predicted.parameters} parameters, ${windows} windows of ${steps} steps; ${stays ? 'both sides loaded at once' : 'each side loaded for its window'}; ours predicts ${predicted.bytes} bytes`
    return gpuRow(
      bench.setting,
      {
        section: 'train',
        work,
        peer: `PyTorch, ${pure ? 'bfloat16 weights' : 'autocast'}, SDPA, compiled`,
        ours: figures(own, raced.ours),
        theirs: raced.theirs === null ? null : figures(other, raced.theirs),
        ceilings: bench.ceilings,
        ...failureOf(raced),
        ...agreement,
        note,
      },
      raced.pairs,
    )
  }
  for (const training of sizes.trainings) {
    const work = `training step, ${training.name}, ${training.batch.join('×')}`
    await bench.row('train', work, () => one(training, work))
  }
}

interface Generated extends Record<string, unknown> {
  readonly seconds: number
  readonly tokens: readonly (readonly number[])[]
  readonly peakBytes?: number
}

/** Greedy decoding, the prompt's pass included. The weights are read once a token, which bounds it. */
export async function decodeSection(bench: GpuBench): Promise<void> {
  const { decoding, models } = bench.options.sizes
  const { ours, peer } = bench.sides
  const { prompt, newTokens } = decoding
  for (const batch of decoding.batches) {
    const work = `greedy decoding, Llama-3.2-1B, batch ${batch}, ${newTokens} tokens behind ${prompt}`
    await bench.row('decode', work, async () => {
      const folder = await folderOf(bench, 'llama1b', models.llama1b)
      const tokens = randomTokens(batch, prompt, Number(models.llama1b['vocab_size']), 2)
      const last = new Map<Side, Generated>()
      const side = (of: Side): Runner => ({
        side: of,
        async run() {
          const answer = await of.call<Generated>('gpu_generate', { tokens, newTokens })
          last.set(of, answer)
          return answer.seconds
        },
      })
      await ours.call('gpu_load', { folder, train: false, batch: [1, 1] })
      await peer.call('gpu_load', { folder, train: false })
      const [own, other] = [side(ours), side(peer)]
      for (const each of [own, other]) await each.run() // compilation
      const raced = await race(bench, own, other)
      const weights = bytesOf(folder)
      const figures = (of: Side, seconds: number): Reached => {
        const peak = last.get(of)?.peakBytes
        return {
          ...reached(seconds, { bytes: weights * newTokens }, bench.ceilings),
          tokensPerSecond: (batch * newTokens) / seconds,
          ...(peak === undefined ? {} : { peakBytes: peak }),
        }
      }
      const firstOf = (of: Side) => last.get(of)?.tokens[0]?.join() ?? ''
      const parity = `first ${sharedStart(firstOf(ours), firstOf(peer))} tokens equal`
      await ours.call('gpu_unload')
      await peer.call('gpu_unload')
      return gpuRow(
        bench.setting,
        {
          section: 'decode',
          work,
          peer: 'PyTorch, SDPA, static cache, compiled',
          ours: figures(ours, raced.ours),
          theirs: raced.theirs === null ? null : figures(peer, raced.theirs),
          ceilings: bench.ceilings,
          ...failureOf(raced),
          parity,
        },
        raced.pairs,
      )
    })
  }
}

/** From a warm folder to weights on the GPU. */
export async function importSection(bench: GpuBench): Promise<void> {
  const { models } = bench.options.sizes
  const work = 'import of a warm folder, Llama-3.2-1B, bfloat16'
  await bench.row('import', work, async () => {
    const folder = await folderOf(bench, 'llama1b', models.llama1b)
    const side = (of: Side): Runner => ({
      side: of,
      run: async () => (await of.call<{ seconds: number }>('gpu_import', { folder })).seconds,
    })
    const [own, other] = [side(bench.sides.ours), side(bench.sides.peer)]
    for (const each of [own, other]) await each.run()
    const raced = await race(bench, own, other)
    // Of the host and its bus; shares of the GPU's ceilings would say nothing.
    const rate = (seconds: number): Reached => ({ seconds, gigabytesPerSecond: bytesOf(folder) / seconds / 1e9 })
    return gpuRow(
      bench.setting,
      {
        section: 'import',
        work,
        peer: 'Transformers from_pretrained',
        ours: rate(raced.ours),
        theirs: raced.theirs === null ? null : rate(raced.theirs),
        ceilings: bench.ceilings,
        ...failureOf(raced),
      },
      raced.pairs,
    )
  })
}
