// One of two fully sharded ranks that look into their own steps: micro-batches of unequal number, what is whole in a step, live tensors,
// a Hugging Face folder, a trace of gathers and sums beside compute. Rank 0 writes what it found to the file that is named.
import { createHash } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { readdir, readFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { native } from '../../lib/addon/load.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import type { DdpSection } from '../../lib/config/sections.js'
import type { TokenBatch } from '../../lib/models/batch.js'
import { scale } from '../../lib/ops/elementwise.js'
import { dataParallelAxis } from '../../lib/optim/gradients.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { volume } from '../../lib/tensor/region.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { evaluate, type ForwardStep, forwardStep, setup, trainStep } from '../../lib/train/index.js'
import { fixtureBatches, fixtureConfig, fixtureData, trainingFixture } from './fixtureRun.js'
import { memoryConfig } from './memoryRank.js'

/** Losses of steps, and of an evaluation behind them. */
interface Losses {
  readonly losses: readonly number[]
  readonly tokens: readonly number[]
  readonly validation: number
}

/** What rank 0 found. */
export interface FsdpFindings {
  /** Micro-batches shared out unequally, and all of them on one rank; beside it what both ranks do with equal shares. */
  readonly unequal: { readonly apart: Losses; readonly together: Losses }
  readonly none: { readonly apart: Losses; readonly together: Losses }
  /** The embedding, a layer and parts of another one are not trained. */
  readonly frozen: { readonly apart: Losses; readonly together: Losses }
  /** Bytes between steps, those of the sharded optimizer's run, and elements of the model. */
  readonly weights: { readonly resting: number; readonly sharded: number; readonly elements: number }
  /** Live tensors after each step. */
  readonly slots: readonly number[]
  /** Hashes of the weights in a Hugging Face folder, saved by a fully sharded run and by another one; and after a step from there. */
  readonly folders: { readonly sharded: string; readonly whole: string }
  readonly goingOn: { readonly sharded: string; readonly whole: string }
  /** What a step says whose gradients are NaN on rank 1. */
  readonly notFinite: string
  /** Collectives of the last step, and those of them that ran while a matrix product did. */
  readonly trace: { readonly gathers: number; readonly sums: number; readonly beside: number }
}

const quiet = { data: fixtureData, log: () => {} }
const fsdp = { useMegatronFsdp: true }
type Share = (batches: TokenBatch[], rank: number) => TokenBatch[]
const equally: Share = (batches, rank) => batches.filter((_, m) => m % 2 === rank)

interface Beginning {
  /** Names of parameters that are not trained. */
  readonly frozen?: RegExp
  /** A Hugging Face folder. */
  readonly from?: string | null
}

async function start(ddp: Partial<DdpSection>, { frozen = /^$/, from = null }: Beginning = {}) {
  const config = await fixtureConfig({ microBatchSize: 1 })
  if (from !== null) config.model.weightsLoader = null
  config.checkpoint.pretrainedCheckpoint = from
  config.model.registerPreWrapHook(async (model) => {
    for (const [name, parameter] of model.namedParameters()) parameter.requiresGrad &&= !frozen.test(name)
  })
  Object.assign(config.ddp, ddp)
  return await setup(config, quiet)
}

async function losses(ddp: Partial<DdpSection>, share: Share, frozen = /^$/): Promise<Losses> {
  const state = await start(ddp, { frozen })
  const { rank } = state.mesh.get('dp')
  const reports = []
  for (let step = 0; step < 3; step++)
    reports.push(await trainStep(state, share(fixtureBatches(step, 1), rank), forwardStep))
  const validation = (await evaluate(state, forwardStep, share(fixtureBatches(3, 1), rank)))?.loss as number
  await state.dispose()
  return { losses: reports.map(({ loss }) => loss), tokens: reports.map(({ tokens }) => tokens), validation }
}

async function weights(): Promise<Pick<FsdpFindings, 'weights' | 'slots'>> {
  const live = (device: { trim(): number; memory(): { liveBytes: number } }) => {
    device.trim()
    return device.memory().liveBytes
  }
  const restingOf = async (ddp: Partial<DdpSection>) => {
    const state = await start(ddp)
    const slots: number[] = []
    for (let step = 0; step < 3; step++) {
      await trainStep(state, equally(fixtureBatches(step, 1), state.mesh.get('dp').rank), forwardStep)
      slots.push(native.liveSlots())
    }
    const bytes = live(state.model.device)
    const elements = state.optimizer.gradients.layout.parameters.reduce((n, p) => n + volume(p.shard.localShape), 0)
    await state.dispose()
    return { bytes, slots, elements }
  }
  const whole = await restingOf({})
  const sharded = await restingOf(fsdp)
  return { weights: { resting: sharded.bytes, sharded: whole.bytes, elements: whole.elements }, slots: sharded.slots }
}

/** Hash of the weights that a run saves as a Hugging Face folder after a step. */
async function folder(ddp: Partial<DdpSection>, place: string, from: string | null = null): Promise<string> {
  const state = await start(ddp, { from })
  const bridge = await AutoBridge.fromHfPretrained(trainingFixture)
  await trainStep(
    state,
    fixtureBatches(0, 4).slice(state.mesh.get('dp').rank, state.mesh.get('dp').rank + 1),
    forwardStep,
  )
  const save = () => bridge.saveHfPretrained(state.model, place).then(() => {})
  await (state.optimizer.units?.whole(save) ?? save())
  const hash = createHash('sha256')
  for (const name of (await readdir(place)).filter((n) => n.endsWith('.safetensors')).sort())
    hash.update(await readFile(join(place, name)))
  await state.dispose()
  return hash.digest('hex')
}

async function notFinite(): Promise<string> {
  const state = await start(fsdp)
  const { rank } = state.mesh.get('dp')
  const poisoned: ForwardStep = async (ctx, model, batch) => {
    const { lossSum, numTokens } = await forwardStep(ctx, model, batch)
    const factor = Tensor.full(ctx, [1], 'float32', rank === 1 ? Number.NaN : 1)
    return { lossSum: scale(ctx, { x: lossSum, factor }).y, numTokens }
  }
  const step = trainStep(state, equally(fixtureBatches(0, 1), rank), poisoned)
  const told = await step.then(
    () => '',
    (error: Error) => error.message,
  )
  await state.dispose()
  return told
}

/** A larger model than the fixture's, whose products take a while. */
async function trace(): Promise<FsdpFindings['trace']> {
  const config = memoryConfig({ model: { hiddenSize: 256, ffnHiddenSize: 640 }, globalBatchSize: 16, ddp: fsdp })
  const state = await setup(config, quiet)
  const { device } = state.model
  const streams = [device.stream, device.communication(dataParallelAxis)] as const
  const tokens = Int32Array.from({ length: 4 * 64 }, (_, i) => (i * 7919) % 700)
  const batch: TokenBatch = { batchSize: 4, seqLength: 64, tokens, labels: tokens }
  for (let step = 0; step < 2; step++) {
    if (step === 1) for (const { id } of streams) native.startTrace(id)
    await trainStep(state, [batch, batch], forwardStep)
  }
  await Promise.all(streams.map((stream) => stream.sync()))
  const [compute, comm] = streams.map(({ id }) => native.endTrace(id))
  const products = (compute ?? []).filter(({ op }) => op.startsWith('matmul'))
  const of = (name: string) => (comm ?? []).filter(({ op }) => op === name)
  const [gathers, sums] = [of('allGather'), of('reduceScatter')]
  const beside = [...gathers, ...sums].filter((c) => products.some((p) => p.start < c.end && p.end > c.start))
  await state.dispose()
  return { gathers: gathers.length, sums: sums.length, beside: beside.length }
}

const path = process.argv[2]
if (process.argv[1]?.endsWith('fsdpRank.ts') && path !== undefined) {
  const world = await initDistributed()
  const together = await losses({}, equally)
  const place = dirname(path)
  const frozen = /^embedding|layers\.1\.|layers\.0\.(self_attention|mlp\.linear_fc1)/
  const findings: FsdpFindings = {
    unequal: { together, apart: await losses(fsdp, (all, rank) => (rank === 0 ? all.slice(0, 2) : all.slice(2))) },
    none: { together, apart: await losses(fsdp, (all, rank) => (rank === 0 ? [] : all)) },
    frozen: { together: await losses({}, equally, frozen), apart: await losses(fsdp, equally, frozen) },
    ...(await weights()),
    folders: { sharded: await folder(fsdp, join(place, 'sharded')), whole: await folder({}, join(place, 'whole')) },
    goingOn: {
      sharded: await folder(fsdp, join(place, 'from whole, sharded'), join(place, 'whole')),
      whole: await folder({}, join(place, 'from whole'), join(place, 'whole')),
    },
    notFinite: await notFinite(),
    trace: await trace(),
  }
  if (world.rank === 0) writeFileSync(path, JSON.stringify(findings))
  await world.dispose()
}
