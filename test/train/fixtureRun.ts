// The tiny Llama of test/fixtures/training as a run: its weights, its batches, AdamW as the fixture's script has it.
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { type RunConfig, runConfig } from '../../lib/config/runConfig.js'
import type { RunData } from '../../lib/data/datasets.js'
import type { Dataset } from '../../lib/data/tokenDataset.js'
import type { TokenBatch } from '../../lib/models/batch.js'
import { readSafetensorsFile } from '../fixtures/safetensorsFile.js'

/** The fixture's folder. */
export const trainingFixture = join(dirname(fileURLToPath(import.meta.url)), '../fixtures/training')

const expected = readSafetensorsFile(join(trainingFixture, 'expected.safetensors'))

/** What PyTorch got. */
export const peerLosses = expected.get('loss')?.data as Float32Array
export const peerNorms = expected.get('grad_norm')?.data as Float32Array

const batches = expected.get('tokens') as { shape: readonly number[]; data: Float32Array }
const [steps = 0, batchSize = 0, width = 0] = batches.shape

/** Sample k is sequence k of the fixture's batches. */
const samples: Dataset = {
  length: steps * batchSize,
  sample: (index) => Int32Array.from(batches.data.subarray(index * width, (index + 1) * width)),
}

export const fixtureData: RunData = { train: samples, validation: samples, tokenizer: null, dispose() {} }

/** The fixture's batch of a step, cut into micro-batches; of those, the ones of a data-parallel rank. */
export function fixtureBatches(step: number, microBatchSize: number = batchSize, rank = 0, dp = 1): TokenBatch[] {
  const all: TokenBatch[] = []
  const S = width - 1
  for (let first = 0; first < batchSize; first += microBatchSize) {
    const tokens = new Int32Array(microBatchSize * S)
    const labels = new Int32Array(microBatchSize * S)
    for (let b = 0; b < microBatchSize; b++) {
      const sample = samples.sample(step * batchSize + first + b)
      tokens.set(sample.subarray(0, S), b * S)
      labels.set(sample.subarray(1), b * S)
    }
    all.push({ batchSize: microBatchSize, seqLength: S, tokens, labels })
  }
  return all.filter((_, m) => m % dp === rank)
}

/** The fixture's run; weights come from its folder. */
export async function fixtureConfig(
  changes: { tp?: number; trainIters?: number; microBatchSize?: number } = {},
): Promise<RunConfig> {
  const model = (await AutoBridge.fromHfPretrained(trainingFixture)).toMegatronProvider()
  model.tensorModelParallelSize = changes.tp ?? 1
  model.seqLength = width - 1
  return runConfig({
    model,
    mixedPrecision: 'fp32',
    train: {
      trainIters: changes.trainIters ?? steps,
      globalBatchSize: batchSize,
      microBatchSize: changes.microBatchSize ?? batchSize,
    },
    validation: { evalInterval: null, evalIters: 1 },
    optimizer: { lr: 3e-4, minLr: 0, adamBeta1: 0.9, adamBeta2: 0.95, adamEps: 1e-8, weightDecay: 0.1, clipGrad: 1 },
    scheduler: { lrDecayStyle: 'constant', lrWarmupIters: 0 },
  })
}
