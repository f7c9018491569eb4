// OLMoE (OlmoeForCausalLM): all layers have experts; queries and keys are normalised over all heads together and may be clamped.
import { defineFamily, expertFields, readAttentionBias, readExperts } from '../decoderFamily.js'
import { attentionRules, expertRules, outerRules } from '../decoderRules.js'

const experts = ['num_experts', 'num_local_experts']

/** The OLMoE family. */
export const olmoe = defineFamily({
  architecture: 'OlmoeForCausalLM',
  modelType: 'olmoe',
  runs: true,
  absent: { maxPositionEmbeddings: 4096, layernormEpsilon: 1e-5, rotaryBase: 10_000 },
  fields: [['addQkvBias', 'attention_bias'], ['clipQkv', 'clip_qkv'], ...expertFields(experts)],
  read(read, common) {
    const { ffnHiddenSize, hiddenSize, kvChannels, numAttentionHeads } = common
    if (kvChannels * numAttentionHeads !== hiddenSize)
      read.problem(
        `head_dim=${kvChannels} must be hidden_size / num_attention_heads: the norms of this family span both`,
      )
    return {
      ...readAttentionBias(read),
      ...readExperts(read, common, experts, 0.01),
      moeFfnHiddenSize: ffnHiddenSize,
      moeRouterPreSoftmax: !read.flag('norm_topk_prob', false),
      moeRouterDtype: 'fp32',
      moeRouterLoadBalancingType: 'seq_aux_loss',
      qkLayernorm: 'allHeads',
      clipQkv: read.optionalReal('clip_qkv', { min: 0 }) ?? null,
    }
  },
  write(hf, config, changed) {
    if (changed('moeRouterPreSoftmax')) hf['norm_topk_prob'] = !config.moeRouterPreSoftmax
  },
  rules: (config) => [
    ...outerRules(config),
    ...attentionRules(),
    ...expertRules('mlp', { gate: 'gate_proj', up: 'up_proj', down: 'down_proj' }),
  ],
})
