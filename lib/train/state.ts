// What a training run holds between steps, and how it comes to be: ranks, model, data, optimizer, and the checkpoint it goes on
// from. `pretrain` is a loop over this and `trainStep`; custom loops use the same parts.
import { stopIfAborted } from '../base/errors.js'
import type { HfParcel } from '../checkpoint/hfParcel.js'
import { toPlain } from '../config/overrides.js'
import { type ResolvedConfig, resolve } from '../config/resolve.js'
import type { RunConfig } from '../config/runConfig.js'
import { openData, type RunData } from '../data/datasets.js'
import { BatchLoader } from '../data/loader.js'
import type { DistributedModel } from '../models/distributedModel.js'
import { copiesAxes } from '../models/layoutShards.js'
import { shardingUnits } from '../models/unitPasses.js'
import { AdamW } from '../optim/adamw.js'
import type { Schedule } from '../optim/schedule.js'
import { assertSameOnAllRanks } from '../parallel/collectives.js'
import { Mesh } from '../parallel/mesh.js'
import { initDistributed, type World } from '../parallel/world.js'
import { availableMemory, checkFits, describePrice, measurePeakFlops, type Price, priceOf } from '../plan/price.js'
import { Device, type DeviceKind } from '../tensor/device.js'
import { Tensor } from '../tensor/tensor.js'
import { sourceOfNewModel, startingPoint } from './checkpoints.js'

/** What a script gives to `setup` and `pretrain` besides the configuration. */
export interface SetupOptions {
  readonly device?: DeviceKind
  /** Ends the run with ERR_ABORTED after the step in progress, on all ranks. */
  readonly signal?: AbortSignal
  /** Receives lines for people, on rank 0 only. Default: standard output. */
  readonly log?: (line: string) => void
  /** Instead of the configuration's data. */
  readonly data?: RunData
}

export interface TrainState {
  readonly resolved: ResolvedConfig
  readonly world: World
  readonly mesh: Mesh
  readonly model: DistributedModel
  readonly optimizer: AdamW
  readonly schedule: Schedule
  readonly data: RunData
  readonly loader: BatchLoader
  readonly price: Price
  /** Best matmul rate of this rank measured so far, in FLOP/s: the price's, or a later one that was less disturbed. */
  peakFlops: number
  /** int64 [2]: seed and step, which dropout reads. */
  readonly rngSlot: Tensor
  readonly signal: AbortSignal | undefined
  readonly log: (line: string) => void
  /** Steps done. */
  step: number
  /** Steps whose update was skipped. */
  skippedSteps: number
  consumedTokens: number
  /** Hugging Face files that checkpoints of this run carry on; null: none, and on ranks other than 0. */
  source: HfParcel | null
  /** A signal that asks to save and stop, e.g. SIGTERM. */
  stopSignal: NodeJS.Signals | null
  /** Frees model, optimizer and data, and leaves the ranks. Idempotent. */
  dispose(): Promise<void>
}

/**
 * Prepares a run: checks the configuration, joins the ranks, tells the price, builds model and optimizer, opens the data, and
 * loads the checkpoint to go on from. Every rank calls it.
 * @throws ERR_CONFIG with all problems, ERR_OUT_OF_MEMORY when the run cannot fit, ERR_DATA, ERR_CHECKPOINT.
 */
export async function setup(config: RunConfig, options: SetupOptions = {}): Promise<TrainState> {
  const { signal } = options
  const world = await initDistributed({ timeoutMs: config.dist.distributedTimeoutMinutes * 60_000 })
  const resolved = resolve(config, world.size)
  await assertSameOnAllRanks(toPlain(config), 'configuration', world.group)
  const say = options.log ?? ((line: string) => void process.stdout.write(`${line}\n`))
  const log = world.rank === 0 ? say : () => {}
  const device = Device.open(options.device ?? 'auto')
  // Of a GPU's memory its allocator tells; the host's says nothing about it.
  if (device.kind === 'cpu') checkFits(resolved, priceOf(resolved, null), world.localSize, availableMemory())
  world.useDevice(device)
  const mesh = await Mesh.create(config.model, world)
  const cleanup: (() => Promise<void> | void)[] = [() => mesh.dispose()]
  let disposed = false
  const dispose = async () => {
    if (disposed) return
    disposed = true
    for (const free of cleanup.reverse()) await free()
  }
  try {
    const peak = await measurePeakFlops(device, resolved.paramsDtype === 'float32' ? 'float32' : 'bfloat16')
    const price = priceOf(resolved, peak)
    const data = options.data ?? (await openData(resolved))
    cleanup.push(() => data.dispose())
    stopIfAborted(signal, 'setup')
    const start = await startingPoint(config)
    const model = await config.model.provideDistributedModel({
      mesh,
      device: options.device ?? 'auto',
      dtype: resolved.paramsDtype,
      seed: config.rng.seed,
      loadWeights: start === null,
      ...(signal === undefined ? {} : { signal }),
    })
    cleanup.push(() => model.dispose())
    const ctx = model.ctx()
    const rngSlot = Tensor.zeros(ctx, [2], 'int64').keep()
    cleanup.push(() => rngSlot.dispose())
    const parameters = [...model.namedParameters()].map(([, parameter]) => parameter)
    const units = shardingUnits(config.model.shareEmbeddingsAndOutputWeights)
    const optimizer = new AdamW(ctx, parameters, config.optimizer, config.ddp, copiesAxes(config.model), units)
    model.shardedWeights = optimizer.units
    // A stream that failed has told so already.
    cleanup.push(() =>
      optimizer
        .settle(ctx)
        .then(undefined, () => {})
        .then(() => optimizer.dispose()),
    )
    const dp = mesh.get('dp')
    const loader = new BatchLoader({
      dataset: data.train,
      globalBatchSize: config.train.globalBatchSize,
      microBatchSize: config.train.microBatchSize,
      dataParallelRank: dp.rank,
      dataParallelSize: dp.size,
      seed: config.rng.seed,
    })
    const { lr, minLr } = config.optimizer
    const { lrDecayStyle, lrWarmupInit, lrWsdDecayIters, lrWsdDecayStyle } = config.scheduler
    const state: TrainState = {
      resolved,
      world,
      mesh,
      model,
      optimizer,
      schedule: {
        lr,
        minLr,
        lrDecayStyle,
        lrWarmupInit,
        lrWsdDecayIters,
        lrWsdDecayStyle,
        lrWarmupIters: resolved.lrWarmupIters,
        lrDecayIters: resolved.lrDecayIters,
      },
      data,
      loader,
      price,
      peakFlops: peak,
      rngSlot,
      signal,
      log,
      step: 0,
      skippedSteps: 0,
      consumedTokens: 0,
      source: null,
      stopSignal: null,
      dispose,
    }
    log(`device      ${device.kind}: ${device.info.description}`)
    const { load, save } = config.checkpoint
    if (start === null && load !== null && load !== save)
      log(`note        no checkpoint in ${load}: the weights begin at their initial values`)
    if (start !== null) await start.load(state)
    else if (world.rank === 0) state.source = sourceOfNewModel(model)
    for (const line of describePrice(resolved, price, Math.max(0, config.train.trainIters - state.step))) log(line)
    await ctx.stream.sync()
    ctx.scope.close()
    return state
  } catch (error) {
    await dispose()
    throw error
  }
}
