// Token by token from a model, with a cache of keys and values on each pipeline stage for its own layers. Every rank calls it with the
// same arguments and yields the same tokens: the last stage chooses them. Prompts of one batch are padded on the left; no padding is
// ever seen.
import { native } from '../addon/load.js'
import { stopIfAborted, ViaductError } from '../base/errors.js'
import { type TokenBatch, uploadBatch } from '../models/batch.js'
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
    stopIfAborted(options.signal, 'generate')
    if (useCache)
      for (const chunk of model.chunks) caches.push(chunk.createCache(ctx, prompts.length, longest + maxNewTokens))
    const ahead = useCache && (options.temperature ?? 0) === 0 && model.chunks.every(isAlone)
    const steps = (ahead ? stepsAhead : stepByStep)({ ctx, model, sequences, padding, caches, options })
    for await (const next of steps) {
      stopIfAborted(options.signal, 'generate')
      const given = next.map((token, b) => (done[b] ? null : token))
      given.forEach((token, b) => {
        if (token !== null && eosIds.includes(token)) done[b] = true
      })
      yield given
      if (!done.includes(false)) return
    }
  } finally {
    for (const cache of caches) cache.dispose()
    scope.close()
    model.training = before
  }
}

/** A batch of sequences that grow. */
interface Generation {
  readonly ctx: Ctx
  readonly model: DistributedModel
  /** Padded prompts, and what was added. */
  readonly sequences: readonly number[][]
  readonly padding: readonly number[]
  /** Of the chunks; empty: each step runs over the whole sequence again. */
  readonly caches: readonly KvCache[]
  readonly options: GenerateOptions
}

/** The next token of each sequence, step by step: the host reads what one step chose before it begins the next one. */
async function* stepByStep({ ctx, model, sequences, padding, caches, options }: Generation) {
  for (let step = 0; step < options.maxNewTokens; step++) {
    const next = await withScope(ctx, async (inner) => {
      const start = caches[0]?.length ?? 0
      const rows = sequences.map((sequence) => sequence.slice(start))
      const batch = newTokens(rows, padding, start)
      const uploaded = uploadBatch(inner, batch, model.config)
      const logits = await forwardOnce(inner, model, uploaded, caches.length > 0 ? caches : null)
      const last = logits && lastPosition(inner, logits, batch)
      const chosen = last && (await chooseTokens(inner, model, last, options, sequences[0]?.length ?? 0, padding))
      return await fromLastStage(inner, chosen, sequences.length)
    })
    sequences.forEach((sequence, b) => void sequence.push(next[b] as number))
    yield next
  }
}

/** Whether a chunk is the whole model on one rank. */
const isAlone = ({ part, tp }: GPTModel) => part.hasEmbedding && part.hasHead && tp.size === 1

/**
 * The same greedy tokens of a model on one rank. What one step chose goes to the next one on the device, which the host enqueues
 * before it reads: at most one step too many is begun.
 */
async function* stepsAhead({ ctx, model, sequences, padding, caches, options }: Generation) {
  let chosen: Tensor | null = null
  let pending: Promise<number[]> | null = null
  try {
    for (let step = 0; step < options.maxNewTokens; step++) {
      const index: Tensor = await withScope(ctx, async (inner) => {
        // What the host does not know yet stands in `chosen`.
        const rows = chosen === null ? sequences : sequences.map(() => [0])
        const batch = newTokens(rows, padding, caches[0]?.length ?? 0)
        const uploaded = uploadBatch(inner, batch, model.config)
        const logits = await forwardOnce(inner, model, chosen ? { ...uploaded, tokens: chosen } : uploaded, caches)
        const last = lastPosition(inner, logits as Tensor, batch)
        return largest(inner, model.chunks[0] as GPTModel, last).index.keep()
      })
      chosen?.dispose()
      chosen = index
      const read: Promise<number[]> = index.bytes().then(({ buffer }) => Array.from(new BigInt64Array(buffer), Number))
      read.catch(() => {}) // told where it is awaited
      if (pending !== null) yield await pending
      pending = read
    }
    if (pending !== null) yield await pending
  } finally {
    chosen?.dispose()
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

/** The tokens that no cache holds yet: `rows`, from position `start` on. */
function newTokens(rows: readonly (readonly number[])[], padding: readonly number[], start: number): TokenBatch {
  const batchSize = rows.length
  const seqLength = rows[0]?.length ?? 0
  return {
    batchSize,
    seqLength,
    tokens: Int32Array.from(rows.flat()),
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

/** Of each row the first of the largest logits of this rank's columns: which token, int64 [B], and the logit. */
function largest(ctx: Ctx, { tp, config }: GPTModel, logits: Tensor): { index: Tensor; value: Tensor } {
  const [B = 0, local = 0] = logits.shape
  const index = ctx.empty([B], 'int64')
  const value = ctx.empty([B], 'float32')
  native.argmax(ctx.stream.id, index.handle, value.handle, logits.handle, tp.rank * local, config.vocabSize)
  return { index, value }
}

/** The first of the largest logits over all ranks' columns. */
async function greedyTokens(ctx: Ctx, chunk: GPTModel, logits: Tensor): Promise<number[]> {
  const { tp } = chunk
  const [B = 0] = logits.shape
  const { index, value } = largest(ctx, chunk, logits)
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
