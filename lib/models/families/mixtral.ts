// Mixtral 8x7B, 8x22B (MixtralForCausalLM): all layers have experts, of which the chosen share one softmax; attention may have a
// window.
import { defineFamily, expertFields, readExperts } from '../decoderFamily.js'
import { attentionRules, expertRules, outerRules } from '../decoderRules.js'

const experts = ['num_local_experts', 'num_experts']

/** The Mixtral family. */
export const mixtral = defineFamily({
  architecture: 'MixtralForCausalLM',
  modelType: 'mixtral',
  runs: true,
  absent: { maxPositionEmbeddings: 131_072, layernormEpsilon: 1e-5, rotaryBase: 1e6 },
  fields: [['kvChannels', 'head_dim'], ['windowSize', 'sliding_window'], ...expertFields(experts)],
  read: (read, common) => ({
    ...readExperts(read, common, experts, 0.001),
    moeFfnHiddenSize: common.ffnHiddenSize,
    windowSize: read.has('sliding_window') ? read.count('sliding_window', { max: 2 ** 31 - 1 }) : null,
  }),
  rules: (config) => [
    ...outerRules(config),
    ...attentionRules(),
    ...expertRules('block_sparse_moe', { gate: 'w1', up: 'w3', down: 'w2' }),
  ],
})
