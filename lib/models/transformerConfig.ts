// The one description of a decoder-only transformer, by Megatron-Core's field names in camelCase. Families translate a
// Hugging Face config into it and back. No parallel size stands here, and nothing that only a file format knows.
import type { DType } from '../base/dtype.js'
import type { RopeParameters } from '../nn/rope.js'
import type { BalanceType } from '../parallel/topKRouter.js'

export type ActivationName = 'silu' | 'gelu' | 'gelu_tanh' | 'relu' | 'relu2' | 'quick_gelu'

/** RMSNorm of queries and keys: of each head alone with one weight for all heads, or over the channels of all heads. */
export type QkLayernorm = 'perHead' | 'allHeads'

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

  /** Norm of queries and keys before they rotate. */
  qkLayernorm: QkLayernorm | null
  /** Queries, keys and values are clamped to plus and minus this, after their norms. */
  clipQkv: number | null
  /** `learnable`: each head's softmax counts one more score, a parameter, which takes no value (a sink). */
  softmaxType: 'vanilla' | 'learnable'
  /** A token sees this many last positions, itself included; null: all. */
  windowSize: number | null

  /** Experts of a layer; null: no layer has experts. */
  numMoeExperts: number | null
  /** Experts that a token goes to. */
  moeRouterTopk: number
  moeFfnHiddenSize: number | null
  /** Width at which experts take and give rows, behind projections of a layer's own; null: hiddenSize. */
  moeLatentSize: number | null
  /** Width of a feed-forward part that every token passes beside its experts, in layers with experts; null: none. */
  moeSharedExpertIntermediateSize: number | null
  /** The shared part is weighed by a sigmoid of a product of its own. */
  moeSharedExpertGate: boolean
  /** 1: every layer has experts. A list: 1 for a layer with experts, 0 for a dense one. */
  moeLayerFreq: 1 | readonly (0 | 1)[]
  /** Softmax over all experts, then the highest without another normalisation; else softmax over the chosen ones. */
  moeRouterPreSoftmax: boolean
  /** Each score by itself instead of a softmax; the weights of the chosen ones sum up to 1, whatever moeRouterPreSoftmax says. */
  moeRouterScoreFunction: 'softmax' | 'sigmoid'
  /** Factor of the weights; null: 1. */
  moeRouterTopkScalingFactor: number | null
  /** Neighbouring experts in so many groups, of which a token's experts come from the best moeRouterGroupTopk; null: one group. */
  moeRouterNumGroups: number | null
  moeRouterGroupTopk: number | null
  /** A number for each expert is added to its score for the choice alone; it has no gradient. */
  moeRouterEnableExpertBias: boolean
  /** After each step the numbers of experts that got fewer tokens than the mean grow by this, of those that got more they shrink. */
  moeRouterBiasUpdateRate: number
  /** `fp32`: the router's product is in float32, whatever the model's dtype. */
  moeRouterDtype: 'fp32' | null
  moeRouterLoadBalancingType: BalanceType | 'none' | readonly BalanceType[]
  /** A list where the types are one, a number for each. */
  moeAuxLossCoeff: number | readonly number[]
  /** Of the mean squared log-sum-exp of the router's logits; null: none. */
  moeZLossCoeff: number | null
  /** In training what the router reads is multiplied by 1 - eps to 1 + eps; null: it is not. */
  moeInputJitterEps: number | null
  /** An expert takes this times as many choices of a rank's tokens as each would have of equal shares; the others are dropped. Null: all. */
  moeExpertCapacityFactor: number | null
  /** Rows of zeros fill each expert's up to its capacity: shapes no longer depend on the choices. */
  moePadExpertInputToCapacity: boolean
  /** Which choices are kept: those with the highest weights, or the first ones. */
  moeTokenDropPolicy: 'probs' | 'position'
  /** Rows go to the ranks that have their experts; or each rank gets all tokens, and sums are shared out. */
  moeTokenDispatcherType: 'alltoall' | 'allgather'
  /** For benchmarks: the router's logits are random numbers, alike in every step. */
  moeRouterForceLoadBalancing: boolean
}

