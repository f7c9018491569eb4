// A run's checkpoints: which tensors and numbers make a run go on bit for bit, and where a run starts from. The files' form is
// lib/checkpoint's. `train_state.json` holds the counters, `run_config.yaml` the configuration.
import { mkdir, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { ViaductError } from '../base/errors.js'
import { AutoBridge } from '../bridge/autoBridge.js'
import { isCheckpoint, iterationFolder, type OpenCheckpoint, openCheckpoint } from '../checkpoint/checkpointIndex.js'
import { HfParcel } from '../checkpoint/hfParcel.js'
import { loadCheckpoint as loadTensors, readCheckpointFile, type WantedTensor } from '../checkpoint/loadCheckpoint.js'
import { ranksOf, together } from '../checkpoint/ranks.js'
import { type SavedTensor, saveCheckpoint as saveTensors } from '../checkpoint/saveCheckpoint.js'
import { toYaml } from '../config/overrides.js'
import type { RunConfig } from '../config/runConfig.js'
import { copyFiles } from '../io/otherFiles.js'
import { exists } from '../io/paths.js'
import type { DistributedModel } from '../models/distributedModel.js'
import { expressAsHf } from '../models/registry.js'
import { withScope } from '../tensor/scope.js'
import type { TrainState } from './state.js'

const stateFile = 'train_state.json'

/** The counters of a run. */
interface Counters {
  readonly step: number
  readonly consumedSamples: number
  readonly consumedTokens: number
  readonly skippedSteps: number
  /** Optimizer updates. */
  readonly updates: number
  readonly seed: number
}

/**
 * Saves the run: weights, optimizer, counters, configuration and the Hugging Face files that it carries. Every rank calls it.
 * @param dir - default: checkpoint.save.
 * @returns the iter_* folder.
 * @throws ERR_NO_SPACE, ERR_IO; the former checkpoint is then as it was.
 */
export async function saveCheckpoint(
  state: TrainState,
  dir: string | null = state.resolved.config.checkpoint.save,
): Promise<string> {
  const { config } = state.resolved
  if (dir === null)
    throw new ViaductError('ERR_CONFIG', 'checkpoint', 'expected checkpoint.save or a folder, got neither')
  const counters: Counters = {
    step: state.step,
    consumedSamples: state.loader.consumedSamples,
    consumedTokens: state.consumedTokens,
    skippedSteps: state.skippedSteps,
    updates: state.optimizer.updates,
    seed: config.rng.seed,
  }
  const folder = await withScope(state.model.ctx(), async (ctx) => {
    const tensors: SavedTensor[] = wholeWeights(state).map(([name, { data, dtype, shard }]) => ({
      name,
      dtype,
      shard,
      data,
    }))
    for (const { name, dtype, shard, tensor } of state.optimizer.weights(ctx))
      tensors.push({ name, dtype, shard, data: tensor })
    if (config.checkpoint.saveOptim) {
      for (const { name, dtype, shard, tensor } of state.optimizer.state(ctx))
        tensors.push({ name, dtype, shard, data: tensor })
    }
    await ctx.stream.sync()
    return await saveTensors(dir, state.step, tensors, {
      ranks: ranksOf(state.mesh),
      files: { [stateFile]: `${JSON.stringify(counters, null, 2)}\n`, 'run_config.yaml': toYaml(config) },
      extras: (target) => writeHfFiles(state, target),
      ...(state.signal === undefined ? {} : { signal: state.signal }),
    })
  })
  if (state.world.rank === 0) {
    // The folder that the files came from may be pruned: carry on from the newest.
    if (state.source !== null) state.source = await HfParcel.fromCheckpoint(folder)
    await prune(dir, config.checkpoint.mostRecentK)
  }
  return folder
}

/** Parameters that each data-parallel rank has: all, or fully sharded those that the optimizer does not train. */
function wholeWeights({ model, optimizer: { units } }: TrainState) {
  const all = [...model.namedParameters()]
  return units === null ? all : all.filter(([, parameter]) => !units.layout.offsets.has(parameter))
}

const tokenizerFiles = ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json']

/** The Hugging Face files of the run; the tokenizer's come from where the run reads it when the model brought none. */
async function writeHfFiles(state: TrainState, target: string): Promise<void> {
  const { source } = state
  if (source === null) return
  await source.writeTo(target)
  const folder = state.data.tokenizer?.folder
  if (folder === undefined || source.others.includes('tokenizer.json')) return
  const names: string[] = []
  for (const name of tokenizerFiles)
    if (!source.others.includes(name) && (await exists(join(folder, name)))) names.push(name)
  for (const place of ['hf', 'tokenizer']) {
    await mkdir(join(target, place), { recursive: true })
    await copyFiles(folder, names, join(target, place))
  }
}

/** What checkpoints of a model carry that comes from no folder: a config in the first family that can express it. */
export function sourceOfNewModel(model: DistributedModel): HfParcel | null {
  const [chunk] = model.chunks
  const found = chunk === undefined ? null : expressAsHf(chunk.config)
  return found === null ? null : AutoBridge.fromHfConfig(found.config).parcelFor(model)
}

/** Removes all but the newest checkpoints, after a newer one is complete. */
async function prune(dir: string, keep: number | null): Promise<void> {
  if (keep === null) return
  const names = (await readdir(dir)).filter((name) => /^iter_\d{7,}$/.test(name))
  const old = names.sort((a, b) => Number(b.slice(5)) - Number(a.slice(5))).slice(keep)
  for (const name of old) await rm(join(dir, name), { recursive: true, force: true })
}

/**
 * Loads a checkpoint into a run: weights, and where the checkpoint holds them optimizer state, counters and place in the data.
 * A checkpoint without counters (an imported one) gives its weights, and the run begins at step 0. Every rank calls it.
 * @throws ERR_CHECKPOINT, ERR_CHECKPOINT_HASH.
 */
export async function loadCheckpoint(state: TrainState, dir: string): Promise<void> {
  await loadOpened(state, await openCheckpoint(dir), true)
}

async function loadOpened(state: TrainState, checkpoint: OpenCheckpoint, resume: boolean): Promise<void> {
  const { optimizer, model } = state
  const { loadOptim } = state.resolved.config.checkpoint
  const text = resume ? await readCheckpointFile(checkpoint, stateFile) : null
  const counters = text === null ? null : parseCounters(text, checkpoint.folder)
  const hasOptimizer = [...checkpoint.tensors.keys()].some((name) => name.startsWith('optimizer.'))
  const withOptimizer = counters !== null && loadOptim && hasOptimizer
  const signal = state.signal === undefined ? {} : { signal: state.signal }
  await withScope(model.ctx(), async (ctx) => {
    const whole: WantedTensor[] = wholeWeights(state).map(([name, { data, shard }]) => ({ name, tensor: data, shard }))
    const boxes: WantedTensor[] = [...optimizer.weights(ctx), ...(withOptimizer ? optimizer.state(ctx) : [])]
    // Data-parallel ranks have other boxes each when they share the optimizer; what lies on the host, no collective of the device takes.
    const readsAlone = optimizer.isSharded || optimizer.isOffloaded
    await loadTensors(checkpoint, readsAlone ? whole : [...whole, ...boxes], { model, ...signal })
    if (readsAlone) await together(ranksOf(state.mesh), () => loadTensors(checkpoint, boxes, signal).then(() => {}))
  })
  if (!withOptimizer) optimizer.masterFromModel(model.ctx())
  if (counters !== null) {
    state.step = counters.step
    state.consumedTokens = counters.consumedTokens
    state.skippedSteps = counters.skippedSteps
    optimizer.updates = withOptimizer ? counters.updates : 0
    state.loader.restore({ consumedSamples: counters.consumedSamples })
    if (counters.seed !== state.resolved.config.rng.seed) {
      state.log(
        `note        the checkpoint was made with rng.seed=${counters.seed}, this run has ${state.resolved.config.rng.seed}: the order of data changes`,
      )
    }
  }
  if (state.world.rank === 0) {
    const parcel = await HfParcel.fromCheckpoint(checkpoint.folder)
    state.source =
      parcel === null ? sourceOfNewModel(model) : (await AutoBridge.fromCheckpoint(checkpoint.folder)).parcelFor(model)
  }
  state.log(`loaded      ${checkpoint.folder}${counters === null ? ' (weights only)' : `, step ${counters.step}`}`)
}

/** Null for an imported checkpoint, which says that nothing was trained. */
function parseCounters(text: string, folder: string): Counters | null {
  try {
    const value = JSON.parse(text) as Record<string, unknown>
    if (value['step'] === undefined && value['consumedSamples'] === 0) return null
    const keys = ['step', 'consumedSamples', 'consumedTokens', 'skippedSteps', 'updates', 'seed'] as const
    for (const key of keys)
      if (!Number.isSafeInteger(value[key])) throw new Error(`${key} is ${JSON.stringify(value[key])}`)
    return value as unknown as Counters
  } catch (cause) {
    throw new ViaductError(
      'ERR_CHECKPOINT',
      'checkpoint',
      `expected counters in ${stateFile}: ${(cause as Error).message} (${folder})`,
      { folder },
      { cause },
    )
  }
}

/** Where a run starts from. */
export interface StartingPoint {
  load(state: TrainState): Promise<void>
}

/**
 * Finds out where a run starts: `checkpoint.load` if it holds a checkpoint, else `checkpoint.pretrainedCheckpoint`, else null.
 * @throws ERR_CHECKPOINT when exitOnMissingCheckpoint is set and there is none, or pretrainedCheckpoint is none.
 */
export async function startingPoint(config: RunConfig): Promise<StartingPoint | null> {
  const { load, ckptStep, pretrainedCheckpoint, exitOnMissingCheckpoint } = config.checkpoint
  if (load !== null) {
    const dir = ckptStep === null ? load : join(load, iterationFolder(ckptStep))
    if (await isCheckpoint(dir)) {
      const checkpoint = await openCheckpoint(dir)
      return { load: (state) => loadOpened(state, checkpoint, true) }
    }
    if (exitOnMissingCheckpoint || ckptStep !== null) {
      throw new ViaductError('ERR_CHECKPOINT', 'checkpoint', `expected a checkpoint in ${dir}, found none`, {
        folder: dir,
      })
    }
  }
  if (pretrainedCheckpoint === null) return null
  if (await isCheckpoint(pretrainedCheckpoint)) {
    const checkpoint = await openCheckpoint(pretrainedCheckpoint)
    return { load: (state) => loadOpened(state, checkpoint, false) }
  }
  const bridge = await AutoBridge.fromHfPretrained(pretrainedCheckpoint)
  return {
    async load(state) {
      const fill = () => bridge.loadHfWeights(state.model).then(() => {})
      await (state.optimizer.units?.whole(fill) ?? fill())
      state.optimizer.masterFromModel(state.model.ctx())
      if (state.world.rank === 0) state.source = bridge.parcelFor(state.model)
      state.log(`loaded      ${pretrainedCheckpoint} (Hugging Face folder, weights only)`)
    },
  }
}
