// Executes a pipeline schedule on this rank: one tape and one scope for each micro-batch in each chunk. Without a pipeline it is the plain
// loop over micro-batches. Shapes and the bounds of sequences need no messages: each stage has every micro-batch.
import { assert } from '../base/errors.js'
import { type BackwardOptions, Tape } from '../ops/tape.js'
import { allGatherObject } from '../parallel/collectives.js'
import { contextGroups } from '../parallel/contextShards.js'
import type { PipelineLinks } from '../parallel/pipelineLinks.js'
import { forwardSchedule, type PipelineAction, pipelineSchedule } from '../parallel/schedules.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Stream } from '../tensor/stream.js'
import type { Tensor } from '../tensor/tensor.js'
import { type DeviceBatch, type TokenBatch, uploadBatch } from './batch.js'
import { checkSameBatches } from './batchAgreement.js'
import type { DistributedModel } from './distributedModel.js'
import type { GPTModel } from './gpt.js'
import type { KvCache } from './kvCache.js'
import { backwardUnits, forwardUnits, type ShardedWeights, type UnitStep } from './unitPasses.js'

/** The end of a micro-batch's forward pass, where its backward pass begins. */
export interface PassEnd {
  /** float32 [1], e.g. a sum of losses. */
  readonly output: Tensor
  /** Its gradient, of the same shape. */
  readonly seed: Tensor
}

/**
 * What the last chunk does with a micro-batch. `batch.hidden` is what came from the chunk before it: `chunk.forward` and `chunk.loss`
 * read it. Tensors that are wanted later must be kept.
 */
export type LastPass = (ctx: Ctx, chunk: GPTModel, batch: DeviceBatch, microBatch: number) => Promise<PassEnd>

export interface PipelineRunOptions {
  /** Run the backward passes too. */
  readonly backward: boolean
  /** Told of each weight whenever a backward pass of the last micro-batch has added to its gradient (BackwardOptions.onWeight). */
  readonly onWeight?: BackwardOptions['onWeight']
}

/** A micro-batch in a chunk, between its forward and its backward pass. */
interface OpenPass {
  readonly scope: Scope
  readonly tape: Tape
  readonly input: Tensor | null
  readonly output: Tensor
  /** Null where the next chunk sends the gradient. */
  readonly seed: Tensor | null
}

/**
 * Runs all micro-batches through the model, forward and, with `backward`, backward into the main gradients. Each has lengths and a batch
 * size of its own. Every rank calls it with the same micro-batches as the other ranks of its copy of the model; `last` runs on the last
 * stage only.
 * @throws ERR_DATA on every rank when they are not the same.
 */
export async function runPipeline(
  ctx: Ctx,
  model: DistributedModel,
  microBatches: readonly TokenBatch[],
  last: LastPass,
  options: PipelineRunOptions,
): Promise<void> {
  await checkSameBatches(ctx, microBatches)
  const count = await passedTogether(ctx, model, microBatches.length)
  if (count === 0) return
  const sizes = model.config.scheduleSizes(count)
  const stage = ctx.groups.get('pp').rank
  const actions = (options.backward ? pipelineSchedule : forwardSchedule)(sizes)[stage] ?? []
  const stageRun = new StageRun(ctx, model, microBatches, last, options)
  const pace = model.links === null ? null : new Pace(ctx.stream)
  const sharded = model.shardedWeights
  sharded?.begin(actions.map((action) => unitsOf(model, sharded, action)))
  try {
    for (const { kind, microBatch, chunk } of actions) {
      await pace?.next()
      if (microBatch >= microBatches.length) {
        sharded?.skipPass()
        continue
      }
      if (kind === 'forward') await stageRun.forward(microBatch, chunk)
      else if (kind === 'backwardWeight') await stageRun.backwardWeight(microBatch, chunk)
      else await stageRun.backward(microBatch, chunk, kind === 'backward')
      sharded?.endPass()
    }
  } finally {
    stageRun.dispose()
    sharded?.end()
  }
}

/** Micro-batches whose passes this rank takes part in: where weights are gathered for each, those of the rank that has most. */
async function passedTogether(ctx: Ctx, { shardedWeights }: DistributedModel, own: number): Promise<number> {
  return shardedWeights === null ? own : Math.max(...(await allGatherObject(own, ctx.groups.get('dp'))))
}

function unitsOf(model: DistributedModel, { keepsForBackward }: ShardedWeights, action: PipelineAction): UnitStep[] {
  const chunk = model.chunks[action.chunk] as GPTModel
  return (action.kind === 'forward' ? forwardUnits : backwardUnits)(chunk, keepsForBackward)
}

/**
 * Runs one batch through the model without a backward pass. Every rank of its copy of the model calls it with the same batch.
 * @param caches - of this rank's chunks, in their order; null: no past tokens.
 * @returns on the last stage logits [T, Vlocal], as GPTModel.forward; null on others.
 */
export async function forwardOnce(
  ctx: Ctx,
  model: DistributedModel,
  batch: DeviceBatch,
  caches: readonly KvCache[] | null,
): Promise<Tensor | null> {
  for (const [at, chunk] of model.chunks.entries()) {
    const cache = caches?.[at]
    const input = { ...batch, hidden: receiveHidden(ctx, model, chunk, batch, cache) }
    if (chunk.part.hasHead) return await chunk.forward(ctx, input, cache)
    linksOf(model).send(ctx, 'forward', await chunk.pass(ctx, input, cache))
  }
  return null
}

