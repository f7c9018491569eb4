// One of two data-parallel ranks that look into their own steps: bytes of optimizer state, when buckets are summed, unequal numbers
// of tokens, saving at once, a failure on the communication stream. Rank 0 writes what it found to the file that is named.
import { createHash } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { readdir, readFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { native } from '../../lib/addon/load.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { resolve } from '../../lib/config/resolve.js'
import { runConfig } from '../../lib/config/runConfig.js'
import type { TokenBatch } from '../../lib/models/batch.js'
import { GPTModelProvider } from '../../lib/models/provider.js'
import { AdamW } from '../../lib/optim/adamw.js'
import { dataParallelAxis } from '../../lib/optim/gradients.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { stageMemory } from '../../lib/plan/memory.js'
import { volume } from '../../lib/tensor/region.js'
import { forwardStep, saveCheckpoint, setup, trainStep } from '../../lib/train/index.js'
import { fixtureBatches, fixtureConfig, fixtureData, trainingFixture } from './fixtureRun.js'

/** What rank 0 found. */
export interface Findings {
  readonly memory: { readonly wholeBytes: number; readonly shardedBytes: number; readonly planned: number }
  readonly overlap: {
    readonly buckets: number
    readonly early: readonly number[]
    /** Bytes that the last step handed to the group's collectives, and elements of the parameters in memory. */
    readonly payload: number
    readonly elements: number
    /** Live tensors after each step. */
    readonly slots: readonly number[]
  }
  readonly unequal: {
    readonly tokens: readonly number[]
    readonly losses: readonly number[]
    readonly norms: readonly number[]
    readonly aloneTokens: readonly number[]
    readonly aloneLosses: readonly number[]
    readonly aloneNorms: readonly number[]
  }
  /** Hashes of what was saved at once after a step and, behind the `|`, of what was saved when all was at rest. */
  readonly saved: { readonly checkpoint: string; readonly folder: string }
  readonly failure: string
}

/** Bytes of moments and masters on this rank, in bfloat16, and what the plan says. */
async function memory(): Promise<Findings['memory']> {
  const provider = () =>
    new GPTModelProvider({
      numLayers: 2,
      hiddenSize: 256,
      ffnHiddenSize: 512,
      numAttentionHeads: 4,
      vocabSize: 2000,
      maxPositionEmbeddings: 64,
      seqLength: 32,
    })
  const config = runConfig({
    model: provider(),
    train: { trainIters: 1, globalBatchSize: 2, microBatchSize: 1 },
    scheduler: { lrWarmupIters: 0 },
  })
  const planned = stageMemory(resolve(config, 2), 0).optimizer
  const model = await config.model.provideDistributedModel({ dtype: 'bfloat16' })
  const parameters = [...model.namedParameters()].map(([, parameter]) => parameter)
  const bytesOf = async (useDistributedOptimizer: boolean) => {
    const ctx = model.ctx()
    await ctx.stream.sync()
    const before = model.device.memory().liveBytes
    const optimizer = new AdamW(ctx, parameters, config.optimizer, { useDistributedOptimizer, bucketSize: 500_000 })
    await ctx.stream.sync()
    const gradients = 4 * optimizer.gradients.layout.length
    const bytes = model.device.memory().liveBytes - before - gradients
    optimizer.dispose()
    ctx.scope.close()
    return bytes
  }
  const found = { wholeBytes: await bytesOf(false), shardedBytes: await bytesOf(true), planned }
  await model.dispose()
  return found
}

const quiet = { data: fixtureData, log: () => {} }

/** Collectives of the data-parallel group that were called before `reduce`, step by step, and their bytes. */
async function overlap(): Promise<Findings['overlap']> {
  const config = await fixtureConfig({ microBatchSize: 2 })
  config.ddp.bucketSize = 20_000
  const state = await setup(config, quiet)
  const { gradients } = state.optimizer
  const group = state.mesh.get(dataParallelAxis)
  const called = () => group.info()?.sequence ?? 0
  const early: number[] = []
  const reduce = gradients.reduce.bind(gradients)
  let begun = 0
  gradients.reduce = (ctx) => {
    early.push(called() - begun)
    reduce(ctx)
  }
  const { rank, size } = state.mesh.get('dp')
  let payload = 0
  const slots: number[] = []
  for (let step = 0; step < 3; step++) {
    begun = called()
    payload = group.info()?.payloadBytes ?? 0
    await trainStep(state, fixtureBatches(step, 2, rank, size), forwardStep)
    slots.push(native.liveSlots())
  }
  payload = (group.info()?.payloadBytes ?? 0) - payload
  const { buckets, parameters } = gradients.layout
  await state.dispose()
  const elements = parameters.reduce((sum, { shard }) => sum + volume(shard.localShape), 0)
  return { buckets: buckets.length, early, payload, elements, slots }
}

/** Labels of a sequence count up to a length that depends on its tokens. */
function masked(batch: TokenBatch): TokenBatch {
  const { seqLength: S, tokens } = batch
  const labels = (batch.labels as Int32Array).map((label, i) => {
    const length = 1 + ((tokens[i - (i % S)] as number) % S)
    return i % S < length ? label : -100
  })
  return { ...batch, labels }
}

/** The same global batches on two ranks, and all of them on each rank as if it were alone: both sum over tokens. */
async function unequal(): Promise<Findings['unequal']> {
  const train = async (alone: boolean) => {
    const state = await setup(await fixtureConfig({ microBatchSize: 1 }), quiet)
    const { rank, size } = state.mesh.get('dp')
    const reports = []
    for (let step = 0; step < 4; step++) {
      const batches = (alone ? fixtureBatches(step, 1) : fixtureBatches(step, 1, rank, size)).map(masked)
      reports.push(await trainStep(state, batches, forwardStep))
    }
    await state.dispose()
    // Where both ranks have all the batches each token counts twice.
    const tokens = reports.map((report) => report.tokens / (alone ? size : 1))
    return { tokens, losses: reports.map(({ loss }) => loss), norms: reports.map(({ gradNorm }) => gradNorm) }
  }
  const [apart, together] = [await train(false), await train(true)]
  return {
    ...apart,
    aloneTokens: together.tokens,
    aloneLosses: together.losses,
    aloneNorms: together.norms,
  }
}

/** Saves while the parameters of the last step still travel: their gather waits behind a delay. */
async function saved(place: string): Promise<Findings['saved']> {
  const state = await setup(await fixtureConfig({ microBatchSize: 1 }), quiet)
  const { rank, size } = state.mesh.get('dp')
  const bridge = await AutoBridge.fromHfPretrained(trainingFixture)
  const update = state.optimizer.step.bind(state.optimizer)
  state.optimizer.step = (ctx, step) => {
    native.debugDelay(ctx.device.communication(dataParallelAxis).id, 100_000)
    update(ctx, step)
  }
  const weights = async (folder: string) => {
    const names = (await readdir(folder)).filter((name) => name.endsWith('.safetensors'))
    const hash = createHash('sha256')
    for (const name of names.sort()) hash.update(await readFile(join(folder, name)))
    return hash.digest('hex')
  }
  const ways = {
    checkpoint: (name: string) => saveCheckpoint(state, join(place, name)),
    folder: async (name: string) => {
      await bridge.saveHfPretrained(state.model, join(place, name))
      return join(place, name)
    },
  }
  const found: Record<string, string> = {}
  for (const [way, save] of Object.entries(ways)) {
    await trainStep(state, fixtureBatches(0, 1, rank, size), forwardStep)
    const atOnce = await weights(await save(`${way}-at-once`))
    await state.optimizer.settle(state.model.ctx())
    await state.model.device.stream.sync()
    found[way] = `${atOnce}|${await weights(await save(`${way}-later`))}`
  }
  await state.dispose()
  return found as unknown as Findings['saved']
}

/** A command of the communication stream fails while gradients are summed: the step rejects with it. */
async function failure(): Promise<string> {
  const state = await setup(await fixtureConfig({ microBatchSize: 1 }), quiet)
  const { rank, size } = state.mesh.get('dp')
  native.debugFail(state.model.device.communication(dataParallelAxis).id, 'a collective failed')
  try {
    await trainStep(state, fixtureBatches(0, 1, rank, size), forwardStep)
    return 'nothing'
  } catch (error) {
    return (error as Error).message
  } finally {
    await state.dispose()
  }
}

const path = process.argv[2]
if (process.argv[1]?.endsWith('shardedRank.ts') && path !== undefined) {
  const world = await initDistributed()
  const findings: Findings = {
    memory: await memory(),
    overlap: await overlap(),
    unequal: await unequal(),
    saved: await saved(join(dirname(path), 'saved')),
    failure: await failure(),
  }
  if (world.rank === 0) writeFileSync(path, JSON.stringify(findings))
}
