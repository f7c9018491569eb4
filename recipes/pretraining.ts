// What pretraining recipes of all families have in common, as data: changed by whoever calls.
import { type RunConfig, runConfig } from '../lib/config/runConfig.js'
import type { GPTModelProvider } from '../lib/models/provider.js'

/** What Megatron-Bridge's pretraining recipes have in common: bfloat16, AdamW, cosine, mock data. */
export function pretrainCommon(model: GPTModelProvider): RunConfig {
  return runConfig({
    model,
    train: { trainIters: 300000, globalBatchSize: 32, microBatchSize: 2 },
    validation: { evalInterval: 500, evalIters: 32 },
    optimizer: {
      lr: 3e-4,
      minLr: 3e-5,
      adamBeta1: 0.9,
      adamBeta2: 0.95,
      adamEps: 1e-5,
      weightDecay: 0.033,
      clipGrad: 1,
    },
    scheduler: { lrDecayStyle: 'cosine', lrWarmupIters: 500, lrWarmupInit: 0, lrDecayIters: null },
    dataset: { kind: 'mock', split: '9999,8,2', randomSeed: 1234 },
    tokenizer: { tokenizerType: 'NullTokenizer' },
    checkpoint: {
      save: 'nemo_experiments/default/checkpoints',
      load: 'nemo_experiments/default/checkpoints',
      saveInterval: 500,
    },
    logger: { logInterval: 10 },
    rng: { seed: 1234 },
    mixedPrecision: 'bf16_mixed',
  })
}

/** Makes of it a run for a laptop's CPU: float32, about a minute, nothing saved. */
export function onLaptop(cfg: RunConfig): RunConfig {
  cfg.mixedPrecision = 'fp32'
  cfg.train.trainIters = 260
  cfg.train.globalBatchSize = 8
  cfg.train.microBatchSize = 8
  cfg.validation.evalInterval = 65
  cfg.validation.evalIters = 8
  cfg.optimizer.lr = 5e-3
  cfg.optimizer.minLr = 5e-4
  cfg.optimizer.adamEps = 1e-8
  // A share, so that shorter and longer runs warm up in proportion.
  cfg.scheduler.lrWarmupIters = 0
  cfg.scheduler.lrWarmupFraction = 0.1
  cfg.dataset.split = '95,5'
  cfg.checkpoint.save = null
  cfg.checkpoint.load = null
  cfg.checkpoint.saveInterval = null
  cfg.logger.logInterval = 1
  return cfg
}
