// Qwen2-MoE, Qwen1.5-MoE (Qwen2MoeForCausalLM): beside its experts each token passes a shared one, weighed by a gate; dense layers may
// stand between those with experts; queries, keys and values have biases.
import { defineFamily, expertFields, readDenseLayers, readExperts, writeDenseLayers } from '../decoderFamily.js'
import { attentionRules, denseRules, expertRules, outerRules, sharedExpertRules } from '../decoderRules.js'

const experts = ['num_experts', 'num_local_experts']

/** The Qwen2-MoE family. */
export const qwen2Moe = defineFamily({
  architecture: 'Qwen2MoeForCausalLM',
  modelType: 'qwen2_moe',
  runs: true,
  absent: { maxPositionEmbeddings: 32_768, layernormEpsilon: 1e-6, rotaryBase: 10_000 },
  fields: [
    ['kvChannels', 'head_dim'],
    ['addQkvBias', 'qkv_bias'],
    ['moeFfnHiddenSize', 'moe_intermediate_size'],
    ['moeSharedExpertIntermediateSize', 'shared_expert_intermediate_size'],
    ...expertFields(experts),
  ],
  read(read, common) {
    // Transformers gives every other layer a window; ours have all the same.
    if (read.flag('use_sliding_window', false))
      read.problem('use_sliding_window must be false: windows of some layers alone are not built')
    return {
      ...readExperts(read, common, experts, 0.001),
      addQkvBias: read.flag('qkv_bias', true),
      moeFfnHiddenSize: read.count('moe_intermediate_size', { max: 2 ** 26 }),
      moeSharedExpertIntermediateSize: read.count('shared_expert_intermediate_size', { max: 2 ** 26 }),
      moeSharedExpertGate: true,
      moeLayerFreq: readDenseLayers(read, common.numLayers),
      moeRouterPreSoftmax: !read.flag('norm_topk_prob', false),
    }
  },
  write(hf, { moeLayerFreq, moeRouterPreSoftmax }, changed) {
    if (changed('moeRouterPreSoftmax')) hf['norm_topk_prob'] = !moeRouterPreSoftmax
    if (changed('moeLayerFreq')) writeDenseLayers(hf, moeLayerFreq)
  },
  rules: (config) => [
    ...outerRules(config),
    ...attentionRules(),
    ...denseRules(),
    ...expertRules('mlp', { gate: 'gate_proj', up: 'up_proj', down: 'down_proj' }),
    ...sharedExpertRules(),
  ],
})
