// Qwen3-MoE (Qwen3MoeForCausalLM): dense layers may stand between those with experts; queries and keys are normalised per head.
import {
  defineFamily,
  expertFields,
  readAttentionBias,
  readDenseLayers,
  readExperts,
  writeDenseLayers,
} from '../decoderFamily.js'
import { attentionRules, denseRules, expertRules, outerRules } from '../decoderRules.js'

const experts = ['num_experts', 'num_local_experts']

/** The Qwen3-MoE family. */
export const qwen3Moe = defineFamily({
  architecture: 'Qwen3MoeForCausalLM',
  modelType: 'qwen3_moe',
  runs: true,
  absent: { maxPositionEmbeddings: 32_768, layernormEpsilon: 1e-6, rotaryBase: 10_000 },
  fields: [
    ['kvChannels', 'head_dim'],
    ['addQkvBias', 'attention_bias'],
    ['moeFfnHiddenSize', 'moe_intermediate_size'],
    ...expertFields(experts),
  ],
  read(read, common) {
    const windowed = read.flag('use_sliding_window', false) && read.has('sliding_window')
    return {
      ...readAttentionBias(read),
      ...readExperts(read, common, experts, 0.001),
      moeFfnHiddenSize: read.count('moe_intermediate_size', { max: 2 ** 26 }),
      moeLayerFreq: readDenseLayers(read, common.numLayers),
      moeRouterPreSoftmax: !read.flag('norm_topk_prob', false),
      qkLayernorm: 'perHead',
      windowSize: windowed ? read.count('sliding_window', { max: 2 ** 31 - 1 }) : null,
    }
  },
  write(hf, { moeLayerFreq, moeRouterPreSoftmax, windowSize }, changed) {
    if (changed('moeRouterPreSoftmax')) hf['norm_topk_prob'] = !moeRouterPreSoftmax
    if (changed('windowSize'))
      Object.assign(hf, { use_sliding_window: windowSize !== null, sliding_window: windowSize })
    if (changed('moeLayerFreq')) writeDenseLayers(hf, moeLayerFreq)
  },
  rules: (config) => [
    ...outerRules(config),
    ...attentionRules(),
    ...denseRules(),
    ...expertRules('mlp', { gate: 'gate_proj', up: 'up_proj', down: 'down_proj' }),
  ],
})
