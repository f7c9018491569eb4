// Qwen3-MoE (Qwen3MoeForCausalLM): dense layers may stand between those with experts; queries and keys are normalised per head.
import type { ConfigReader } from '../configReader.js'
import { defineFamily, expertFields, readAttentionBias, readExperts } from '../decoderFamily.js'
import { attentionRules, denseRules, expertRules, outerRules } from '../decoderRules.js'
import type { TransformerConfig } from '../transformerConfig.js'

const experts = ['num_experts', 'num_local_experts']

/** A layer has experts unless `mlp_only_layers` names it or it is none of every `decoder_sparse_step`. */
function readLayers(read: ConfigReader, numLayers: number): TransformerConfig['moeLayerFreq'] {
  const step = read.count('decoder_sparse_step', { max: 2 ** 31 - 1, fallback: 1 })
  const dense = read.get('mlp_only_layers') ?? []
  if (!Array.isArray(dense) || !dense.every((i) => Number.isInteger(i))) {
    read.problem(`mlp_only_layers must be a list of whole numbers, got ${JSON.stringify(dense)}`)
    return 1
  }
  const without = new Set(dense)
  const layers = Array.from({ length: numLayers }, (_, i) => (!without.has(i) && (i + 1) % step === 0 ? 1 : 0))
  return layers.includes(0) ? layers : 1
}

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
      moeLayerFreq: readLayers(read, common.numLayers),
      moeRouterPreSoftmax: !read.flag('norm_topk_prob', false),
      qkLayernorm: 'perHead',
      windowSize: windowed ? read.count('sliding_window', { max: 2 ** 31 - 1 }) : null,
    }
  },
  write(hf, { moeLayerFreq, moeRouterPreSoftmax, windowSize }, changed) {
    if (changed('moeRouterPreSoftmax')) hf['norm_topk_prob'] = !moeRouterPreSoftmax
    if (changed('windowSize'))
      Object.assign(hf, { use_sliding_window: windowSize !== null, sliding_window: windowSize })
    if (changed('moeLayerFreq')) {
      const layers = moeLayerFreq === 1 ? [] : moeLayerFreq
      const dense = layers.flatMap((has, i) => (has === 0 ? [i] : []))
      Object.assign(hf, { decoder_sparse_step: 1, mlp_only_layers: dense })
    }
  },
  rules: (config) => [
    ...outerRules(config),
    ...attentionRules(),
    ...denseRules(),
    ...expertRules('mlp', { gate: 'gate_proj', up: 'up_proj', down: 'down_proj' }),
  ],
})
