// Recipes of mixtures of experts: Qwen3-MoE, OLMoE, Mixtral. The models' fields are those of the published configs, layouts and numbers
// of the big ones Megatron-Bridge's; see llama.ts for how to change a recipe.
import type { RunConfig } from '../lib/config/runConfig.js'
import { GPTModelProvider, type ProviderInit } from '../lib/models/provider.js'
import { onLaptop, pretrainCommon } from './pretraining.js'

/** Pretraining of Qwen3 30B-A3B: 48 layers of 2048, 8 of 128 experts, sequences of 4096; TP 4 with sequence parallelism, PP 2, EP 4. */
export function qwen3_30b_a3b_pretrain_config(): RunConfig {
  const cfg = pretrainCommon(
    new GPTModelProvider({
      numLayers: 48,
      hiddenSize: 2048,
      ffnHiddenSize: 6144,
      numAttentionHeads: 32,
      numQueryGroups: 4,
      kvChannels: 128,
      vocabSize: 151936,
      maxPositionEmbeddings: 40960,
      rotaryBase: 1_000_000,
      layernormEpsilon: 1e-6,
      qkLayernorm: 'perHead',
      numMoeExperts: 128,
      moeRouterTopk: 8,
      moeFfnHiddenSize: 768,
      moeRouterLoadBalancingType: 'aux_loss',
      moeAuxLossCoeff: 1e-3,
      paramsDtype: 'bfloat16',
      seqLength: 4096,
      tensorModelParallelSize: 4,
      sequenceParallel: true,
      pipelineModelParallelSize: 2,
      expertModelParallelSize: 4,
      recomputeGranularity: 'full',
      recomputeMethod: 'uniform',
      recomputeNumLayers: 1,
    }),
  )
  cfg.train.microBatchSize = 1
  return cfg
}

/** Pretraining of Qwen1.5 MoE A2.7B: 24 layers of 2048, 4 of 60 experts beside a shared one, sequences of 4096; EP 4. */
export function qwen15_moe_a2_7b_pretrain_config(): RunConfig {
  const cfg = pretrainCommon(
    new GPTModelProvider({
      numLayers: 24,
      hiddenSize: 2048,
      ffnHiddenSize: 5632,
      numAttentionHeads: 16,
      numQueryGroups: 16,
      kvChannels: 128,
      vocabSize: 151936,
      maxPositionEmbeddings: 8192,
      rotaryBase: 1_000_000,
      layernormEpsilon: 1e-6,
      addQkvBias: true,
      numMoeExperts: 60,
      moeRouterTopk: 4,
      moeFfnHiddenSize: 1408,
      moeSharedExpertIntermediateSize: 5632,
      moeSharedExpertGate: true,
      moeRouterPreSoftmax: true,
      moeRouterLoadBalancingType: 'aux_loss',
      moeAuxLossCoeff: 1e-3,
      paramsDtype: 'bfloat16',
      seqLength: 4096,
      expertModelParallelSize: 4,
      recomputeGranularity: 'full',
      recomputeMethod: 'uniform',
      recomputeNumLayers: 1,
    }),
  )
  cfg.train.microBatchSize = 1
  return cfg
}

/** Pretraining of OLMoE 1B-7B: 16 layers of 2048, 8 of 64 experts, sequences of 4096; EP 8. */
export function olmoe_7b_pretrain_config(): RunConfig {
  const cfg = pretrainCommon(
    new GPTModelProvider({
      numLayers: 16,
      hiddenSize: 2048,
      ffnHiddenSize: 1024,
      numAttentionHeads: 16,
      numQueryGroups: 16,
      kvChannels: 128,
      vocabSize: 50304,
      maxPositionEmbeddings: 4096,
      rotaryBase: 10_000,
      layernormEpsilon: 1e-5,
      qkLayernorm: 'allHeads',
      numMoeExperts: 64,
      moeRouterTopk: 8,
      moeFfnHiddenSize: 1024,
      moeRouterPreSoftmax: true,
      moeRouterLoadBalancingType: 'seq_aux_loss',
      moeAuxLossCoeff: 1e-2,
      paramsDtype: 'bfloat16',
      seqLength: 4096,
      expertModelParallelSize: 8,
    }),
  )
  cfg.train.globalBatchSize = 2048
  cfg.train.microBatchSize = 1
  return cfg
}

/** Mixtral's layers: 2 of 8 experts as wide as a dense model's feed-forward, no window. */
function mixtral(
  size: Required<Pick<ProviderInit, 'numLayers' | 'hiddenSize' | 'ffnHiddenSize' | 'numAttentionHeads'>>,
) {
  return {
    ...size,
    numQueryGroups: 8,
    kvChannels: 128,
    moeFfnHiddenSize: size.ffnHiddenSize,
    rotaryBase: 1_000_000,
    layernormEpsilon: 1e-5,
    numMoeExperts: 8,
    moeRouterTopk: 2,
    moeRouterLoadBalancingType: 'aux_loss' as const,
    moeAuxLossCoeff: 2e-2,
    paramsDtype: 'bfloat16' as const,
    seqLength: 4096,
    expertModelParallelSize: 8,
  }
}

/** Pretraining of Mixtral 8x7B: 32 layers of 4096, sequences of 4096; PP 4, EP 8. */
export function mixtral_8x7b_pretrain_config(): RunConfig {
  const size = { numLayers: 32, hiddenSize: 4096, ffnHiddenSize: 14_336, numAttentionHeads: 32 }
  const cfg = pretrainCommon(
    new GPTModelProvider({
      ...mixtral(size),
      vocabSize: 32_000,
      maxPositionEmbeddings: 32_768,
      pipelineModelParallelSize: 4,
    }),
  )
  cfg.train.globalBatchSize = 256
  cfg.train.microBatchSize = 1
  return cfg
}

/** Pretraining of Mixtral 8x22B: 56 layers of 6144, sequences of 4096; TP 2 with sequence parallelism, PP 8, EP 8. */
export function mixtral_8x22b_pretrain_config(): RunConfig {
  const size = { numLayers: 56, hiddenSize: 6144, ffnHiddenSize: 16_384, numAttentionHeads: 48 }
  const cfg = pretrainCommon(
    new GPTModelProvider({
      ...mixtral(size),
      vocabSize: 32_000,
      maxPositionEmbeddings: 65_536,
      tensorModelParallelSize: 2,
      sequenceParallel: true,
      pipelineModelParallelSize: 8,
    }),
  )
  cfg.train.globalBatchSize = 256
  cfg.train.microBatchSize = 1
  return cfg
}

/**
 * A Qwen3-MoE for a laptop's CPU: float32, 1.4 million parameters, 3 layers of 128 with 2 of 8 experts; learns the look of a text in
 * about a minute on two cores. Mock data until `dataset` and `tokenizer` say otherwise.
 */
export function qwen3_moe_tiny_cpu_pretrain_config(): RunConfig {
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
      rotaryBase: 10_000,
      qkLayernorm: 'perHead',
      numMoeExperts: 8,
      moeRouterTopk: 2,
      moeFfnHiddenSize: 128,
      moeRouterLoadBalancingType: 'aux_loss',
      moeAuxLossCoeff: 1e-2,
      shareEmbeddingsAndOutputWeights: true,
      initMethodStd: 0.06,
      paramsDtype: 'float32',
      seqLength: 128,
    }),
  )
  return onLaptop(cfg)
}
