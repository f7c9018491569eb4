// Mapping rules of the parts that decoder families share, in the names that most of them have on Hugging Face. Rules for parts that
// a config lacks (biases, dense layers, experts) are harmless: a rule without a parameter does nothing.
import { gated, type MappingRule, qkv, type Rule, rename, spellings, tied } from './mapping.js'
import type { TransformerConfig } from './transformerConfig.js'

const ours = 'decoder.layers.*'
const theirs = 'model.layers.*'
const kinds = ['weight', 'bias'] as const

/** Embedding, final norm and output layer. */
export function outerRules(config: TransformerConfig): Rule[] {
  return [
    rename('embedding.word_embeddings.weight', 'model.embed_tokens.weight'),
    rename('decoder.final_layernorm.weight', 'model.norm.weight'),
    config.shareEmbeddingsAndOutputWeights
      ? tied('lm_head.weight', 'model.embed_tokens.weight')
      : rename('output_layer.weight', 'lm_head.weight'),
  ]
}

/** Attention with its norm; norms of queries and keys too. */
export function attentionRules(): Rule[] {
  const attention = `${theirs}.self_attn`
  return [
    rename(`${ours}.self_attention.linear_qkv.layer_norm_weight`, `${theirs}.input_layernorm.weight`),
    ...kinds.flatMap((kind) => [
      qkv(`${ours}.self_attention.linear_qkv.${kind}`, {
        q: `${attention}.q_proj.${kind}`,
        k: `${attention}.k_proj.${kind}`,
        v: `${attention}.v_proj.${kind}`,
      }),
      rename(`${ours}.self_attention.linear_proj.${kind}`, `${attention}.o_proj.${kind}`),
    ]),
    rename(`${ours}.self_attention.q_layernorm.weight`, `${attention}.q_norm.weight`),
    rename(`${ours}.self_attention.k_layernorm.weight`, `${attention}.k_norm.weight`),
  ]
}

/** Dense feed-forward layers with their norm. */
export function denseRules(): Rule[] {
  return [
    rename(`${ours}.mlp.linear_fc1.layer_norm_weight`, `${theirs}.post_attention_layernorm.weight`),
    ...kinds.flatMap((kind) => [
      gated(`${ours}.mlp.linear_fc1.${kind}`, {
        gate: `${theirs}.mlp.gate_proj.${kind}`,
        up: `${theirs}.mlp.up_proj.${kind}`,
      }),
      rename(`${ours}.mlp.linear_fc2.${kind}`, `${theirs}.mlp.down_proj.${kind}`),
    ]),
  ]
}

/** The part of layers with experts that every token passes, under the names of Qwen2-MoE. */
export function sharedExpertRules(): Rule[] {
  const [shared, theirShared] = [`${ours}.mlp.shared_experts`, `${theirs}.mlp.shared_expert`]
  return [
    gated(`${shared}.linear_fc1.weight`, {
      gate: `${theirShared}.gate_proj.weight`,
      up: `${theirShared}.up_proj.weight`,
    }),
    rename(`${shared}.linear_fc2.weight`, `${theirShared}.down_proj.weight`),
    rename(`${shared}.gate_weight`, `${theirs}.mlp.shared_expert_gate.weight`),
  ]
}

/**
 * Layers with experts: norm, router, experts. Two spellings: expert by expert, as on the hub, and all experts of a layer stacked,
 * as Transformers 5 holds them in memory and saves them with `save_original_format=False`.
 * @param block - the layer's part that holds router and experts on the hub.
 * @param names - an expert's projections on the hub.
 */
export function expertRules(block: string, names: { gate: string; up: string; down: string }): Rule[] {
  const [fc1, fc2] = ['linear_fc1', 'linear_fc2'].map((name) => `${ours}.mlp.experts.${name}.weight{e}`) as [
    string,
    string,
  ]
  const router = (of: string): MappingRule => rename(`${ours}.mlp.router.weight`, `${theirs}.${of}.gate.weight`)
  const expert = (name: string) => `${theirs}.${block}.experts.{e}.${name}.weight`
  return [
    rename(`${ours}.pre_mlp_layernorm.weight`, `${theirs}.post_attention_layernorm.weight`),
    spellings(
      [router(block), gated(fc1, { gate: expert(names.gate), up: expert(names.up) }), rename(fc2, expert(names.down))],
      [
        router('mlp'),
        rename(fc1, `${theirs}.mlp.experts.gate_up_proj`),
        rename(fc2, `${theirs}.mlp.experts.down_proj`),
      ],
    ),
  ]
}
