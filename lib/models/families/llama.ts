// Llama 2, 3, 3.1, 3.2, 3.3 (LlamaForCausalLM).
import { defineFamily, readAttentionBias } from '../decoderFamily.js'
import { attentionRules, denseRules, outerRules } from '../decoderRules.js'
import { derived } from '../mapping.js'
import type { TransformerConfig } from '../transformerConfig.js'

/** Inverse frequencies without scaling, which checkpoints of 2023 carry per layer: base^(-2i/d). */
function inverseFrequencies(config: TransformerConfig): Float64Array {
  return Float64Array.from(
    { length: config.kvChannels / 2 },
    (_, i) => config.rotaryBase ** (-(2 * i) / config.kvChannels),
  )
}

/** The Llama family. */
export const llama = defineFamily({
  architecture: 'LlamaForCausalLM',
  modelType: 'llama',
  runs: true,
  absent: { maxPositionEmbeddings: 2048, layernormEpsilon: 1e-6, rotaryBase: 10_000 },
  fields: [
    ['kvChannels', 'head_dim'],
    ['addQkvBias', 'attention_bias'],
    ['addMlpBias', 'mlp_bias'],
  ],
  read: (read) => ({ ...readAttentionBias(read), addMlpBias: read.flag('mlp_bias', false) }),
  rules: (config) => [
    ...outerRules(config),
    ...attentionRules(),
    ...denseRules(),
    derived('model.layers.*.self_attn.rotary_emb.inv_freq', (c) => [c.kvChannels / 2], inverseFrequencies),
  ],
})