function linksOf({ links }: DistributedModel): PipelineLinks {
  assert(links !== null, 'a part of a model without the links to its neighbours')
  return links
}

/** What the chunk before this one gave; null where the model begins. */
function receiveHidden(
  ctx: Ctx,
  model: DistributedModel,
  chunk: GPTModel,
  { batchSize, seqLength }: Pick<DeviceBatch, 'batchSize' | 'seqLength'>,
  cache?: KvCache,
): Tensor | null {
  if (chunk.part.hasEmbedding) return null
  const { hiddenSize, paramsDtype } = chunk.config
  const rows = chunk.hiddenRows(batchSize * seqLength, cache)
  return linksOf(model).receive(ctx, 'forward', [rows, hiddenSize], paramsDtype)
}

/**
 * Keeps a stage from enqueueing far more than its stream has run: what it sends and receives lies in memory until the streams have
 * passed it, so that otherwise the micro-batches of a whole step would. Two actions at a time: while one runs, the next one waits.
 */
class Pace {
  #before: Promise<void> = Promise.resolve()

  constructor(readonly stream: Stream) {}

  /** Resolves when an action may be enqueued. @throws the stream's error */
  async next(): Promise<void> {
    const enqueued = this.stream.sync()
    enqueued.catch(() => {}) // told by whoever waits for the stream next
    const before = this.#before
    this.#before = enqueued
    await before
  }
}

class StageRun {
  readonly #open = new Map<string, OpenPass>()

  constructor(
    readonly ctx: Ctx,
    readonly model: DistributedModel,
    readonly microBatches: readonly TokenBatch[],
    readonly last: LastPass,
    readonly options: PipelineRunOptions,
  ) {}

  async forward(microBatch: number, at: number): Promise<void> {
    const { ctx, model } = this
    const chunk = this.#chunk(at)
    const host = this.microBatches[microBatch] as TokenBatch
    const scope = new Scope()
    const tape = this.options.backward ? new Tape() : null
    try {
      const inner = ctx.with({ scope, tape })
      const uploaded = uploadBatch(inner, host, model.config, contextGroups(ctx.groups))
      const input = receiveHidden(inner, model, chunk, uploaded)
      if (input !== null) tape?.watch(input)
      const batch = { ...uploaded, hidden: input }
      if (chunk.part.hasHead) {
        const { output, seed } = await this.last(inner, chunk, batch, microBatch)
        this.#keep(microBatch, at, scope, tape, { input, output, seed })
      } else {
        const output = await chunk.pass(inner, batch)
        linksOf(model).send(inner, 'forward', output)
        // What the backward pass needs of it, the tape holds.
        output.dispose()
        this.#keep(microBatch, at, scope, tape, { input, output, seed: null })
      }
    } catch (error) {
      tape?.dispose()
      scope.close()
      throw error
    }
  }

  /** Gradients of the chunk's input, and with `weights` those of its weights too. */
  async backward(microBatch: number, at: number, weights: boolean): Promise<void> {
    const pass = this.#passOf(microBatch, at)
    const { tape, input, output } = pass
    const scope = new Scope()
    try {
      const ctx = this.ctx.with({ scope })
      const seed = pass.seed ?? linksOf(this.model).receive(ctx, 'backward', output.shape, output.dtype)
      const found = await tape.backward(ctx, [output], [seed], {
        ...this.#told(microBatch),
        weights: weights ? 'now' : 'defer',
      })
      if (input !== null) {
        const gradient = found.get(input)
        assert(gradient !== undefined, `no gradient has come to the input of chunk ${at}`)
        linksOf(this.model).send(ctx, 'backward', gradient)
      }
    } finally {
      scope.close()
    }
    if (weights) this.#close(microBatch, at)
  }

  async backwardWeight(microBatch: number, at: number): Promise<void> {
    await this.#passOf(microBatch, at).tape.backwardWeight(this.ctx, this.#told(microBatch))
    this.#close(microBatch, at)
  }

  /** Frees what is left after a failure. */
  dispose(): void {
    for (const { tape, scope } of this.#open.values()) {
      tape.dispose()
      scope.close()
    }
    this.#open.clear()
  }

  #told(microBatch: number): BackwardOptions {
    return microBatch === this.microBatches.length - 1 ? { onWeight: this.options.onWeight } : {}
  }

  #chunk(at: number): GPTModel {
    const chunk = this.model.chunks[at]
    assert(chunk !== undefined, `a schedule with chunk ${at} for a model of ${this.model.chunks.length}`)
    return chunk
  }

  #keep(microBatch: number, at: number, scope: Scope, tape: Tape | null, rest: Omit<OpenPass, 'scope' | 'tape'>): void {
    if (tape === null) scope.close()
    else this.#open.set(`${microBatch} ${at}`, { scope, tape, ...rest })
  }

  #passOf(microBatch: number, at: number): OpenPass {
    const pass = this.#open.get(`${microBatch} ${at}`)
    assert(pass !== undefined, `micro-batch ${microBatch} has not passed chunk ${at} yet`)
    return pass
  }

  #close(microBatch: number, at: number): void {
    const { tape, scope } = this.#passOf(microBatch, at)
    this.#open.delete(`${microBatch} ${at}`)
    tape.dispose()
    scope.close()
  }
}
