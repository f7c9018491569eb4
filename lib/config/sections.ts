// The sections of a RunConfig: what each field means, its default, and which values it takes. Names are Megatron-Core's and
// Megatron-Bridge's in camelCase. What holds between fields of different sections is checked in resolve.ts.
import { z } from 'zod'

/** How long to train, and on how much at a time. */
export interface TrainSection {
  /** Steps in all; a resumed run goes on to this number. */
  trainIters: number
  /** Sequences a step, over all ranks. */
  globalBatchSize: number
  /** Sequences that one rank runs forward and backward at once. */
  microBatchSize: number
  /** On SIGTERM: finish the step, save, exit with 143 (128 + 15). */
  exitSignalHandler: boolean
  /** Stop after a step that this number divides; null: never. */
  exitInterval: number | null
  /** Stop after this many minutes; null: never. */
  exitDurationInMins: number | null
  /** What to do when the gradients of a step are not finite: `stop` with an error that names parameter and rank, or `skip` the update. */
  nonFiniteGrads: 'stop' | 'skip'
}

/** When to measure the loss on held-out data. */
export interface ValidationSection {
  /** Steps between measurements; null: never. */
  evalInterval: number | null
  /** Global batches a measurement; 0: none. */
  evalIters: number
}

/** AdamW and clipping. */
export interface OptimizerSection {
  optimizer: 'adam'
  /** Highest learning rate. */
  lr: number
  /** Lowest learning rate, at the end of the decay. */
  minLr: number
  adamBeta1: number
  adamBeta2: number
  adamEps: number
  /** Decoupled decay of matrices; norms and biases have none. */
  weightDecay: number
  /** Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping. */
  clipGrad: number
  /** Moments and master weights lie in the host's memory, and the host updates the parameters. The same bits on CPUs. */
  optimizerCpuOffload: boolean
  /** optimizerCpuOffload: the share of the state and of the updates that the host takes, [0, 1]. */
  optimizerOffloadFraction: number
}

/** How data-parallel ranks share gradients and optimizer state. Results are the same bits whatever is chosen here. */
export interface DdpSection {
  /** Each rank has moments and master weights of its share of the parameters only, updates it and gives it to the others. */
  useDistributedOptimizer: boolean
  /** Gradients are summed bucket by bucket beside the last backward pass. */
  overlapGradReduce: boolean
  /** Updated parameters travel beside the next step's first forward pass; needs useDistributedOptimizer. */
  overlapParamGather: boolean
  /** Elements from which on a bucket is full; null: 40 million, more where more than 40 ranks share it. */
  bucketSize: number | null
  /** Gradients are kept and summed in float32; there is no other way. */
  gradReduceInFp32: true
  /**
   * Fully sharded: each rank has its share of weights, gradients and optimizer state; a layer is whole while it is used alone.
   * Gradients are summed after each micro-batch, so results are the bits of the sharded optimizer where a step has one of them.
   */
  useMegatronFsdp: boolean
  /** useMegatronFsdp: what is sharded. Less than all of it is useDistributedOptimizer alone. */
  dataParallelShardingStrategy: 'no_shard' | 'optim' | 'optim_grads' | 'optim_grads_params'
  /** useMegatronFsdp: weights are released after the forward pass and gathered again for the backward pass; false: they stay. */
  reshardAfterForward: boolean
}

/** The learning rate over the steps; see `learningRate` in lib/optim. */
export interface SchedulerSection {
  lrDecayStyle: 'constant' | 'linear' | 'cosine' | 'inverse-square-root' | 'WSD'
  /** Steps of linear warm-up. */
  lrWarmupIters: number
  /** Warm-up as a share of the decay, [0, 1), instead of steps; null: by steps. */
  lrWarmupFraction: number | null
  /** Learning rate at the beginning of the warm-up. */
  lrWarmupInit: number
  /** Step at which minLr is reached; null: train.trainIters. */
  lrDecayIters: number | null
  /** WSD: length of the final decay, in steps. */
  lrWsdDecayIters: number | null
  lrWsdDecayStyle: 'exponential' | 'linear' | 'cosine' | 'minus_sqrt'
}

