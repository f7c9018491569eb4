// From logits to a token: temperature, then top-k, then top-p, as Transformers orders them. Float64 on the host.
import { ViaductError } from '../base/errors.js'

export interface SamplingOptions {
  /** Divides the logits; 0 is greedy. Default 0. */
  readonly temperature?: number
  /** Keep the k likeliest tokens (and ties with the last of them). Default: all. */
  readonly topK?: number
  /** Keep the likeliest tokens until their shares reach p, (0, 1]. Default 1. */
  readonly topP?: number
}

/** @throws ERR_USAGE naming the option that is out of range. */
export function checkSampling({ temperature = 0, topK, topP }: SamplingOptions): void {
  const fail = (text: string) => new ViaductError('ERR_USAGE', 'generate', text)
  if (!(temperature >= 0 && Number.isFinite(temperature)))
    throw fail(`expected a temperature of 0 or more, got ${temperature}`)
  if (topK !== undefined && !(Number.isInteger(topK) && topK >= 1))
    throw fail(`expected topK to be a whole number of at least 1, got ${topK}`)
  if (topP !== undefined && !(topP > 0 && topP <= 1)) throw fail(`expected topP above 0 and at most 1, got ${topP}`)
}

/**
 * Draws a token.
 * @param logits - of the whole vocabulary.
 * @param uniform - a number of [0, 1) that decides.
 */
export function sampleToken(logits: Float32Array, options: SamplingOptions, uniform: number): number {
  const temperature = options.temperature ?? 0
  if (temperature === 0) return argmax(logits)
  const order = Array.from(logits.keys()).sort((a, b) => (logits[b] as number) - (logits[a] as number) || a - b)
  let kept = order.length
  if (options.topK !== undefined && options.topK < kept) {
    const last = logits[order[options.topK - 1] as number] as number
    kept = options.topK
    while (kept < order.length && logits[order[kept] as number] === last) kept++
  }
  const top = (logits[order[0] as number] as number) / temperature
  const weights = order.slice(0, kept).map((id) => Math.exp((logits[id] as number) / temperature - top))
  let total = weights.reduce((a, b) => a + b, 0)
  if (options.topP !== undefined && options.topP < 1) {
    let sum = 0
    let count = 0
    while (count < weights.length && sum < options.topP * total) sum += weights[count++] as number
    weights.length = Math.max(1, count)
    total = weights.reduce((a, b) => a + b, 0)
  }
  let left = uniform * total
  for (let i = 0; i < weights.length; i++) {
    left -= weights[i] as number
    if (left < 0) return order[i] as number
  }
  return order[weights.length - 1] as number
}

/** The first of the largest. */
export function argmax(values: Float32Array): number {
  let best = 0
  for (let i = 1; i < values.length; i++) if ((values[i] as number) > (values[best] as number)) best = i
  return best
}
