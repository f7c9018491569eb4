// Token by token from a model, with a cache of keys and values on each pipeline stage for its own layers. Every rank calls it with the
// same arguments and yields the same tokens: the last stage chooses them. Prompts of one batch are padded on the left; no padding is
// ever seen.
import { native } from '../addon/load.js'
import { stopIfAborted, ViaductError } from '../base/errors.js'
import type { TokenBatch } from '../models/batch.js'
import type { DistributedModel } from '../models/distributedModel.js'
import type { GPTModel } from '../models/gpt.js'
import type { KvCache } from '../models/kvCache.js'
import { forwardOnce } from '../models/pipelineRun.js'
import { allGather, broadcast } from '../parallel/collectives.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope, withScope } from '../tensor/scope.js'
import { Tensor } from '../tensor/tensor.js'
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
  const before = model.training
  const scope = new Scope()
  const ctx = model.ctx({ scope })
  model.training = false
  const caches: KvCache[] = []
  try {
    if (useCache)
      for (const chunk of model.chunks) caches.push(chunk.createCache(ctx, prompts.length, longest + maxNewTokens))
    for (let step = 0; step < maxNewTokens && done.includes(false); step++) {
      stopIfAborted(options.signal, 'generate')
      const next = await withScope(ctx, async (inner) => {
        const batch = newTokens(sequences, padding, caches[0]?.length ?? 0)
        const logits = await forwardOnce(inner, model, batch, useCache ? caches : null)
        const last = logits && lastPosition(inner, logits, batch)
        const chosen = last && (await chooseTokens(inner, model, last, options, longest + step, padding))
        return await fromLastStage(inner, chosen, prompts.length)
      })
      const given = next.map((token, b) => (done[b] ? null : token))
      sequences.forEach((sequence, b) => void sequence.push(next[b] as number))
      given.forEach((token, b) => {
        if (token !== null && eosIds.includes(token)) done[b] = true
      })
      yield given
    }
  } finally {
    for (const cache of caches) cache.dispose()
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

/** The tokens that no cache holds yet. */
function newTokens(sequences: readonly number[][], padding: readonly number[], start: number): TokenBatch {
  const batchSize = sequences.length
  const seqLength = (sequences[0] as number[]).length - start
  return {
    batchSize,
    seqLength,
    tokens: Int32Array.from(sequences.flatMap((sequence) => sequence.slice(start))),
    positionIds: Int32Array.from({ length: batchSize * seqLength }, (_, t) =>
      Math.max(0, start + (t % seqLength) - (padding[Math.floor(t / seqLength)] as number)),
    ),
    start,
    ...(padding.some((p) => p > 0) ? { firstKeys: Int32Array.from(padding) } : {}),
  }
}

/** Logits [B, Vlocal] of each sequence's last position. */
function lastPosition(ctx: Ctx, logits: Tensor, { batchSize: B, seqLength: S }: TokenBatch): Tensor {
  const V = logits.shape[1] as number
  return logits.view(ctx, [B, V], [S * V, 1], (S - 1) * V)
}

/** The tokens that the last stage chose, on every stage. */
async function fromLastStage(ctx: Ctx, chosen: readonly number[] | null, count: number): Promise<readonly number[]> {
  const pp = ctx.groups.get('pp')
  if (pp.size === 1) return chosen as readonly number[]
  const ids =
    chosen === null ? ctx.empty([count], 'int32') : Tensor.fromHost(ctx, Int32Array.from(chosen), [count], 'int32')
  const bytes = await broadcast(ctx, ids, pp.size - 1, pp).bytes()
  return [...new Int32Array(bytes.buffer, bytes.byteOffset, count)]
}

async function chooseTokens(
  ctx: Ctx,
  model: DistributedModel,
  logits: Tensor,
  options: GenerateOptions,
  position: number,
  padding: readonly number[],
): Promise<number[]> {
  const B = logits.shape[0] as number
  const chunk = model.chunks.at(-1) as GPTModel
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