/** What to train on. */
export interface DatasetSection {
  /** `mock`: repeatable synthetic tokens; `text`: text files; `indexed`: a Megatron .bin/.idx pair. */
  kind: 'mock' | 'text' | 'indexed'
  /** text: files or folders; indexed: path without the extension. */
  path: string | string[] | null
  /** Tokens a sequence; null: model.seqLength, which it has to equal. */
  seqLength: number | null
  /** Shares of training, validation and test data, e.g. `99,1,0`. */
  split: string
  /** Seed of the split and of mock data; the order of samples comes from rng.seed. */
  randomSeed: number
}

/** How text becomes tokens. */
export interface TokenizerSection {
  /** `NullTokenizer`: data are token ids already. */
  tokenizerType: 'NullTokenizer' | 'HuggingFaceTokenizer'
  /** Folder with tokenizer.json. */
  tokenizerModel: string | null
  /** Number of tokens; null: the tokenizer's, else the model's. At most model.vocabSize. */
  vocabSize: number | null
}

/** Where training is saved and continued. */
export interface CheckpointSection {
  /** Folder to save to; null: nothing is saved. */
  save: string | null
  /** Checkpoint to continue from, if the folder holds one; null: from the beginning. */
  load: string | null
  /** Steps between saves; null: only at the end. */
  saveInterval: number | null
  /** Newest checkpoints to keep; null: all. */
  mostRecentK: number | null
  /** Save and load the optimizer's state. */
  saveOptim: boolean
  loadOptim: boolean
  /** Step to load; null: the newest. */
  ckptStep: number | null
  /** Weights to start from when `load` holds no checkpoint: one of our checkpoints or a Hugging Face folder. */
  pretrainedCheckpoint: string | null
  /** An error instead of a fresh start when `load` holds no checkpoint. */
  exitOnMissingCheckpoint: boolean
}

/** What is told about a run. */
export interface LoggerSection {
  /** Steps between lines. */
  logInterval: number
  /** File to which each step is appended as a line of JSON; null: none. */
  metricsFile: string | null
}

/** Seeds. */
export interface RngSection {
  /** Initial weights, dropout and order of samples. */
  seed: number
}

/** How ranks talk. */
export interface DistSection {
  /** null: nccl on GPUs, gloo on CPUs. */
  backend: 'gloo' | 'nccl' | null
  /** Longest wait of a collective. */
  distributedTimeoutMinutes: number
}

/** bf16_mixed: bfloat16 parameters and activations, float32 master weights, gradients and moments. null: as the model says. */
export type MixedPrecision = 'bf16_mixed' | 'fp32' | null

/** The plain sections by name; `model` and `mixedPrecision` stand beside them in RunConfig. */
export interface Sections {
  train: TrainSection
  validation: ValidationSection
  optimizer: OptimizerSection
  ddp: DdpSection
  scheduler: SchedulerSection
  dataset: DatasetSection
  tokenizer: TokenizerSection
  checkpoint: CheckpointSection
  logger: LoggerSection
  rng: RngSection
  dist: DistSection
}

export type SectionName = keyof Sections

const count = z.int().min(1)
const countOrNone = count.nullable()
const seed = z.int().min(0)
const positive = z.number().positive()
const notNegative = z.number().min(0)
const share = z.number().min(0).lt(1)
const path = z.string().min(1).nullable()

