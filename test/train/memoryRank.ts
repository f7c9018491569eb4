// A rank that measures its memory in training steps of a small model: what lies there between steps, part by part, and the most in a
// step. Rank 0 writes what all ranks found.
import { readFileSync, writeFileSync } from 'node:fs'
import { type RunConfig, runConfig } from '../../lib/config/runConfig.js'
import type { DdpSection, OptimizerSection } from '../../lib/config/sections.js'
import type { RunData } from '../../lib/data/datasets.js'
import type { TokenBatch } from '../../lib/models/batch.js'
import { GPTModelProvider, type ProviderInit } from '../../lib/models/provider.js'
import { allGatherObject } from '../../lib/parallel/collectives.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { Ctx } from '../../lib/tensor/ctx.js'
import { Device } from '../../lib/tensor/device.js'
import { forwardStep, setup, trainStep } from '../../lib/train/index.js'

/** What the test asks for. */
export interface MemoryTask {
  readonly model?: Partial<ProviderInit>
  readonly mixedPrecision?: 'fp32' | 'bf16_mixed'
  /** Of a step, over all ranks. Default 8 micro-batches of 4 sequences. */
  readonly globalBatchSize?: number
  readonly microBatchSize?: number
  readonly ddp?: Partial<DdpSection>
  readonly optimizer?: Partial<OptimizerSection>
  /** Default 3. */
  readonly steps?: number
}

/** Bytes on one rank. */
export interface MeasuredMemory {
  readonly stage: number
  /** Parameters, before the optimizer is there. */
  readonly weights: number
  /** Between steps: weights, gradients, optimizer state, tables. */
  readonly resting: number
  /** The most in a step, steps after the first. */
  readonly peaks: readonly number[]
  /** The most on the host beside the device, in any step. */
  readonly host: number
  /** The most that the process had in memory, whatever for. */
  readonly resident: number
}

/** The run of a task: large enough that blocks of 512 bytes are as good as exact. */
export function memoryConfig(task: MemoryTask): RunConfig {
  const { model, mixedPrecision, globalBatchSize, microBatchSize, ddp, optimizer } = task
  const config = runConfig({
    model: new GPTModelProvider({
      numLayers: 4,
      hiddenSize: 128,
      ffnHiddenSize: 320,
      numAttentionHeads: 8,
      numQueryGroups: 4,
      vocabSize: 700,
      maxPositionEmbeddings: 128,
      seqLength: 64,
      ...model,
    }),
    mixedPrecision: mixedPrecision ?? 'fp32',
    train: { trainIters: 3, globalBatchSize: globalBatchSize ?? 32, microBatchSize: microBatchSize ?? 4 },
    validation: { evalInterval: null, evalIters: 1 },
    scheduler: { lrDecayStyle: 'constant', lrWarmupIters: 0 },
  })
  Object.assign(config.ddp, ddp)
  Object.assign(config.optimizer, optimizer)
  return config
}

function randomBatch(batchSize: number, seqLength: number, vocabulary: number): TokenBatch {
  const tokens = Int32Array.from({ length: batchSize * seqLength }, (_, i) => (i * 7919) % vocabulary)
  return { batchSize, seqLength, tokens, labels: tokens }
}

const noData: RunData = {
  train: { length: 1000, sample: () => new Int32Array(0) },
  validation: { length: 1000, sample: () => new Int32Array(0) },
  tokenizer: null,
  dispose() {},
}

async function measure(task: MemoryTask): Promise<MeasuredMemory> {
  const device = Device.open('cpu')
  const host = Device.host()
  const config = memoryConfig(task)
  const live = () => {
    device.trim() // waits for all streams
    host.trim()
    Ctx.create({ device }).empty([1], 'float32').dispose() // what waited for them is given back at the next allocation
    return device.memory().liveBytes
  }
  const before = live()
  const hostBefore = host.memory().liveBytes
  host.resetPeak()
  let weights = 0
  config.model.registerPreWrapHook(async () => {
    weights = live() - before
  })
  const state = await setup(config, { data: noData, log: () => {} })
  const { resolved } = state
  const { seqLength } = resolved
  const batch = randomBatch(config.train.microBatchSize, seqLength, resolved.vocabSize)
  const peaks: number[] = []
  for (let step = 0; step < (task.steps ?? 3); step++) {
    const { peakMemory } = await trainStep(state, Array(resolved.numMicroBatches).fill(batch), forwardStep)
    if (step > 0) peaks.push(peakMemory - before)
  }
  const resting = live() - before
  const { rank: stage } = state.mesh.get('pp')
  const hostPeak = host.memory().peakBytes - hostBefore
  await state.dispose()
  const [, kib] = /VmHWM:\s+(\d+)/.exec(readFileSync('/proc/self/status', 'utf8')) ?? []
  return { stage, weights, resting, peaks, host: hostPeak, resident: Number(kib) * 1024 }
}

const [, script, argument, path] = process.argv
if (script?.endsWith('memoryRank.ts') && argument !== undefined && path !== undefined) {
  const world = await initDistributed()
  const found: MeasuredMemory[][] = []
  for (const task of JSON.parse(argument) as MemoryTask[])
    found.push(await allGatherObject(await measure(task), world.group))
  if (world.rank === 0) writeFileSync(path, JSON.stringify(found))
  await world.dispose()
}
