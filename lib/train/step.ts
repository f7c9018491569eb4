// One training step: micro-batches forward and backward, gradient sums, the awaited status word, then the update. Gradients
// are sums over tokens and are divided once by the tokens of the whole global batch, so unequal micro-batches count exactly.
import { native } from '../addon/load.js'
import { ViaductError } from '../base/errors.js'
import type { TokenBatch } from '../models/batch.js'
import type { DistributedModel } from '../models/distributedModel.js'
import { runPipeline } from '../models/pipelineRun.js'
import { auxLossCoeffs, layersWithExperts, routerLosses } from '../models/routerSettings.js'
import { gradientFactor } from '../optim/adamw.js'
import { learningRate } from '../optim/schedule.js'
import { allGatherObject } from '../parallel/collectives.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import { Tensor } from '../tensor/tensor.js'
import type { ForwardStep } from './forwardStep.js'
import type { TrainState } from './state.js'
import { speaksForModel, sumOverRanks } from './status.js'

/** What a step did. Equal on all ranks, except for time and memory. */
export interface StepReport {
  /** Steps done, this one included. */
  readonly step: number
  /** Mean cross entropy a token over the global batch, before the update; nats. */
  readonly loss: number
  /** Global norm of the mean gradient, before clipping. */
  readonly gradNorm: number
  readonly lr: number
  /** Tokens that count, over all ranks. */
  readonly tokens: number
  /** False when the update was skipped because gradients were not finite. */
  readonly updated: boolean
  readonly ms: number
  /** Largest number of bytes handed out on this rank. */
  readonly peakMemory: number
  /** True when some rank was asked to stop. */
  readonly stopRequested: boolean
  /** Means over tokens of what the forward step told besides; means over layers and micro-batches of what routers are trained by. */
  readonly metrics: Readonly<Record<string, number>>
}

/** Sums on the host of what micro-batches gave. */
interface Sums {
  loss: number
  tokens: number
  metrics: Record<string, number>
}

/**
 * Runs one step on this rank's micro-batches; every rank calls it.
 * @throws ERR_LABEL when no label of the global batch counts, ERR_NOT_FINITE by policy, ERR_TOKEN_ID; the stream's error.
 */
export async function trainStep(
  state: TrainState,
  microBatches: readonly TokenBatch[],
  forward: ForwardStep,
): Promise<StepReport> {
  const started = performance.now()
  const { model, optimizer, resolved } = state
  const { train, optimizer: options, rng } = resolved.config
  const step = state.step + 1
  const scope = new Scope()
  model.device.resetPeak()
  try {
    const ctx = model.ctx({ scope, rng: { seed: rng.seed, step, rngSlot: state.rngSlot } })
    native.upload(ctx.stream.id, state.rngSlot.handle, BigInt64Array.of(BigInt(rng.seed), BigInt(step)))
    model.training = true
    optimizer.gradients.zero(ctx)
    await checkMicroBatches(ctx, model, microBatches)
    for (const chunk of model.chunks) {
      chunk.routerTotals.clear(ctx)
      for (const router of chunk.routers) router.beginStep(ctx)
    }
    const sums = await forwardBackward(ctx, state, microBatches, forward)
    optimizer.gradients.reduce(ctx)
    const squares = await optimizer.gradients.sumOfSquares(ctx)

    // The last stage alone knows what the forward step told.
    const names = (await allGatherObject(Object.keys(sums.metrics), ctx.groups.get('pp'))).at(-1) as string[]
    const counts = speaksForModel(ctx) ? 1 : 0
    const routers = await routerSums(model, counts * microBatches.length)
    const [loss, tokens, norm, stop, aborted, ...metrics] = (await sumOverRanks(ctx, [
      counts * sums.loss,
      counts * sums.tokens,
      squares,
      state.stopSignal === null ? 0 : 1,
      state.signal?.aborted ? 1 : 0,
      ...names.map((name) => counts * (sums.metrics[name] ?? 0)),
      ...routers.values(),
    ])) as [number, number, number, number, number, ...number[]]
    if (aborted > 0) {
      throw new ViaductError(
        'ERR_ABORTED',
        'train',
        `step ${step} was aborted on ${aborted} of ${resolved.worldSize} ranks`,
        { step },
      )
    }
    if (tokens === 0) {
      throw new ViaductError(
        'ERR_LABEL',
        'train',
        `expected at least one label that counts in the global batch of step ${step}, got only ignored ones (-100): there is no loss to train on`,
        { step },
      )
    }
    const lr = learningRate(state.schedule, state.step)
    const { factor, norm: gradNorm } = gradientFactor(norm, tokens, options.clipGrad)
    const updated = Number.isFinite(gradNorm) && Number.isFinite(loss)
    if (updated) {
      optimizer.step(ctx, { lr, factor })
      for (const chunk of model.chunks) for (const router of chunk.routers) await router.updateExpertBias(ctx)
    } else await notFinite(ctx, state, step)
    await ctx.stream.sync()
    state.step = step
    if (!updated) state.skippedSteps++
    state.consumedTokens += tokens
    return {
      step,
      loss: loss / tokens,
      gradNorm,
      lr,
      tokens,
      updated,
      ms: performance.now() - started,
      peakMemory: model.device.memory().peakBytes,
      stopRequested: stop > 0 && train.exitSignalHandler,
      metrics: {
        ...Object.fromEntries(names.map((name, i) => [name, (metrics[i] as number) / tokens])),
        ...routerMeans(ctx, model, [...routers.keys()], metrics.slice(names.length)),
      },
    }
  } finally {
    scope.close()
  }
}

