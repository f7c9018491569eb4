// Llama recipes: functions that return a RunConfig. Names and numbers of the big ones are Megatron-Bridge's; the model's
// fields stand here as data, so that no hub is asked. Change a recipe by assigning to what it returns: `cfg.model.recomputeGranularity`
// and its neighbours, for one, trade time for memory; recipes keep all activations.
import type { RunConfig } from '../lib/config/runConfig.js'
import { GPTModelProvider } from '../lib/models/provider.js'
import { onLaptop, pretrainCommon } from './pretraining.js'

/**
 * Pretraining of Llama 3.2 1B: 16 layers of 2048, sequences of 8192, 512 of them a step, 1168251 steps; TP 1. Mock data until
 * `dataset` says otherwise. Weight decay is 0.033: upstream's scheduler replaces the optimizer's 0.1 by it.
 */
export function llama32_1b_pretrain_config(): RunConfig {
  const cfg = pretrainCommon(
    new GPTModelProvider({
      numLayers: 16,
      hiddenSize: 2048,
      ffnHiddenSize: 8192,
      numAttentionHeads: 32,
      numQueryGroups: 8,
      kvChannels: 64,
      vocabSize: 128256,
      maxPositionEmbeddings: 131072,
      rotaryBase: 500000,
      ropeScaling: {
        type: 'llama3',
        factor: 32,
        lowFreqFactor: 1,
        highFreqFactor: 4,
        originalMaxPositionEmbeddings: 8192,
      },
      layernormEpsilon: 1e-5,
      shareEmbeddingsAndOutputWeights: true,
      paramsDtype: 'bfloat16',
      seqLength: 8192,
    }),
  )
  cfg.train.trainIters = 1168251
  cfg.train.globalBatchSize = 512
  cfg.train.microBatchSize = 1
  cfg.validation.evalInterval = 2000
  cfg.scheduler.lrWarmupIters = 2000
  return cfg
}

/**
 * A Llama for a laptop's CPU: float32, 0.7 million parameters, 3 layers of 128, sequences of 128; learns the look of a text in
 * about a minute on two cores. Mock data until `dataset` and `tokenizer` say otherwise. The initial weights are larger than the
 * usual 0.02, which suits layers of thousands of channels: at 128 it makes the first hundred steps idle.
 */
export function llama_tiny_cpu_pretrain_config(): RunConfig {
  const cfg = pretrainCommon(
    new GPTModelProvider({
      numLayers: 3,
      hiddenSize: 128,
      ffnHiddenSize: 384,
      numAttentionHeads: 4,
      numQueryGroups: 2,
      kvChannels: 32,
      vocabSize: 1024,
      maxPositionEmbeddings: 512,
      rotaryBase: 10000,
      shareEmbeddingsAndOutputWeights: true,
      initMethodStd: 0.06,
      paramsDtype: 'float32',
      seqLength: 128,
    }),
  )
  return onLaptop(cfg)
}
