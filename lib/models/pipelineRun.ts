// Executes a pipeline schedule on this rank: one tape and one scope for each micro-batch in each chunk. Without a pipeline it is the plain
// loop over micro-batches. Shapes need no messages: each stage has the tokens of every micro-batch.
import { assert } from '../base/errors.js'
import { type BackwardOptions, Tape } from '../ops/tape.js'
import type { PipelineLinks } from '../parallel/pipelineLinks.js'
import { forwardSchedule, pipelineSchedule } from '../parallel/schedules.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { type DeviceBatch, type TokenBatch, uploadBatch } from './batch.js'
import type { DistributedModel } from './distributedModel.js'
import type { GPTModel } from './gpt.js'

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
 * Runs all micro-batches through the model, forward and, with `backward`, backward into the main gradients. Every rank calls it with
 * the same micro-batches as the other ranks of its pipeline; `last` runs on the last stage only.
 */
export async function runPipeline(
  ctx: Ctx,
  model: DistributedModel,
  microBatches: readonly TokenBatch[],
  last: LastPass,
  options: PipelineRunOptions,
): Promise<void> {
  if (microBatches.length === 0) return
  const sizes = model.config.scheduleSizes(microBatches.length)
  const stage = ctx.groups.get('pp').rank
  const actions = (options.backward ? pipelineSchedule : forwardSchedule)(sizes)[stage] ?? []
  const stageRun = new StageRun(ctx, model, microBatches, last, options)
  try {
    for (const { kind, microBatch, chunk } of actions) {
      if (kind === 'forward') await stageRun.forward(microBatch, chunk)
      else if (kind === 'backwardWeight') await stageRun.backwardWeight(microBatch, chunk)
      else await stageRun.backward(microBatch, chunk, kind === 'backward')
    }
  } finally {
    stageRun.dispose()
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
      const uploaded = uploadBatch(inner, host, model.config)
      const input = chunk.part.hasEmbedding ? null : this.#receiveHidden(inner, chunk, host)
      if (input !== null) tape?.watch(input)
      const batch = { ...uploaded, hidden: input }
      if (chunk.part.hasHead) {
        const { output, seed } = await this.last(inner, chunk, batch, microBatch)
        this.#keep(microBatch, at, scope, tape, { input, output, seed })
      } else {
        const output = await chunk.pass(inner, batch)
        this.#links.send(inner, 'forward', output)
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
      const seed = pass.seed ?? this.#links.receive(ctx, 'backward', output.shape, output.dtype)
      const found = await tape.backward(ctx, [output], [seed], {
        ...this.#told(microBatch),
        weights: weights ? 'now' : 'defer',
      })
      if (input !== null) {
        const gradient = found.get(input)
        assert(gradient !== undefined, `no gradient has come to the input of chunk ${at}`)
        this.#links.send(ctx, 'backward', gradient)
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

  get #links(): PipelineLinks {
    const { links } = this.model
    assert(links !== null, 'a part of a model without the links to its neighbours')
    return links
  }

  #receiveHidden(ctx: Ctx, chunk: GPTModel, { batchSize, seqLength }: TokenBatch): Tensor {
    const { hiddenSize, paramsDtype } = chunk.config
    const rows = chunk.hiddenRows(ctx, batchSize * seqLength)
    return this.#links.receive(ctx, 'forward', [rows, hiddenSize], paramsDtype)
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