/** What a plain dense decoder has in the fields that only some families use. */
export const plainDecoder = {
  qkLayernorm: null,
  clipQkv: null,
  softmaxType: 'vanilla',
  windowSize: null,
  numMoeExperts: null,
  moeRouterTopk: 2,
  moeFfnHiddenSize: null,
  moeLatentSize: null,
  moeSharedExpertIntermediateSize: null,
  moeSharedExpertGate: false,
  moeLayerFreq: 1,
  moeRouterPreSoftmax: false,
  moeRouterScoreFunction: 'softmax',
  moeRouterTopkScalingFactor: null,
  moeRouterNumGroups: null,
  moeRouterGroupTopk: null,
  moeRouterEnableExpertBias: false,
  moeRouterBiasUpdateRate: 1e-3,
  moeRouterDtype: null,
  moeRouterLoadBalancingType: 'none',
  moeAuxLossCoeff: 0,
  moeZLossCoeff: null,
  moeInputJitterEps: null,
  moeExpertCapacityFactor: null,
  moePadExpertInputToCapacity: false,
  moeTokenDropPolicy: 'probs',
  moeTokenDispatcherType: 'alltoall',
  moeRouterForceLoadBalancing: false,
} as const satisfies Partial<TransformerConfig>

/** The width at which experts take and give rows. */
export const expertWidth = ({ moeLatentSize, hiddenSize }: TransformerConfig): number => moeLatentSize ?? hiddenSize

/** True when a layer's feed-forward part is a mixture of experts. */
export function hasExperts(config: TransformerConfig, layer: number): boolean {
  if (config.numMoeExperts === null) return false
  return config.moeLayerFreq === 1 || config.moeLayerFreq[layer] === 1
}

const keys: { readonly [K in keyof TransformerConfig]: true } = {
  numLayers: true,
  hiddenSize: true,
  ffnHiddenSize: true,
  numAttentionHeads: true,
  numQueryGroups: true,
  kvChannels: true,
  normalization: true,
  layernormEpsilon: true,
  activation: true,
  gatedLinearUnit: true,
  addQkvBias: true,
  addProjBias: true,
  addMlpBias: true,
  rotaryBase: true,
  rotaryPercent: true,
  rotaryInterleaved: true,
  ropeScaling: true,
  maxPositionEmbeddings: true,
  vocabSize: true,
  shareEmbeddingsAndOutputWeights: true,
  initMethodStd: true,
  attentionDropout: true,
  hiddenDropout: true,
  paramsDtype: true,
  qkLayernorm: true,
  clipQkv: true,
  softmaxType: true,
  windowSize: true,
  numMoeExperts: true,
  moeRouterTopk: true,
  moeFfnHiddenSize: true,
  moeLatentSize: true,
  moeSharedExpertIntermediateSize: true,
  moeSharedExpertGate: true,
  moeLayerFreq: true,
  moeRouterPreSoftmax: true,
  moeRouterScoreFunction: true,
  moeRouterTopkScalingFactor: true,
  moeRouterNumGroups: true,
  moeRouterGroupTopk: true,
  moeRouterEnableExpertBias: true,
  moeRouterBiasUpdateRate: true,
  moeRouterDtype: true,
  moeRouterLoadBalancingType: true,
  moeAuxLossCoeff: true,
  moeZLossCoeff: true,
  moeInputJitterEps: true,
  moeExpertCapacityFactor: true,
  moePadExpertInputToCapacity: true,
  moeTokenDropPolicy: true,
  moeTokenDispatcherType: true,
  moeRouterForceLoadBalancing: true,
}

/** All fields, in the order of the type. */
export const transformerKeys = Object.keys(keys) as (keyof TransformerConfig)[]

/** The transformer's fields of a wider object. */
export function transformerFields(wider: TransformerConfig): TransformerConfig {
  return Object.fromEntries(transformerKeys.map((key) => [key, wider[key]])) as unknown as TransformerConfig
}
