// The logical parameters of a decoder-only transformer, by Megatron's names, and how each is cut over tensor-parallel ranks.
// Derived from the config alone: converting needs no model in memory. A test compares it with the assembled model's own.
import { ViaductError } from '../base/errors.js'
import { replicated, rowRuns, type ShardSpec, splitDim } from '../tensor/shardSpec.js'
import type { TransformerConfig } from './transformerConfig.js'

/** How a parameter is cut over tp. */
export type Cut = 'vocab' | 'qkv' | 'gated' | 'column' | 'row' | 'replicated'

/** A parameter's name, logical shape and cut. */
export interface ParameterRow {
  readonly name: string
  readonly shape: readonly number[]
  readonly cut: Cut
}

/** Rows of the fused query, key and value projection: per query group its queries, its key, its value. */
export function qkvRows(config: TransformerConfig): number {
  return (config.numAttentionHeads + 2 * config.numQueryGroups) * config.kvChannels
}

/** All parameters in the order of the model. */
export function parameterTable(config: TransformerConfig): ParameterRow[] {
  const { hiddenSize: H, ffnHiddenSize: F, vocabSize: V } = config
  const attention = config.numAttentionHeads * config.kvChannels
  const fc1 = config.gatedLinearUnit ? 2 * F : F
  const fc1Cut: Cut = config.gatedLinearUnit ? 'gated' : 'column'
  const rows: ParameterRow[] = [{ name: 'embedding.word_embeddings.weight', shape: [V, H], cut: 'vocab' }]
  const add = (name: string, shape: number[], cut: Cut) => rows.push({ name, shape, cut })
  const norm = (prefix: string) => {
    add(`${prefix}weight`, [H], 'replicated')
    if (config.normalization === 'LayerNorm') add(`${prefix}bias`, [H], 'replicated')
  }
  for (let i = 0; i < config.numLayers; i++) {
    const layer = `decoder.layers.${i}`
    norm(`${layer}.self_attention.linear_qkv.layer_norm_`)
    add(`${layer}.self_attention.linear_qkv.weight`, [qkvRows(config), H], 'qkv')
    if (config.addQkvBias) add(`${layer}.self_attention.linear_qkv.bias`, [qkvRows(config)], 'qkv')
    add(`${layer}.self_attention.linear_proj.weight`, [H, attention], 'row')
    if (config.addProjBias) add(`${layer}.self_attention.linear_proj.bias`, [H], 'replicated')
    norm(`${layer}.mlp.linear_fc1.layer_norm_`)
    add(`${layer}.mlp.linear_fc1.weight`, [fc1, H], fc1Cut)
    if (config.addMlpBias) add(`${layer}.mlp.linear_fc1.bias`, [fc1], fc1Cut)
    add(`${layer}.mlp.linear_fc2.weight`, [H, F], 'row')
    if (config.addMlpBias) add(`${layer}.mlp.linear_fc2.bias`, [H], 'replicated')
  }
  norm('decoder.final_layernorm.')
  if (!config.shareEmbeddingsAndOutputWeights) add('output_layer.weight', [V, H], 'vocab')
  return rows
}

/** What about a tensor-parallel size does not fit this config; empty when it fits. */
export function tensorParallelProblems(config: TransformerConfig, tp: number): string[] {
  const problems: string[] = []
  const { numAttentionHeads: heads, numQueryGroups: groups, ffnHiddenSize } = config
  const divisors = (n: number) => Array.from({ length: n }, (_, i) => i + 1).filter((d) => n % d === 0)
  if (heads % tp !== 0)
    problems.push(
      `tensorModelParallelSize must divide numAttentionHeads=${heads}, got ${tp}: use ${divisors(heads).join(', ')}`,
    )
  if (groups % tp !== 0 && tp % groups !== 0) {
    problems.push(`tensorModelParallelSize must divide numQueryGroups=${groups} or be a multiple of it, got ${tp}`)
  }
  if (ffnHiddenSize % tp !== 0)
    problems.push(`tensorModelParallelSize must divide ffnHiddenSize=${ffnHiddenSize}, got ${tp}`)
  return problems
}

/**
 * The shard of one tensor-parallel rank.
 * @param paddedVocab - rows of the padded vocabulary in memory; default: the least multiple of tp.
 * @throws ERR_LAYOUT_INVALID when tp does not fit.
 */
export function shardOf(
  row: ParameterRow,
  config: TransformerConfig,
  rank: number,
  tp: number,
  paddedVocab?: number,
): ShardSpec {
  const { shape } = row
  switch (row.cut) {
    case 'vocab':
      return splitDim(shape, 0, rank, tp, paddedVocab ?? Math.ceil((shape[0] as number) / tp) * tp)
    case 'column':
      return splitDim(shape, 0, rank, tp)
    case 'row':
      return splitDim(shape, 1, rank, tp)
    case 'gated': {
      const half = (shape[0] as number) / 2
      const count = half / tp
      return rowRuns(shape, [
        { start: rank * count, count },
        { start: half + rank * count, count },
      ])
    }
    case 'qkv':
      return qkvShard(shape, config, rank, tp)
    case 'replicated':
      return replicated(shape, { replica: rank })
  }
}

function qkvShard(shape: readonly number[], config: TransformerConfig, rank: number, tp: number): ShardSpec {
  const problems = tensorParallelProblems(config, tp)
  if (problems.length > 0) throw new ViaductError('ERR_LAYOUT_INVALID', 'parallel', problems.join('; '), { problems })
  const { numQueryGroups: groups, kvChannels: D } = config
  const heads = config.numAttentionHeads / groups
  const groupRows = (heads + 2) * D
  if (groups % tp === 0) {
    const count = (groups / tp) * groupRows
    return rowRuns(shape, [{ start: rank * count, count }])
  }
  // Fewer groups than ranks: each rank has a part of one group's queries and a copy of its key and value.
  const copies = tp / groups
  const start = Math.floor(rank / copies) * groupRows
  const replica = rank % copies
  const queries = (heads / copies) * D
  return rowRuns(shape, [
    { start: start + replica * queries, count: queries },
    { start: start + heads * D, count: 2 * D, replica, gradSum: ['tp_kv'] },
  ])
}
