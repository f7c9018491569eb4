// What two models compute, layer by layer: the same tokens through one, then through the other, in float32 on the CPU. Hidden states
// wait on the host, so that only one model's weights are in memory at a time.
import { ViaductError } from '../base/errors.js'
import type { HostTensor } from '../io/hostTensors.js'
import { type TokenBatch, uploadBatch } from '../models/batch.js'
import { defaultParallel } from '../parallel/config.js'
import { openModel, readBatch } from './logits.js'

/** Two computations by the same kernels differ only where weights or config do; a difference up to this share is called small. */
export const activationTolerance = 1e-5

/** One part's output on both sides. */
export interface LayerDifference {
  /** `embedding`, `decoder.layers.N`, `decoder.final_layernorm` or `logits`. */
  readonly place: string
  /** Largest magnitude on the first side. */
  readonly largest: number
  readonly maxDifference: number
  /** maxDifference over largest; infinite where a side is not finite and the other differs. */
  readonly relative: number
}

export interface ActivationComparison {
  readonly batchSize: number
  readonly seqLength: number
  readonly tolerance: number
  /** Parts that both models have, in their order. */
  readonly layers: readonly LayerDifference[]
  /** The first part whose difference exceeds the tolerance; null: none does. */
  readonly firstDivergent: string | null
  /** True where no element of any part differs. */
  readonly equal: boolean
}

export interface ActivationOptions {
  /** The tokens. Default: seeded ids. */
  readonly batch?: TokenBatch
  /** Which default ids. Default 0. */
  readonly seed?: number
  /** Default activationTolerance. */
  readonly tolerance?: number
}

/** int64 [2, 16], or shorter for a model of fewer positions: spread over the vocabulary, the same for everybody. */
export function seededTokens(
  { vocabSize, maxPositionEmbeddings }: { readonly vocabSize: number; readonly maxPositionEmbeddings: number },
  seed = 0,
): HostTensor {
  const S = Math.min(16, maxPositionEmbeddings)
  const ids = BigInt64Array.from({ length: 2 * S }, (_, i) => BigInt((7919 * (i + 2 * S * seed) + 3) % vocabSize))
  return { dtype: 'int64', shape: [2, S], bytes: new Uint8Array(ids.buffer) }
}

/**
 * Compares two models that run, each a Hugging Face folder or a checkpoint.
 * @param sizes - vocabulary and positions that both have, for the default ids.
 * @throws what opening the models throws, ERR_TOKEN_ID; ERR_UNSUPPORTED for a family that only converts.
 */
export async function compareActivations(
  a: string,
  b: string,
  sizes: { readonly vocabSize: number; readonly maxPositionEmbeddings: number },
  options: ActivationOptions = {},
): Promise<ActivationComparison> {
  const { seed, tolerance = activationTolerance } = options
  const batch = options.batch ?? readBatch(new Map([['input_ids', seededTokens(sizes, seed)]]), 'default ids')
  const left = await partsOf(a, batch)
  const right = await partsOf(b, batch)
  const layers: LayerDifference[] = []
  for (const [place, values] of left) {
    const other = right.get(place)
    if (other?.length === values.length) layers.push({ place, ...difference(values, other) })
  }
  return {
    batchSize: batch.batchSize,
    seqLength: batch.seqLength,
    tolerance,
    layers,
    firstDivergent: layers.find(({ relative }) => !(relative <= tolerance))?.place ?? null,
    equal: left.size === right.size && layers.length === left.size && layers.every((l) => l.maxDifference === 0),
  }
}

/** Hidden states behind each part, and the logits, as float32. */
async function partsOf(dir: string, batch: TokenBatch): Promise<Map<string, Float32Array>> {
  const { model } = await openModel(dir, { parallel: defaultParallel, dtype: 'float32', device: 'cpu' })
  const parts = new Map<string, Float32Array>()
  const ctx = model.ctx()
  try {
    model.training = false
    const [chunk] = model.chunks
    if (chunk === undefined) throw new ViaductError('ERR_ASSERT', 'activations', 'expected a model with a chunk')
    const logits = await chunk.forward(ctx, uploadBatch(ctx, batch, chunk.config), undefined, async (place, hidden) => {
      const values = await hidden.x.toFloat32Array()
      const rest = await hidden.residual?.toFloat32Array()
      parts.set(place, rest ? values.map((value, i) => value + (rest[i] as number)) : values)
    })
    parts.set('logits', await chunk.gatherLogits(ctx, logits))
    return parts
  } finally {
    ctx.scope.close()
    await model.dispose()
  }
}

function difference(a: Float32Array, b: Float32Array): Omit<LayerDifference, 'place'> {
  let [largest, most] = [0, 0]
  a.forEach((x, i) => {
    const y = b[i] as number
    if (Number.isFinite(x)) largest = Math.max(largest, Math.abs(x))
    if (Object.is(x, y) || x === y) return
    const d = Math.abs(x - y)
    most = Math.max(most, Number.isNaN(d) ? Number.POSITIVE_INFINITY : d)
  })
  return { largest, maxDifference: most, relative: most === 0 ? 0 : most / largest }
}
