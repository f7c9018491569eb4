// A rank of a pipeline for tests: a small model with weights of its own on the fixture's data, as the JSON argument says; a list is done
// one after the other. What it did is written by rank 0.
import { writeFileSync } from 'node:fs'
import { native } from '../../lib/addon/load.js'
import { nameHash } from '../../lib/base/nameHash.js'
import type { RunConfig } from '../../lib/config/runConfig.js'
import type { DdpSection, OptimizerSection } from '../../lib/config/sections.js'
import type { TokenBatch } from '../../lib/models/batch.js'
import type { DistributedModel } from '../../lib/models/distributedModel.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { evaluate, forwardStep, pretrain, setup, trainStep } from '../../lib/train/index.js'
import { fixtureBatches, fixtureConfig, fixtureData } from './fixtureRun.js'

/** What the test asks for. */
export interface PipelineTask {
  /** Fields of the model, its layout among them. */
  readonly model?: Partial<ProviderInit>
  /** Default: as the program finds. */
  readonly device?: 'cpu' | 'cuda'
  /** Default: fp32. */
  readonly mixedPrecision?: RunConfig['mixedPrecision']
  readonly trainIters: number
  /** Default 1. */
  readonly microBatchSize?: number
  readonly ddp?: Partial<DdpSection>
  readonly optimizer?: Partial<OptimizerSection>
  readonly metrics?: string
  readonly save?: string
  /** Steps between checkpoints; default: at the end only. */
  readonly saveInterval?: number
  /** Where the run starts from, and the step; default: the latest of `save`. */
  readonly load?: readonly [folder: string, step: number]
  /** The forward step throws at this call of it, on the last stage. */
  readonly failAt?: number
  /** Instead of the loop: steps on micro-batches of unequal lengths, and an evaluation; written here. */
  readonly uneven?: string
}

/** Losses of steps on uneven micro-batches, and of an evaluation behind them. */
export interface Uneven {
  readonly losses: readonly number[]
  readonly gradNorms: readonly number[]
  readonly tokens: readonly number[]
  readonly metrics: readonly number[]
  readonly validation: number
  /** Live tensors after each step. */
  readonly live: readonly number[]
}

/** Norms and biases that are not 1 and 0, by logical place. */
async function drawConstants(model: DistributedModel): Promise<void> {
  const ctx = model.ctx()
  for (const [name, { init, shard, data }] of model.namedParameters()) {
    if (init.kind !== 'constant') continue
    for (const { localStart, globalStart, size } of shard.blocks) {
      const part = data.slice(ctx, 0, localStart[0] as number, size[0] as number)
      native.randomNormal(ctx.stream.id, part.handle, 1, nameHash(name), globalStart, [1], init.value, 0.1)
    }
  }
  ctx.scope.close()
}

/** The run of a task. */
export async function configOf(task: PipelineTask): Promise<RunConfig> {
  const {
    model,
    mixedPrecision = 'fp32',
    trainIters,
    microBatchSize = 1,
    ddp,
    optimizer,
    metrics,
    save,
    saveInterval,
    load,
  } = task
  const config = await fixtureConfig({ trainIters, microBatchSize })
  config.mixedPrecision = mixedPrecision
  config.model.weightsLoader = null
  config.model.registerPreWrapHook(drawConstants)
  Object.assign(config.model, { numLayers: 4, hiddenDropout: 0.1, ...model })
  config.checkpoint.save = save ?? null
  config.checkpoint.saveInterval = saveInterval ?? null
  config.checkpoint.load = load?.[0] ?? save ?? null
  config.checkpoint.ckptStep = load?.[1] ?? null
  config.logger.metricsFile = metrics ?? null
  Object.assign(config.ddp, ddp)
  Object.assign(config.optimizer, optimizer)
  return config
}

/** Runs it in this process, as one of the launcher's ranks or alone. */
export async function pipelineWork(task: PipelineTask): Promise<void> {
  if (task.uneven !== undefined) return unevenWork(task)
  let calls = 0
  const forward: typeof forwardStep = (ctx, model, batch) => {
    if (++calls === task.failAt) throw new Error(`the forward step failed at call ${calls}`)
    return forwardStep(ctx, model, batch)
  }
  const device = task.device ? { device: task.device } : {}
  await pretrain(await configOf(task), forward, { data: fixtureData, log: () => {}, ...device })
}

/** Micro-batches of several lengths; of some only a few labels count. */
function unevenBatches(step: number): TokenBatch[] {
  return fixtureBatches(step, 1).map(({ seqLength, tokens, labels }, m) => {
    const S = seqLength - ((3 * m + step) % 7)
    const cut = (labels as Int32Array).slice(0, S).map((label, i) => (m % 2 === 1 && i % 3 > 0 ? -100 : label))
    return { batchSize: 1, seqLength: S, tokens: tokens.slice(0, S), labels: cut }
  })
}

async function unevenWork(task: PipelineTask): Promise<void> {
  const state = await setup(await configOf(task), { data: fixtureData, log: () => {} })
  const reports: (Awaited<ReturnType<typeof trainStep>> & { live: number })[] = []
  try {
    const forward: typeof forwardStep = async (ctx, model, batch) => {
      const result = await forwardStep(ctx, model, batch)
      return { ...result, metrics: { again: result.lossSum } }
    }
    for (let step = 0; step < task.trainIters; step++) {
      const report = await trainStep(state, unevenBatches(step), forward)
      reports.push({ ...report, live: state.model.device.liveSlots() })
    }
    const evaluation = await evaluate(state, forwardStep, unevenBatches(task.trainIters))
    if (state.world.rank !== 0) return
    const written: Uneven = {
      losses: reports.map(({ loss }) => loss),
      gradNorms: reports.map(({ gradNorm }) => gradNorm),
      tokens: reports.map(({ tokens }) => tokens),
      metrics: reports.map(({ metrics }) => metrics['again'] as number),
      validation: evaluation?.loss as number,
      live: reports.map(({ live }) => live),
    }
    writeFileSync(task.uneven as string, JSON.stringify(written))
  } finally {
    await state.dispose()
  }
}

const argument = process.argv[2]
if (process.argv[1]?.endsWith('pipelineRank.ts') && argument !== undefined) {
  for (const task of [JSON.parse(argument) as PipelineTask | PipelineTask[]].flat()) await pipelineWork(task)
  await (await initDistributed()).dispose()
}
