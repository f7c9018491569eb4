// What a run computes with: parameters and floating-point operations a token. Closed formulas of the configuration; no device.
import { parameterTable } from '../models/parameterTable.js'
import type { TransformerConfig } from '../models/transformerConfig.js'
import { volume } from '../tensor/region.js'

/** Channels of queries and of keys (= of values). */
function widths(c: TransformerConfig): { query: number; key: number } {
  return { query: c.numAttentionHeads * c.kvChannels, key: c.numQueryGroups * c.kvChannels }
}

/** Parameters of the logical model, padding not counted. */
export function parameterCount(c: TransformerConfig): number {
  return parameterTable(c).reduce((sum, { shape }) => sum + volume(shape), 0)
}

/**
 * Floating-point operations of training one token: 3 times those of its forward pass (backward is two forward passes), 2 a
 * multiplication and addition. Attention counts the causal half. The padded vocabulary is what is computed.
 */
export function trainingFlopsPerToken(c: TransformerConfig, seqLength: number, paddedVocabSize: number): number {
  const { query, key } = widths(c)
  const { hiddenSize: H, ffnHiddenSize: F } = c
  const matrices = H * (query + 2 * key) + query * H + H * (c.gatedLinearUnit ? 2 * F : F) + F * H
  // Scores and weighted values: each query meets (S + 1) / 2 keys on average.
  const attention = 2 * query * ((seqLength + 1) / 2)
  return 3 * 2 * (c.numLayers * (matrices + attention) + H * paddedVocabSize)
}
