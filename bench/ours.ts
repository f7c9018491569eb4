// Our side of the benchmarks, driven line by line with the protocol of peer.py: one JSON command a line on standard input, one JSON
// line back. It uses the library as a user's script does: AutoBridge, setup, trainStep, generate.
import { readFileSync, writeFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { native } from '../lib/addon/load.js'
import { AutoBridge } from '../lib/bridge/autoBridge.js'
import { runConfig } from '../lib/config/runConfig.js'
import { generate } from '../lib/inference/generate.js'
import type { DistributedModel } from '../lib/models/distributedModel.js'
import { Device } from '../lib/tensor/device.js'
import { forwardStep } from '../lib/train/forwardStep.js'
import { setup, type TrainState } from '../lib/train/state.js'
import { trainStep } from '../lib/train/step.js'
import { measureEnqueue } from './enqueue.js'
import { gpuCommands } from './gpu/ours.js'
import { loadLayout, trainLayout } from './layoutRun.js'
import { loadTensors, rawRead } from './loading.js'
import { bindHuge, exportFirst } from './online.js'
import { opCommands } from './opRun.js'
import { batchOf, packedBatch } from './tokens.js'

interface LoadArgs {
  readonly folder: string
  /** float32, bfloat16 (pure) or mixed (bfloat16 with float32 masters, for training). */
  readonly mode: 'float32' | 'bfloat16' | 'mixed'
  readonly train: boolean
  readonly batch?: readonly [number, number]
  readonly lr?: number
}

interface ConvertArgs {
  readonly folder: string
  readonly target: string
  readonly tp: number
  readonly sha256: boolean
}

let state: TrainState | null = null
let model: DistributedModel | null = null

async function load({ folder, mode, train, batch = [1, 128], lr = 1e-4 }: LoadArgs) {
  await state?.dispose()
  await model?.dispose()
  state = null
  model = null
  const provider = (await AutoBridge.fromHfPretrained(folder)).toMegatronProvider()
  provider.paramsDtype = mode === 'float32' ? 'float32' : 'bfloat16'
  if (!train) {
    model = await provider.provideDistributedModel()
    return {}
  }
  provider.seqLength = batch[1]
  const config = runConfig({
    model: provider,
    mixedPrecision: ({ float32: 'fp32', mixed: 'bf16_mixed', bfloat16: null } as const)[mode],
    train: { trainIters: 1000, globalBatchSize: batch[0], microBatchSize: batch[0] },
    validation: { evalInterval: null, evalIters: 0 },
    // torch.optim.AdamW's defaults, but for the betas and the decay that both sides set.
    optimizer: { lr, minLr: lr, adamBeta1: 0.9, adamBeta2: 0.95, adamEps: 1e-8, weightDecay: 0.1, clipGrad: 1 },
    scheduler: { lrDecayStyle: 'constant', lrWarmupIters: 0 },
    dataset: { kind: 'mock' },
    checkpoint: { pretrainedCheckpoint: folder },
  })
  state = await setup(config, { log: () => {} })
  return {}
}

function trained(): TrainState {
  if (state === null) throw new Error('expected load with train before')
  return state
}

interface TrainArgs {
  readonly tokens: number[][]
  readonly steps: number
  readonly profile?: boolean
  /** Sequences of any length are put into rows of so many tokens. */
  readonly row_length?: number
}

async function train({ tokens, steps, profile = false, row_length }: TrainArgs) {
  const run = trained()
  const batch = row_length === undefined ? batchOf(tokens) : packedBatch(tokens, row_length)
  const seconds: number[] = []
  const losses: number[] = []
  const stream = run.model.device.stream.id
  if (profile) native.startProfile(stream)
  for (let i = 0; i < steps; i++) {
    const from = performance.now()
    const { loss } = await trainStep(run, [batch], forwardStep)
    seconds.push((performance.now() - from) / 1000)
    losses.push(loss)
  }
  return { seconds, losses, ...(profile ? { profile: native.endProfile(stream) } : {}) }
}

async function generateTokens({
  tokens,
  new_tokens,
  profile = false,
}: {
  tokens: number[][]
  new_tokens: number
  profile?: boolean
}) {
  if (model === null) throw new Error('expected load without train before')
  const stream = model.device.stream.id
  if (profile) native.startProfile(stream)
  const from = performance.now()
  const added = (await generate(model, tokens, { maxNewTokens: new_tokens })).flat()
  const seconds = (performance.now() - from) / 1000
  return { seconds, tokens: added, ...(profile ? { profile: native.endProfile(stream) } : {}) }
}

/** Seconds of the work, and the peak of this process's memory above what it held before, where the system tells. */
async function measured(work: () => Promise<unknown>) {
  const idle = resetPeak()
  const from = performance.now()
  await work()
  const seconds = (performance.now() - from) / 1000
  return { seconds, ...(idle === null ? {} : { peak_mib: statusMib('VmHWM') - idle }) }
}

const statusMib = (field: string) =>
  Number(new RegExp(`${field}:\\s+(\\d+)`).exec(readFileSync('/proc/self/status', 'utf8'))?.[1]) / 1024

/** The peak becomes what is held now, which is returned. */
function resetPeak(): number | null {
  try {
    writeFileSync('/proc/self/clear_refs', '5')
    return statusMib('VmRSS')
  } catch {
    return null
  }
}

/** Most memory that this process had, and that was in tensors. */
async function memory() {
  return { peak_mib: statusMib('VmHWM'), tensors_mib: Device.open('cpu').memory().peakBytes / 2 ** 20 }
}

const commands: Record<string, (args: never) => Promise<object>> = {
  ...opCommands,
  ...gpuCommands,
  load,
  train,
  generate: generateTokens,
  memory,
  load_layout: loadLayout,
  train_layout: trainLayout,
  load_tensors: loadTensors,
  raw_read: rawRead,
  export_first: exportFirst,
  bind_huge: bindHuge,
  enqueue: async ({ tokens, rounds }: { tokens: number[][]; rounds: number }) =>
    measureEnqueue(trained(), batchOf(tokens), rounds),
  import_folder: async ({ folder, target, tp, sha256 }: ConvertArgs) =>
    measured(() => AutoBridge.importCkpt(folder, target, { tensorModelParallelSize: tp, sha256 })),
  export_folder: async ({ folder, target, sha256 }: ConvertArgs) =>
    measured(() => AutoBridge.exportCkpt(folder, target, { sha256 })),
}

async function answer(line: string): Promise<object> {
  try {
    const { command, ...args } = JSON.parse(line) as { command: string }
    const run = commands[command]
    if (run === undefined) throw new Error(`expected one of ${Object.keys(commands).join(', ')}, got ${command}`)
    return await run(args as never)
  } catch (error) {
    return { error: error instanceof Error ? `${error.name}: ${error.message}` : String(error) }
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(await answer(line))}\n`)
}
process.exit(0)