/**
 * Ranks that exchange rows of experts, or balance experts together, do so micro-batch by micro-batch, and gathered tokens are equally many
 * on each: else they would wait for each other.
 */
async function checkMicroBatches(ctx: Ctx, { config }: DistributedModel, microBatches: readonly TokenBatch[]) {
  if (layersWithExperts(config) === 0) return
  const together = 'global_aux_loss' in auxLossCoeffs(config)
  const group = ctx.groups.get(together ? 'dp_cp' : 'etp_ep')
  const alike = config.moeTokenDispatcherType === 'allgather' || config.moePadExpertInputToCapacity
  const sized = alike && ctx.groups.get('etp_ep').size > 1
  const own = sized ? microBatches.map(({ batchSize, seqLength }) => [batchSize, seqLength]) : microBatches.length
  const all = (await allGatherObject(own, group)).map((one) => JSON.stringify(one))
  if (all.every((one) => one === JSON.stringify(own))) return
  const why = together ? 'moeRouterLoadBalancingType=global_aux_loss' : 'experts that ranks share'
  const what = sized ? 'micro-batches of the same sizes [sequences, tokens]' : 'as many micro-batches'
  throw new ViaductError(
    'ERR_DATA',
    'train',
    `expected ${what} on each of ${group.size} ranks, for ${why}, got ${all.join(', ')}: give ranks that have fewer some without labels`,
    { microBatches: all },
  )
}

const microBatchCount = 'micro-batches'

/** What this rank's routers told in the step, and how many micro-batches it speaks for; nothing where none is told. */
async function routerSums(model: DistributedModel, microBatches: number): Promise<ReadonlyMap<string, number>> {
  const names = routerLosses(model.config)
  const chunks = names.length === 0 ? [] : await Promise.all(model.chunks.map((chunk) => chunk.routerTotals.read()))
  const sums = names.map((name) => [name, chunks.reduce((sum, told) => sum + (told.get(name) ?? 0), 0)] as const)
  return new Map(names.length === 0 ? [] : [...sums, [microBatchCount, microBatches]])
}

/** Means over layers with experts and micro-batches, of sums over all ranks. */
function routerMeans(ctx: Ctx, model: DistributedModel, names: readonly string[], sums: readonly number[]) {
  // Each rank of cp spoke for its micro-batches.
  const microBatches = (sums[names.indexOf(microBatchCount)] ?? 0) / ctx.groups.get('cp').size
  const terms = layersWithExperts(model.config) * microBatches
  return Object.fromEntries(
    names.flatMap((name, i) => (name === microBatchCount ? [] : [[name, (sums[i] as number) / terms]])),
  )
}

async function forwardBackward(
  ctx: Ctx,
  state: TrainState,
  microBatches: readonly TokenBatch[],
  forward: ForwardStep,
): Promise<Sums> {
  const { model } = state
  const one = Tensor.full(ctx, [1], 'float32', 1)
  const sums: Sums = { loss: 0, tokens: 0, metrics: {} }
  const pending: {
    readonly loss: Promise<number>
    readonly metrics: readonly (readonly [string, Promise<number>])[]
  }[] = []
  await runPipeline(
    ctx,
    model,
    microBatches,
    async (inner, chunk, batch) => {
      const result = await forward(inner, chunk, batch)
      sums.tokens += result.numTokens
      pending.push({
        loss: result.lossSum.item(),
        metrics: Object.entries(result.metrics ?? {}).map(([name, value]) => [name, value.item()] as const),
      })
      return { output: result.lossSum, seed: one }
    },
    { backward: true, onWeight: state.optimizer.gradients.listener(ctx) },
  )
  for (const { loss, metrics } of pending) {
    sums.loss += await loss
    for (const [name, value] of metrics) sums.metrics[name] = (sums.metrics[name] ?? 0) + (await value)
  }
  return sums
}

/** Tells which rank and parameter it was; throws where the policy is to stop. Every rank calls it. */
async function notFinite(ctx: Ctx, state: TrainState, step: number): Promise<void> {
  const here = await state.optimizer.gradients.notFinite(ctx)
  const all = await allGatherObject(here, ctx.groups.get('world'))
  const rank = all.findIndex((names) => names.length > 0)
  const names = all[rank] ?? []
  const where =
    names.length === 0
      ? 'the loss'
      : `the gradient of ${names[0]}${names.length > 1 ? ` and ${names.length - 1} more` : ''} on rank ${rank}`
  const what = `step ${step}: ${where} is not finite`
  if (state.resolved.config.train.nonFiniteGrads === 'stop') {
    throw new ViaductError(
      'ERR_NOT_FINITE',
      'train',
      `${what}: lower optimizer.lr, look at the data of this step, or set train.nonFiniteGrads=skip`,
      {
        step,
        rank,
        parameters: names,
      },
    )
  }
  state.log(`${what}: the update is skipped`)
}