/** Which values each field takes. */
export const schemas: { readonly [K in SectionName]: z.ZodType<Sections[K]> } = {
  train: z.strictObject({
    trainIters: count,
    globalBatchSize: count,
    microBatchSize: count,
    exitSignalHandler: z.boolean(),
    exitInterval: countOrNone,
    exitDurationInMins: positive.nullable(),
    nonFiniteGrads: z.enum(['stop', 'skip']),
  }),
  validation: z.strictObject({ evalInterval: countOrNone, evalIters: z.int().min(0) }),
  optimizer: z.strictObject({
    optimizer: z.literal('adam'),
    lr: positive,
    minLr: notNegative,
    adamBeta1: share,
    adamBeta2: share,
    adamEps: positive,
    weightDecay: notNegative,
    clipGrad: notNegative,
    optimizerCpuOffload: z.boolean(),
    optimizerOffloadFraction: z.number().min(0).max(1),
  }),
  ddp: z.strictObject({
    useDistributedOptimizer: z.boolean(),
    overlapGradReduce: z.boolean(),
    overlapParamGather: z.boolean(),
    bucketSize: countOrNone,
    gradReduceInFp32: z.literal(true),
    useMegatronFsdp: z.boolean(),
    dataParallelShardingStrategy: z.enum(['no_shard', 'optim', 'optim_grads', 'optim_grads_params']),
    reshardAfterForward: z.boolean(),
  }),
  scheduler: z.strictObject({
    lrDecayStyle: z.enum(['constant', 'linear', 'cosine', 'inverse-square-root', 'WSD']),
    lrWarmupIters: z.int().min(0),
    lrWarmupFraction: share.nullable(),
    lrWarmupInit: notNegative,
    lrDecayIters: countOrNone,
    lrWsdDecayIters: countOrNone,
    lrWsdDecayStyle: z.enum(['exponential', 'linear', 'cosine', 'minus_sqrt']),
  }),
  dataset: z.strictObject({
    kind: z.enum(['mock', 'text', 'indexed']),
    path: z.union([z.string().min(1), z.array(z.string().min(1)).min(1), z.null()]),
    seqLength: countOrNone,
    split: z.string().regex(/^\d+(\.\d+)?(,\d+(\.\d+)?){0,2}$/, 'expected shares like 99,1 or 9999,8,2'),
    randomSeed: seed,
  }),
  tokenizer: z.strictObject({
    tokenizerType: z.enum(['NullTokenizer', 'HuggingFaceTokenizer']),
    tokenizerModel: path,
    vocabSize: countOrNone,
  }),
  checkpoint: z.strictObject({
    save: path,
    load: path,
    saveInterval: countOrNone,
    mostRecentK: countOrNone,
    saveOptim: z.boolean(),
    loadOptim: z.boolean(),
    ckptStep: z.int().min(0).nullable(),
    pretrainedCheckpoint: path,
    exitOnMissingCheckpoint: z.boolean(),
  }),
  logger: z.strictObject({ logInterval: count, metricsFile: path }),
  rng: z.strictObject({ seed }),
  dist: z.strictObject({ backend: z.enum(['gloo', 'nccl']).nullable(), distributedTimeoutMinutes: positive }),
}

/** Values of everything that a recipe does not set. */
export const defaults: Sections = {
  train: {
    trainIters: 300000,
    globalBatchSize: 32,
    microBatchSize: 2,
    exitSignalHandler: true,
    exitInterval: null,
    exitDurationInMins: null,
    nonFiniteGrads: 'stop',
  },
  validation: { evalInterval: 500, evalIters: 32 },
  optimizer: {
    optimizer: 'adam',
    lr: 3e-4,
    minLr: 3e-5,
    adamBeta1: 0.9,
    adamBeta2: 0.95,
    adamEps: 1e-5,
    weightDecay: 0.1,
    clipGrad: 1,
    optimizerCpuOffload: false,
    optimizerOffloadFraction: 1,
  },
  ddp: {
    useDistributedOptimizer: true,
    overlapGradReduce: true,
    overlapParamGather: true,
    bucketSize: null,
    gradReduceInFp32: true,
    useMegatronFsdp: false,
    dataParallelShardingStrategy: 'optim_grads_params',
    reshardAfterForward: true,
  },
  scheduler: {
    lrDecayStyle: 'cosine',
    lrWarmupIters: 0,
    lrWarmupFraction: null,
    lrWarmupInit: 0,
    lrDecayIters: null,
    lrWsdDecayIters: null,
    lrWsdDecayStyle: 'exponential',
  },
  dataset: { kind: 'mock', path: null, seqLength: null, split: '9999,8,2', randomSeed: 1234 },
  tokenizer: { tokenizerType: 'NullTokenizer', tokenizerModel: null, vocabSize: null },
  checkpoint: {
    save: null,
    load: null,
    saveInterval: null,
    mostRecentK: null,
    saveOptim: true,
    loadOptim: true,
    ckptStep: null,
    pretrainedCheckpoint: null,
    exitOnMissingCheckpoint: false,
  },
  logger: { logInterval: 1, metricsFile: null },
  rng: { seed: 1234 },
  dist: { backend: null, distributedTimeoutMinutes: 10 },
}
