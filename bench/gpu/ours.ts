// Our side of `npm run bench:cuda`: commands of whole models that ours.ts runs on the GPU. Times are by the clock, from a stream that is
// empty to one that is empty again. What is measured stands in models.ts; single ops in ../opRun.ts.
import { native } from '../../lib/addon/load.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { resolve } from '../../lib/config/resolve.js'
import { runConfig } from '../../lib/config/runConfig.js'
import { generate } from '../../lib/inference/generate.js'
import type { DistributedModel } from '../../lib/models/distributedModel.js'
import { parameterCount, trainingFlopsPerToken } from '../../lib/plan/cost.js'
import { memoryByStage, most } from '../../lib/plan/memory.js'
import { cudaLibraryFolders, cudaState } from '../../lib/tensor/cuda.js'
import { Device } from '../../lib/tensor/device.js'
import { forwardStep } from '../../lib/train/forwardStep.js'
import { setup, type TrainState } from '../../lib/train/state.js'
import { trainStep } from '../../lib/train/step.js'
import { batchOf } from '../tokens.js'
import type { HfConfig } from './models.js'

let state: TrainState | null = null
let model: DistributedModel | null = null

const gpu = () => Device.open('cuda')

/** The GPU as the driver describes it, and NVIDIA's libraries as they are found. */
async function about() {
  const { plugin } = cudaState()
  const libraries = native.pluginLibraries(plugin as string, cudaLibraryFolders())
  return {
    device: gpu().info.description,
    libraries: Object.fromEntries(libraries.map(({ name, version, why }) => [name, version || `none: ${why}`])),
  }
}

interface LoadArgs {
  readonly folder: string
  readonly train: boolean
  readonly batch: readonly [sequences: number, seqLength: number]
}

/** The run that is trained: AdamW and clipping as peer_gpu.py has them. */
async function configOf({ folder, batch }: Omit<LoadArgs, 'train'>, config?: HfConfig) {
  const bridge =
    config === undefined ? await AutoBridge.fromHfPretrained(folder) : AutoBridge.fromHfConfig(config as never)
  const provider = bridge.toMegatronProvider()
  provider.seqLength = batch[1]
  // The peer's loss has no balance of experts in it either.
  if (provider.numMoeExperts !== null) provider.moeRouterLoadBalancingType = 'none'
  return runConfig({
    model: provider,
    mixedPrecision: 'bf16_mixed',
    train: { trainIters: 1_000_000, globalBatchSize: batch[0], microBatchSize: batch[0] },
    validation: { evalInterval: null, evalIters: 0 },
    optimizer: { lr: 1e-4, minLr: 1e-4, adamBeta1: 0.9, adamBeta2: 0.95, adamEps: 1e-8, weightDecay: 0.1, clipGrad: 1 },
    scheduler: { lrDecayStyle: 'constant', lrWarmupIters: 0 },
    dataset: { kind: 'mock' },
    ...(config === undefined ? { checkpoint: { pretrainedCheckpoint: folder } } : {}),
  })
}

/** Parameters, work and memory of training a model, without making it. */
async function predict({ config, batch }: { config: HfConfig; batch: readonly [number, number] }) {
  const resolved = resolve(await configOf({ folder: '', batch }, config), 1)
  const { model: shape } = resolved.config
  return {
    parameters: parameterCount(shape),
    bytes: most(memoryByStage(resolved)).total,
    flopsPerToken: trainingFlopsPerToken(shape, batch[1], resolved.paddedVocabSize),
  }
}

/** Draws a model's weights on the GPU and writes its folder: both sides load it. */
async function make({ folder, config }: { folder: string; config: HfConfig }) {
  const bridge = AutoBridge.fromHfConfig(config as never)
  const provider = bridge.toMegatronProvider()
  provider.paramsDtype = 'bfloat16'
  const made = await provider.provideDistributedModel({ wrapWithDdp: false, device: 'cuda' })
  try {
    await bridge.saveHfPretrained(made, folder)
  } finally {
    await made.dispose()
    gpu().trim()
  }
  return {}
}

/** Frees the model and gives its memory back to the driver: the other side needs it. */
async function unload() {
  await state?.dispose()
  await model?.dispose()
  state = null
  model = null
  if (cudaState().devices > 0) gpu().trim()
  return {}
}

async function load({ folder, train, batch }: LoadArgs) {
  await unload()
  if (train) {
    state = await setup(await configOf({ folder, batch }), { device: 'cuda', log: () => {} })
    return {}
  }
  model = await (await AutoBridge.fromHfPretrained(folder)).toMegatronModel({ wrapWithDdp: false, device: 'cuda' })
  await gpu().stream.sync()
  return {}
}

/** Seconds from a folder to its weights on the GPU. */
async function importFolder({ folder }: { folder: string }) {
  await unload()
  const from = performance.now()
  await load({ folder, train: false, batch: [1, 1] })
  const seconds = (performance.now() - from) / 1000
  await unload()
  return { seconds }
}

const profiledSteps = 2

/** A window of steps: seconds of all, losses, peak of memory. Behind it some steps whose commands are timed by events of the GPU. */
async function train({
  tokens,
  steps,
  warm,
  profile,
}: {
  tokens: number[][]
  steps: number
  warm: number
  profile: boolean
}) {
  if (state === null) throw new Error('expected gpu_load with train before')
  const run = state
  const { device } = run.model
  const batch = batchOf(tokens)
  const losses: number[] = []
  const step = async () => void losses.push((await trainStep(run, [batch], forwardStep)).loss)
  for (let i = 0; i < warm; i++) await step()
  await device.stream.sync()
  device.resetPeak()
  const from = performance.now()
  for (let i = 0; i < steps; i++) await step()
  await device.stream.sync()
  const seconds = (performance.now() - from) / 1000
  const { peakBytes, reservedBytes } = device.memory()
  if (!profile) return { seconds, losses, peakBytes, reservedBytes }
  native.startProfile(device.stream.id)
  const began = performance.now()
  for (let i = 0; i < profiledSteps; i++) await step()
  await device.stream.sync()
  const elapsed = (performance.now() - began) / 1000
  const ops = native.endProfile(device.stream.id)
  const busy = ops.reduce((sum, op) => sum + op.seconds, 0)
  return { seconds, losses, peakBytes, reservedBytes, busyShare: busy / elapsed, ops: ops.slice(0, 40) }
}

/** Greedy tokens behind prompts. */
async function generateTokens({ tokens, newTokens }: { tokens: number[][]; newTokens: number }) {
  if (model === null) throw new Error('expected gpu_load without train before')
  const { device } = model
  device.resetPeak()
  const from = performance.now()
  const added = await generate(model, tokens, { maxNewTokens: newTokens })
  return { seconds: (performance.now() - from) / 1000, tokens: added, peakBytes: device.memory().peakBytes }
}

/** Commands by name. */
export const gpuCommands: Record<string, (args: never) => Promise<object>> = {
  gpu_about: about,
  gpu_predict: predict,
  gpu_make: make,
  gpu_load: load,
  gpu_unload: unload,
  gpu_train: train,
  gpu_import: importFolder,
  gpu_generate: generateTokens,
}
