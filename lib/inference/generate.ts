// Token by token from a model, with a cache of keys and values. Every rank of the model's tensor-parallel group calls it with the
// same arguments and yields the same tokens. Prompts of one batch are padded on the left; no padding is ever seen.
import { native } from '../addon/load.js'
import { stopIfAborted, ViaductError } from '../base/errors.js'
import { uploadBatch } from '../models/batch.js'
import type { DistributedModel } from '../models/distributedModel.js'
import type { GPTModel } from '../models/gpt.js'
import type { KvCache } from '../models/kvCache.js'
import { allGather } from '../parallel/collectives.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope, withScope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import { uniformAt } from './philox.js'
import { checkSampling, type SamplingOptions, sampleToken } from './sampling.js'

export interface GenerateOptions extends SamplingOptions {
  /** Most tokens to add to each sequence. */
  readonly maxNewTokens: number
  /** Seed of the sampling. Default 0. */
  readonly seed?: number
  /** Ids that end a sequence; the id itself is still given. Default: none. */
  readonly eosIds?: readonly number[]
  /** False: each step runs over the whole sequence again. Default true. */
  readonly useCache?: boolean
  readonly signal?: AbortSignal
}

/** New tokens of one step: one a sequence, null for sequences that have ended. */
export type GeneratedStep = readonly (number | null)[]

/**
 * Continues prompts, one step at a time. Memory is freed when the iteration ends, also early.
 * @param prompts - token ids, at least one each.
 * @throws ERR_USAGE for empty prompts and options out of range, ERR_TOKEN_ID.
 */
export async function* generateSteps(
  model: DistributedModel,
  prompts: readonly (readonly number[])[],
  options: GenerateOptions,
): AsyncGenerator<GeneratedStep, void> {
  checkSampling(options)
  const chunk = soleChunk(model)
  if (prompts.length === 0 || prompts.some((prompt) => prompt.length === 0)) {
    throw new ViaductError('ERR_USAGE', 'generate', 'expected prompts of at least one token each, got an empty one')
  }
  const { maxNewTokens, eosIds = [], useCache = true } = options
  const longest = Math.max(...prompts.map((prompt) => prompt.length))
  const padding = prompts.map((prompt) => longest - prompt.length)
  const sequences = prompts.map((prompt, b) => [
    ...Array<number>(padding[b] as number).fill(prompt[0] as number),
    ...prompt,
  ])
  const done = prompts.map(() => false)
  const before = chunk.training
  const scope = new Scope()
  const ctx = model.ctx({ scope })
  model.training = false
  let cache: KvCache | null = null
  try {
    if (useCache) cache = chunk.createCache(ctx, prompts.length, longest + maxNewTokens)
    for (let step = 0; step < maxNewTokens && done.includes(false); step++) {
      stopIfAborted(options.signal, 'generate')
      const next = await withScope(ctx, async (inner) => {
        const logits = await lastLogits(inner, chunk, sequences, padding, cache)
        return await chooseTokens(inner, chunk, logits, options, longest + step, padding)
      })
      const given = next.map((token, b) => (done[b] ? null : token))
      sequences.forEach((sequence, b) => void sequence.push(next[b] as number))
      given.forEach((token, b) => {
        if (token !== null && eosIds.includes(token)) done[b] = true
      })
      yield given
    }
  } finally {
    cache?.dispose()
    scope.close()
    model.training = before
  }
}

/** Continues prompts and returns the new tokens of each, the end token included. As `generateSteps`. */
export async function generate(
  model: DistributedModel,
  prompts: readonly (readonly number[])[],
  options: GenerateOptions,
): Promise<number[][]> {
  const added: number[][] = prompts.map(() => [])
  for await (const step of generateSteps(model, prompts, options)) {
    step.forEach((token, b) => {
      if (token !== null) added[b]?.push(token)
    })
  }
  return added
}

/** Why a pipeline is refused. */
export const generatesOnOneStage = 'generation over pipeline stages is not built yet, use pipelineModelParallelSize=1'

function soleChunk(model: DistributedModel): GPTModel {
  const [chunk] = model.chunks
  const stages = model.mesh.get('pp').size
  if (chunk === undefined || model.chunks.length !== 1 || stages > 1) {
    throw new ViaductError(
      'ERR_UNSUPPORTED',
      'generate',
      `expected a model in one piece, got one over ${stages} pipeline stages: ${generatesOnOneStage}`,
    )
  }
  return chunk
}

/** Logits [B, Vlocal] of the last position: of the new tokens alone where a cache holds the others. */
async function lastLogits(
  ctx: Ctx,
  chunk: GPTModel,
  sequences: readonly number[][],
  padding: readonly number[],
  cache: KvCache | null,
): Promise<Tensor> {
  const B = sequences.length
  const start = cache?.length ?? 0
  const S = (sequences[0] as number[]).length - start
  const batch = uploadBatch(
    ctx,
    {
      batchSize: B,
      seqLength: S,
      tokens: Int32Array.from(sequences.flatMap((sequence) => sequence.slice(start))),
      positionIds: Int32Array.from({ length: B * S }, (_, t) =>
        Math.max(0, start + (t % S) - (padding[Math.floor(t / S)] as number)),
      ),
      start,
      ...(padding.some((p) => p > 0) ? { firstKeys: Int32Array.from(padding) } : {}),
    },
    chunk.config,
  )
  const logits = await chunk.forward(ctx, batch, cache ?? undefined)
  const V = logits.shape[1] as number
  return logits.view(ctx, [B, V], [S * V, 1], (S - 1) * V)
}

async function chooseTokens(
  ctx: Ctx,
  chunk: GPTModel,
  logits: Tensor,
  options: GenerateOptions,
  position: number,
  padding: readonly number[],
): Promise<number[]> {
  const B = logits.shape[0] as number
  const V = chunk.config.vocabSize
  if ((options.temperature ?? 0) === 0) return await greedyTokens(ctx, chunk, logits)
  const rows = ctx.empty(logits.shape, logits.dtype)
  native.copy(ctx.stream.id, rows.handle, logits.handle)
  const whole = await chunk.gatherLogits(ctx, rows)
  // A sequence's own position, so that padding changes nothing.
  return Array.from({ length: B }, (_, b) =>
    sampleToken(
      whole.subarray(b * V, (b + 1) * V),
      options,
      uniformAt(options.seed ?? 0, b, position - (padding[b] as number)),
    ),
  )
}

/** The first of the largest logits over all ranks' columns. */
async function greedyTokens(ctx: Ctx, chunk: GPTModel, logits: Tensor): Promise<number[]> {
  const { tp } = chunk
  const [B = 0, local = 0] = logits.shape
  const index = ctx.empty([B], 'int64')
  const value = ctx.empty([B], 'float32')
  native.argmax(ctx.stream.id, index.handle, value.handle, logits.handle, tp.rank * local, chunk.config.vocabSize)
  const ids = new BigInt64Array((await (tp.size === 1 ? index : allGather(ctx, index, tp)).bytes()).buffer)
  if (tp.size === 1) return Array.from(ids, Number)
  const values = await allGather(ctx, value, tp).toFloat32Array()
  return Array.from({ length: B }, (_, b) => {
    let best = 0
    for (let rank = 1; rank < tp.size; rank++)
      if ((values[rank * B + b] as number) > (values[best * B + b] as number)) best = rank
    return Number(ids[best * B + b])
  })
}
