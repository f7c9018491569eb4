// Token streams cut into samples of seqLength + 1 tokens: inputs and, shifted by one, labels. Streams come from memory, text
// files or Megatron's indexed files; splits are ranges of a stream. Order and batches live in loader.ts.
import { ViaductError } from '../base/errors.js'
import { mix32 } from './sampleOrder.js'

/** Random access to samples of token ids. */
export interface Dataset {
  readonly length: number
  /** Tokens of a sample: seqLength + 1 of them, or fewer where samples have lengths of their own. */
  sample(index: number): Int32Array
}

/** A stream of tokens. */
export interface TokenStream {
  /** Tokens in all. */
  readonly length: number
  /** `count` tokens from `start`. */
  read(start: number, count: number): Int32Array
}

/** A stream that lies in memory. */
export class MemoryTokens implements TokenStream {
  constructor(readonly tokens: Int32Array) {}

  get length(): number {
    return this.tokens.length
  }

  read(start: number, count: number): Int32Array {
    return this.tokens.subarray(start, start + count)
  }
}

/** Consecutive samples of a range of a stream; neighbours share one token, so that each token is a label once. */
export class TokenDataset implements Dataset {
  readonly length: number

  /**
   * @param seqLength - inputs a sample.
   * @param start - first token of the range. Default 0.
   * @param end - behind the last token. Default: the end of the stream.
   * @throws ERR_DATA when the range is shorter than one sample.
   */
  constructor(
    readonly stream: TokenStream,
    readonly seqLength: number,
    readonly start = 0,
    readonly end = stream.length,
  ) {
    this.length = Math.max(0, Math.floor((end - start - 1) / seqLength))
    if (this.length > 0) return
    throw new ViaductError(
      'ERR_DATA',
      'dataset',
      `expected at least ${seqLength + 1} tokens for one sequence, got ${end - start}: give more text, or shorten model.seqLength`,
    )
  }

  sample(index: number): Int32Array {
    if (index < 0 || index >= this.length) {
      throw new ViaductError('ERR_DATA', 'dataset', `expected a sample of 0 to ${this.length - 1}, got ${index}`)
    }
    return this.stream.read(this.start + index * this.seqLength, this.seqLength + 1)
  }
}

/**
 * Synthetic samples that need no file, as recipes use them: ramps of consecutive ids, 1 to vocabSize - 1 around, each begun at
 * a place drawn from (seed, sample) and cut by id 0 at lengths drawn likewise. A model learns them in a few hundred steps.
 */
export class MockDataset implements Dataset {
  constructor(
    readonly vocabSize: number,
    readonly seqLength: number,
    readonly seed: number,
    readonly length = 2 ** 20,
  ) {}

  sample(index: number): Int32Array {
    const tokens = new Int32Array(this.seqLength + 1)
    const ids = Math.max(1, this.vocabSize - 1)
    let ramp = 0
    let left = 0
    let next = 0
    for (let i = 0; i < tokens.length; i++) {
      if (left === 0) {
        next = mix32(this.seed, index, 2 * ramp) % ids
        left = 2 + (mix32(this.seed, index, 2 * ramp + 1) % Math.max(2, this.seqLength))
        ramp++
      }
      left--
      tokens[i] = left === 0 || this.vocabSize < 2 ? 0 : 1 + next
      next = (next + 1) % ids
    }
    return tokens
  }
}

/** Entropy of the distribution of single tokens, in nats: the loss of the best guess that looks at nothing. */
export function unigramEntropy(tokens: Iterable<number>): number {
  const counts = new Map<number, number>()
  let total = 0
  for (const token of tokens) {
    counts.set(token, (counts.get(token) ?? 0) + 1)
    total++
  }
  let entropy = 0
  for (const count of counts.values()) entropy -= (count / total) * Math.log(count / total)
  return entropy
}

/** Shares like `9999,8,2` as three numbers that add up to 1. */
export function splitShares(split: string): [number, number, number] {
  const shares = split.split(',').map(Number)
  const total = shares.reduce((a, b) => a + b, 0)
  return [(shares[0] ?? 0) / total, (shares[1] ?? 0) / total, (shares[2] ?? 0) / total]
}
