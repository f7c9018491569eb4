// The one description of a decoder-only transformer, by Megatron-Core's field names in camelCase. Families translate a
// Hugging Face config into it and back. No parallel size stands here, and nothing that only a file format knows.
import type { DType } from '../base/dtype.js'
import type { RopeParameters } from '../nn/rope.js'

export type ActivationName = 'silu' | 'gelu' | 'gelu_tanh' | 'relu' | 'relu2' | 'quick_gelu'

/** Rotary scaling, in the fields' HF spelling turned camelCase; `type: 'default'` has none of the others. */
export type RopeScaling = RopeParameters

export interface TransformerConfig {
  numLayers: number
  hiddenSize: number
  ffnHiddenSize: number
  numAttentionHeads: number
  /** Key and value heads. */
  numQueryGroups: number
  /** Channels a head. */
  kvChannels: number
  normalization: 'RMSNorm' | 'LayerNorm'
  layernormEpsilon: number
  activation: ActivationName
  gatedLinearUnit: boolean
  /** Bias of q, k, v. */
  addQkvBias: boolean
  /** Bias of the attention's output projection. */
  addProjBias: boolean
  /** Bias of fc1 and fc2. */
  addMlpBias: boolean
  rotaryBase: number
  /** Share of the head's channels that rotate, (0, 1]. */
  rotaryPercent: number
  rotaryInterleaved: boolean
  ropeScaling: RopeScaling
  /** Longest sequence (max_position_embeddings). */
  maxPositionEmbeddings: number
  vocabSize: number
  /** Output layer is the embedding. */
  shareEmbeddingsAndOutputWeights: boolean
  initMethodStd: number
  attentionDropout: number
  hiddenDropout: number
  /** Dtype of parameters and activations. */
  paramsDtype: DType
}
