// Batches of tokens: named host arrays in, checked, uploaded. Ids and labels are checked here because a kernel that met a wrong
// one could only crash. Tokens are flattened: T = B·S, row b·S+s.
import { ViaductError } from '../base/errors.js'
import { type ContextGroups, keyBounds, ownPlaces } from '../parallel/contextShards.js'
import type { Ctx } from '../tensor/ctx.js'
import { Tensor } from '../tensor/tensor.js'

/** A batch on the host. Arrays are [B, S], row-major. */
export interface TokenBatch {
  readonly batchSize: number
  readonly seqLength: number
  readonly tokens: Int32Array
  /** Already shifted: the label of position s is the token that follows it. -100 is ignored. */
  readonly labels?: Int32Array
  /** Default: `start` + s. */
  readonly positionIds?: Int32Array
  /** 1 where a token is real: one run of ones a row, so padding is left or right. */
  readonly attentionMask?: Uint8Array
  /** The first visible key of each row, [B], counted from the start of the cache: left padding of a cached prompt. */
  readonly firstKeys?: Int32Array
  /** Position ids that do not go up by 1 begin a new sequence, which sees nothing of those before it. Default false. */
  readonly packed?: boolean
  /** Names each row [B] (or token [B, S]) for randomness by place. Default: the row's number. */
  readonly sampleIds?: BigInt64Array
  /** Tokens that a cache holds already. Default 0. */
  readonly start?: number
}

/** A batch on the device; tensors belong to the scope of the context that uploaded it. With `context` S counts this rank's tokens. */
export interface DeviceBatch {
  readonly batchSize: number
  readonly seqLength: number
  /** int32 or int64 [T] */
  readonly tokens: Tensor
  /** int32 [T], or null for inference. */
  readonly labels: Tensor | null
  /** int32 [T] */
  readonly positions: Tensor
  /** int64 [T] */
  readonly sampleIds: Tensor
  /** int32 [B, S] or null. With `context` as its attention takes it (KeyBounds). */
  readonly firstKey: Tensor | null
  /** int32 [B] or null. With `context` as `firstKey`. */
  readonly keyEnd: Tensor | null
  /** Labels that count. */
  readonly numTokens: number
  /** Largest position + 1. */
  readonly maxPosition: number
  /** Ranks that share each sequence: the tensors are this rank's tokens of it (parallel/contextShards.ts). Absent: all of them. */
  readonly context?: ContextGroups
  /** [GPTModel.hiddenRows, H]: what the chunk before this one gave; absent where the model begins. */
  readonly hidden?: Tensor | null
}

const ignored = -100

function fault(code: 'ERR_TOKEN_ID' | 'ERR_LABEL' | 'ERR_DATA', message: string, details = {}): never {
  throw new ViaductError(code, 'batch', message, details)
}

function checkLength(name: string, got: number, expected: number): void {
  if (got !== expected) fault('ERR_DATA', `expected ${name} with ${expected} values, got ${got}`)
}

/** Left padding as first visible keys, right padding as ends. */
function maskBounds(mask: Uint8Array, B: number, S: number): { first: Int32Array | null; end: Int32Array | null } {
  const first = new Int32Array(B)
  const end = new Int32Array(B)
  for (let b = 0; b < B; b++) {
    const row = mask.subarray(b * S, (b + 1) * S)
    const from = row.indexOf(1)
    const to = row.lastIndexOf(1) + 1
    if (from < 0) fault('ERR_DATA', `expected a real token in row ${b} of attention_mask, got none`, { row: b })
    const bad = row.findIndex((value, s) => value !== (s >= from && s < to ? 1 : 0))
    if (bad >= 0) {
      fault('ERR_DATA', `expected one run of ones in row ${b} of attention_mask, got ${row[bad]} at position ${bad}`, {
        row: b,
        position: bad,
      })
    }
    first[b] = from
    end[b] = to
  }
  return { first: first.some((v) => v > 0) ? first : null, end: end.some((v) => v < S) ? end : null }
}

/**
 * Checks a batch and puts it on the device.
 * @param config - `maxPositionEmbeddings` is not a limit: rotary positions go on past it, as in Transformers.
 * @param context - ranks that share each sequence; this one uploads its part.
 * @throws ERR_TOKEN_ID, ERR_LABEL with the position; ERR_DATA for wrong lengths and masks.
 */
