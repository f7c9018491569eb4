// Batches for training and evaluation. Place p of the run reads sample order(p); step i of a global batch G reads places
// i·G to (i+1)·G - 1, cut into micro-batches by place alone. So a micro-batch is the same set of samples at any data-parallel
// size, and the state of a loader is one number: samples consumed so far.
import { ViaductError } from '../base/errors.js'
import type { TokenBatch } from '../models/batch.js'
import { sampleAt } from './sampleOrder.js'
import type { Dataset } from './tokenDataset.js'

export interface LoaderOptions {
  readonly dataset: Dataset
  /** Sequences a step, over all ranks. */
  readonly globalBatchSize: number
  readonly microBatchSize: number
  /** This rank's place along the data-parallel axis, and its size. */
  readonly dataParallelRank: number
  readonly dataParallelSize: number
  /** Shuffles each epoch; null reads in the dataset's order. */
  readonly seed: number | null
  /** Token whose label is not counted, e.g. padding; null: every label counts. */
  readonly ignoredLabel?: number | null
}

/** What a checkpoint keeps of a loader. */
export interface LoaderState {
  readonly consumedSamples: number
}

export class BatchLoader {
  #consumed = 0

  /** @throws ERR_CONFIG when the global batch does not divide. */
  constructor(readonly options: LoaderOptions) {
    const { globalBatchSize, microBatchSize, dataParallelSize } = options
    if (globalBatchSize % (microBatchSize * dataParallelSize) === 0) return
    throw new ViaductError(
      'ERR_CONFIG',
      'loader',
      `globalBatchSize=${globalBatchSize} must be divisible by microBatchSize=${microBatchSize} times ${dataParallelSize} data-parallel ranks`,
    )
  }

  /** Samples that all ranks together have read. */
  get consumedSamples(): number {
    return this.#consumed
  }

  state(): LoaderState {
    return { consumedSamples: this.#consumed }
  }

  restore(state: LoaderState): void {
    this.#consumed = state.consumedSamples
  }

  /** This rank's micro-batches of the next step: number m is the global batch's micro-batch m·dp + rank. */
  next(): TokenBatch[] {
    const { globalBatchSize, microBatchSize, dataParallelRank, dataParallelSize } = this.options
    const batches: TokenBatch[] = []
    for (
      let first = dataParallelRank * microBatchSize;
      first < globalBatchSize;
      first += microBatchSize * dataParallelSize
    ) {
      batches.push(this.#microBatch(this.#consumed + first))
    }
    this.#consumed += globalBatchSize
    return batches
  }

  #microBatch(place: number): TokenBatch {
    const { dataset, microBatchSize: B, seed, ignoredLabel } = this.options
    const samples = Array.from({ length: B }, (_, b) =>
      dataset.sample(seed === null ? (place + b) % dataset.length : sampleAt(place + b, dataset.length, seed)),
    )
    // Each micro-batch is as long as its longest sample; behind a shorter one nothing is seen or counted.
    const S = Math.max(...samples.map((sample) => sample.length)) - 1
    const tokens = new Int32Array(B * S)
    const labels = new Int32Array(B * S).fill(-100)
    samples.forEach((sample, b) => {
      tokens.set(sample.subarray(0, -1), b * S)
      labels.set(sample.subarray(1), b * S)
    })
    if (ignoredLabel !== null && ignoredLabel !== undefined) {
      for (let t = 0; t < labels.length; t++) if (labels[t] === ignoredLabel) labels[t] = -100
    }
    return {
      batchSize: B,
      seqLength: S,
      tokens,
      labels,
      sampleIds: BigInt64Array.from({ length: B }, (_, b) => BigInt(place + b)),
    }
  }
}
