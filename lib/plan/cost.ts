// What a run costs: parameters, bytes on a rank, floating-point operations a token. Closed formulas of the configuration; no device.
// B = micro-batch, S = sequence, T = B·S, H = hidden, F = MLP, V = padded vocabulary, L = layers; sizes are of one rank.

import { dtypeBytes } from '../base/dtype.js'
import type { ResolvedConfig } from '../config/resolve.js'
import type { TransformerConfig } from '../models/transformerConfig.js'
import { pipelineStages } from '../parallel/pipelineStages.js'
import { mostActivations } from '../parallel/schedules.js'

/** Channels of queries and of keys (= of values). */
function widths(c: TransformerConfig): { query: number; key: number } {
  return { query: c.numAttentionHeads * c.kvChannels, key: c.numQueryGroups * c.kvChannels }
}

/** Parameters of the logical model, padding not counted. */
export function parameterCount(c: TransformerConfig): number {
  const embeddings = (c.shareEmbeddingsAndOutputWeights ? 1 : 2) * c.vocabSize * c.hiddenSize
  return c.numLayers * layerParameters(c) + embeddings + normParameters(c)
}

const normParameters = (c: TransformerConfig) => (c.normalization === 'LayerNorm' ? 2 : 1) * c.hiddenSize

function layerParameters(c: TransformerConfig): number {
  const { query, key } = widths(c)
  const { hiddenSize: H, ffnHiddenSize: F } = c
  const fc1 = c.gatedLinearUnit ? 2 * F : F
  const biases = (c.addQkvBias ? query + 2 * key : 0) + (c.addProjBias ? H : 0) + (c.addMlpBias ? fc1 + H : 0)
  return H * (query + 2 * key) + query * H + H * fc1 + F * H + 2 * normParameters(c) + biases
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

/** Bytes on one rank, by use. */
export interface MemoryUse {
  readonly weights: number
  readonly gradients: number
  readonly optimizer: number
  readonly activations: number
  readonly total: number
}

/** Bytes that a training step needs at its peak on the rank that needs most. */
export function trainingMemory(resolved: ResolvedConfig): MemoryUse {
  const { model } = resolved.config
  const stages = Array.from({ length: model.pipelineModelParallelSize }, (_, stage) => stageMemory(resolved, stage))
  return stages.reduce((most, use) => (use.total > most.total ? use : most))
}

/** As trainingMemory, of the ranks of one pipeline stage. */
export function stageMemory(resolved: ResolvedConfig, stage: number): MemoryUse {
  const { model, train, ddp } = resolved.config
  const tp = model.tensorModelParallelSize
  const bytes = dtypeBytes(resolved.paramsDtype)
  const { query, key } = widths(model)
  const { hiddenSize: H, ffnHiddenSize: F } = model
  const { chunks, partOf } = pipelineStages(model, model.numLayers)
  const parts = Array.from({ length: chunks }, (_, chunk) => partOf(stage, chunk))
  const L = parts.reduce((sum, { first, end }) => sum + end - first, 0)
  const hasHead = parts.some((part) => part.hasHead)
  const hasEmbedding = parts.some((part) => part.hasEmbedding)
  const tables = model.shareEmbeddingsAndOutputWeights
    ? Number(hasHead || hasEmbedding)
    : Number(hasHead) + Number(hasEmbedding)
  // Norms and row-parallel biases are whole on each rank; they are too small to count apart.
  const own = L * layerParameters(model) + tables * resolved.paddedVocabSize * H + (hasHead ? normParameters(model) : 0)
  const parameters = own / tp
  const T = train.microBatchSize * resolved.seqLength
  const kvLocal = Math.max(key / tp, model.kvChannels)
  const fc1 = model.gatedLinearUnit ? 2 * F : F
  // Rows of norms, dropout and the residual stream.
  const rows = model.sequenceParallel ? T / tp : T
  // Saved for the backward pass: both norms' inputs and outputs, q, k, v, attention's output, fc1's output and the activation.
  const layer = (rows * 4 * H + T * (2 * (query / tp) + 2 * kvLocal + (fc1 + F) / tp)) * bytes
  const once = model.recomputeGranularity === 'full' ? L * rows * H * bytes : L * layer
  // As many passes at once as the schedule holds, each through one of the chunks.
  const passes = mostActivations(model.scheduleSizes(resolved.numMicroBatches), stage) / chunks
  const kept = passes * once + (model.recomputeGranularity === 'full' ? layer : 0)
  const logits = hasHead ? T * (resolved.paddedVocabSize / tp) * bytes : 0
  // Gradients that flow back beside what is saved: one layer's widest tensors, of all rows.
  const flowing = T * (2 * H + fc1 / tp) * bytes
  const weights = parameters * bytes
  const gradients = parameters * 4
  const sharers = ddp.useDistributedOptimizer ? resolved.dataParallelSize : 1
  const optimizer = (parameters * (resolved.paramsDtype === 'float32' ? 8 : 12)) / sharers
  const activations = kept + 2 * logits + flowing
  return { weights, gradients, optimizer, activations, total: weights + gradients + optimizer + activations }
}
