// What a run computes with: parameters and floating-point operations a token. Closed formulas of the configuration; no device.
import { parameterTable } from '../models/parameterTable.js'
import { expertWidth, hasExperts, type TransformerConfig } from '../models/transformerConfig.js'
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
 * multiplication and addition. Attention counts the causal half, of experts those that a token goes to. The padded vocabulary is what
 * is computed.
 */
export function trainingFlopsPerToken(c: TransformerConfig, seqLength: number, paddedVocabSize: number): number {
  const { query, key } = widths(c)
  const { hiddenSize: H } = c
  const feedForward = (F: number, width = H) => width * (c.gatedLinearUnit ? 2 * F : F) + F * width
  // Scores and weighted values: each query meets the keys of its window, without one (S + 1) / 2 on average.
  const keys = meanKeys(seqLength, c.windowSize)
  const attention = H * (query + 2 * key) + query * H + 2 * query * keys
  const dense = feedForward(c.ffnHiddenSize)
  // A token's chosen experts, the router, and what all tokens pass.
  const expert = feedForward(c.moeFfnHiddenSize ?? c.ffnHiddenSize, expertWidth(c))
  const projections = c.moeLatentSize === null ? 0 : 2 * H * c.moeLatentSize
  const routed = c.moeRouterTopk * expert + projections + H * (c.numMoeExperts ?? 0)
  const chosen = routed + feedForward(c.moeSharedExpertIntermediateSize ?? 0) + (c.moeSharedExpertGate ? H : 0)
  let products = H * paddedVocabSize
  for (let layer = 0; layer < c.numLayers; layer++) products += attention + (hasExperts(c, layer) ? chosen : dense)
  return 3 * 2 * products
}

/** Keys that a query sees on average, itself included. */
function meanKeys(seqLength: number, window: number | null): number {
  const most = Math.min(window ?? seqLength, seqLength)
  return (most * (most + 1)) / 2 / seqLength + ((seqLength - most) * most) / seqLength
}