export function uploadBatch(
  ctx: Ctx,
  batch: TokenBatch,
  config: { readonly vocabSize: number; readonly maxPositionEmbeddings: number },
  context: ContextGroups | null = null,
): DeviceBatch {
  const { batchSize: B, seqLength: S, tokens, labels, attentionMask, sampleIds } = batch
  const T = B * S
  if (!(Number.isInteger(B) && Number.isInteger(S) && T > 0))
    fault('ERR_DATA', `expected a batch of at least one token, got [${B}, ${S}]`)
  checkLength('tokens', tokens.length, T)
  for (let t = 0; t < T; t++) {
    const id = tokens[t] as number
    if (id < 0 || id >= config.vocabSize) {
      const [row, position] = [Math.floor(t / S), t % S]
      fault(
        'ERR_TOKEN_ID',
        `expected token ids of 0 to ${config.vocabSize - 1}, got ${id} at row ${row}, position ${position}`,
        { id, row, position },
      )
    }
  }
  if (labels) {
    checkLength('labels', labels.length, T)
    for (let t = 0; t < T; t++) {
      const label = labels[t] as number
      if (label === ignored) continue
      if (label < 0 || label >= config.vocabSize) {
        const [row, position] = [Math.floor(t / S), t % S]
        fault(
          'ERR_LABEL',
          `expected labels of 0 to ${config.vocabSize - 1} or ${ignored}, got ${label} at row ${row}, position ${position}`,
          { label, row, position },
        )
      }
    }
  }

  const start = batch.start ?? 0
  let positions = batch.positionIds
  if (positions) checkLength('positionIds', positions.length, T)
  else positions = Int32Array.from({ length: T }, (_, t) => start + (t % S))
  let maxPosition = 0
  for (let t = 0; t < T; t++) {
    const position = positions[t] as number
    if (position < 0)
      fault(
        'ERR_DATA',
        `expected positions of at least 0, got ${position} at row ${Math.floor(t / S)}, position ${t % S}`,
      )
    maxPosition = Math.max(maxPosition, position + 1)
  }

  if (attentionMask) checkLength('attentionMask', attentionMask.length, T)
  const { first, end } = attentionMask ? maskBounds(attentionMask, B, S) : { first: null, end: null }
  const rowFirst = batch.firstKeys ?? first
  if (batch.firstKeys) checkLength('firstKeys', batch.firstKeys.length, B)
  let firstKey: Int32Array | null = null
  if (rowFirst !== null || batch.packed === true) {
    firstKey = new Int32Array(T)
    for (let t = 0; t < T; t++) {
      const s = t % S
      const floor = rowFirst?.[Math.floor(t / S)] ?? 0
      const restarts = batch.packed === true && s > 0 && positions[t] !== (positions[t - 1] as number) + 1
      firstKey[t] = restarts ? start + s : s > 0 && batch.packed === true ? (firstKey[t - 1] as number) : floor
    }
  }

  const ids = new BigInt64Array(T)
  if (sampleIds && sampleIds.length !== B) checkLength('sampleIds', sampleIds.length, T)
  for (let t = 0; t < T; t++) {
    const row = Math.floor(t / S)
    ids[t] = sampleIds ? (sampleIds[sampleIds.length === B ? row : t] as bigint) : BigInt(row)
  }
  const places = context && ownPlaces(B, S, context.cp)
  const own = (values: Int32Array, filler = 0) =>
    places === null ? values : places.map((at) => (at < 0 ? filler : (values[at] as number)))
  const ownIds = places === null ? ids : BigInt64Array.from(places, (at) => (at < 0 ? 0n : (ids[at] as bigint)))
  const count = ownIds.length
  const ownLabels = labels ? own(labels, ignored) : null
  const int32 = (data: Int32Array, shape: number[]) => Tensor.fromHost(ctx, data, shape, 'int32')
  const bounds = context && keyBounds(B, S, context, firstKey, end)
  return {
    batchSize: B,
    seqLength: count / B,
    tokens: int32(own(tokens), [count]),
    labels: ownLabels ? int32(ownLabels, [count]) : null,
    positions: int32(own(positions), [count]),
    sampleIds: Tensor.fromHost(ctx, ownIds, [count], 'int64'),
    ...(bounds
      ? {
          firstKey: bounds.firstKey && int32(bounds.firstKey, [bounds.keyRuns, B, bounds.queries]),
          keyEnd: bounds.keyEnd && int32(bounds.keyEnd, [bounds.keyRuns, B]),
        }
      : { firstKey: firstKey && int32(firstKey, [B, S]), keyEnd: end && int32(end, [B]) }),
    numTokens: ownLabels ? ownLabels.reduce((sum, label) => sum + (label === ignored ? 0 : 1), 0) : 0,
    maxPosition,
    ...(context ? { context } : {}),
  }
}
