// The logical parameters of a decoder-only transformer, by Megatron's names: shape, place in the model, kind of cut. The cutting
// itself is in layoutShards.ts. Derived from the config alone: converting needs no model in memory. A test compares it with the
// assembled model's own.
import { expertWidth, hasExperts, type TransformerConfig } from './transformerConfig.js'

/**
 * How a parameter is cut over tp (of an expert: over etp).
 * - `vocab`: rows of the vocabulary, padded in memory. `column`: dim 0. `row`: dim 1. `gated`: both halves of dim 0.
 * - `qkv`: per query group its queries, its key, its value; key and value are copied where there are fewer groups than ranks.
 * - `heads`, `kvHeads`: dim 0 by query heads, or by key and value heads (copied likewise): norms over the full dimension.
 * - `replicated`: whole on each rank. `perHead`: whole, and shared by all heads, so that each rank sees a part of its gradient.
 */
export type Cut = 'vocab' | 'qkv' | 'gated' | 'column' | 'row' | 'heads' | 'kvHeads' | 'replicated' | 'perHead'

/** A parameter's name, logical shape, place and cut. */
export interface ParameterRow {
  readonly name: string
  readonly shape: readonly number[]
  readonly cut: Cut
  /** Index of the block, counted over the whole model; `final`: final norm and output layer. */
  readonly layer: number | 'embedding' | 'final'
  /** Index of the expert, counted over all ranks; null: not an expert's. */
  readonly expert: number | null
}

/** Rows of the fused query, key and value projection: per query group its queries, its key, its value. */
export function qkvRows(config: TransformerConfig): number {
  return (config.numAttentionHeads + 2 * config.numQueryGroups) * config.kvChannels
}

/** All parameters in the order of the model. */
export function parameterTable(config: TransformerConfig): ParameterRow[] {
  const { hiddenSize: H, vocabSize: V, kvChannels: D } = config
  const heads = config.numAttentionHeads * D
  const gates = config.gatedLinearUnit ? 2 : 1
  const fc1Cut: Cut = config.gatedLinearUnit ? 'gated' : 'column'
  const rows: ParameterRow[] = []
  let at: ParameterRow['layer'] = 'embedding'
  const add = (name: string, shape: number[], cut: Cut, expert: number | null = null) =>
    rows.push({ name, shape, cut, layer: at, expert })
  const norm = (prefix: string) => {
    add(`${prefix}weight`, [H], 'replicated')
    if (config.normalization === 'LayerNorm') add(`${prefix}bias`, [H], 'replicated')
  }
  const attention = (prefix: string) => {
    norm(`${prefix}.linear_qkv.layer_norm_`)
    add(`${prefix}.linear_qkv.weight`, [qkvRows(config), H], 'qkv')
    if (config.addQkvBias) add(`${prefix}.linear_qkv.bias`, [qkvRows(config)], 'qkv')
    if (config.qkLayernorm !== null) {
      const perHead = config.qkLayernorm === 'perHead'
      add(`${prefix}.q_layernorm.weight`, [perHead ? D : heads], perHead ? 'perHead' : 'heads')
      add(`${prefix}.k_layernorm.weight`, [perHead ? D : config.numQueryGroups * D], perHead ? 'perHead' : 'kvHeads')
    }
    if (config.softmaxType === 'learnable')
      add(`${prefix}.core_attention.softmax_offset`, [config.numAttentionHeads], 'column')
    add(`${prefix}.linear_proj.weight`, [H, heads], 'row')
    if (config.addProjBias) add(`${prefix}.linear_proj.bias`, [H], 'replicated')
  }
  const dense = (prefix: string) => {
    const { ffnHiddenSize: F } = config
    norm(`${prefix}.linear_fc1.layer_norm_`)
    add(`${prefix}.linear_fc1.weight`, [gates * F, H], fc1Cut)
    if (config.addMlpBias) add(`${prefix}.linear_fc1.bias`, [gates * F], fc1Cut)
    add(`${prefix}.linear_fc2.weight`, [H, F], 'row')
    if (config.addMlpBias) add(`${prefix}.linear_fc2.bias`, [H], 'replicated')
  }
  const experts = (prefix: string) => {
    const E = config.numMoeExperts as number
    const F = config.moeFfnHiddenSize ?? config.ffnHiddenSize
    add(`${prefix}.router.weight`, [E, H], 'replicated')
    if (config.moeRouterEnableExpertBias) add(`${prefix}.router.expert_bias`, [E], 'replicated')
    const width = expertWidth(config)
    if (config.moeLatentSize !== null) {
      add(`${prefix}.fc1_latent_proj.weight`, [width, H], 'replicated')
      add(`${prefix}.fc2_latent_proj.weight`, [H, width], 'replicated')
    }
    for (let e = 0; e < E; e++) add(`${prefix}.experts.linear_fc1.weight${e}`, [gates * F, width], fc1Cut, e)
    for (let e = 0; e < E; e++) add(`${prefix}.experts.linear_fc2.weight${e}`, [width, F], 'row', e)
    const S = config.moeSharedExpertIntermediateSize
    if (S === null) return
    add(`${prefix}.shared_experts.linear_fc1.weight`, [gates * S, H], fc1Cut)
    add(`${prefix}.shared_experts.linear_fc2.weight`, [H, S], 'row')
    if (config.moeSharedExpertGate) add(`${prefix}.shared_experts.gate_weight`, [1, H], 'replicated')
  }
  add('embedding.word_embeddings.weight', [V, H], 'vocab')
  for (let i = 0; i < config.numLayers; i++) {
    at = i
    const layer = `decoder.layers.${i}`
    attention(`${layer}.self_attention`)
    if (hasExperts(config, i)) {
      norm(`${layer}.pre_mlp_layernorm.`)
      experts(`${layer}.mlp`)
    } else dense(`${layer}.mlp`)
  }
  at = 'final'
  norm('decoder.final_layernorm.')
  if (!config.shareEmbeddingsAndOutputWeights) add('output_layer.weight', [V, H], 'vocab')
  return rows
}
