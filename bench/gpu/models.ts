// The models that are trained, loaded and decoded, as Hugging Face configs for both sides, and the sizes of the ops; tiny ones of the
// same kinds for the rehearsal.
import type { MatmulShape, OpSizes } from '../opCases.js'

/** A config.json. */
export type HfConfig = Readonly<Record<string, unknown>>

/** A case of training. */
export interface TrainCase {
  readonly name: string
  readonly model: keyof Models
  readonly batch: readonly [sequences: number, seqLength: number]
}

export interface Models {
  /** Llama-3.2-1B. */
  readonly llama1b: HfConfig
  /** Llama-3-8B; as many of its layers as fit. */
  readonly llama8b: HfConfig
  /** OLMoE-1B-7B; as many of its layers as fit. */
  readonly olmoe: HfConfig
}

/** All sizes of a run. */
export interface Sizes {
  readonly models: Models
  readonly trainings: readonly TrainCase[]
  readonly decoding: { readonly batches: readonly number[]; readonly prompt: number; readonly newTokens: number }
  readonly ops: OpSizes
  readonly matmuls: readonly MatmulShape[]
  readonly copyBytes: number
  /** An op is repeated until it took so long. */
  readonly leastSeconds: number
}

const llama = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  attention_bias: false,
  hidden_act: 'silu',
  initializer_range: 0.02,
  mlp_bias: false,
  pretraining_tp: 1,
  rms_norm_eps: 1e-5,
  torch_dtype: 'bfloat16',
  use_cache: true,
}

const moe = {
  architectures: ['OlmoeForCausalLM'],
  model_type: 'olmoe',
  attention_bias: false,
  clip_qkv: null,
  hidden_act: 'silu',
  initializer_range: 0.02,
  norm_topk_prob: false,
  output_router_logits: false,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  router_aux_loss_coef: 0.01,
  tie_word_embeddings: false,
  torch_dtype: 'bfloat16',
  use_cache: true,
}

/** What is measured on a GPU. */
export const realSizes: Sizes = {
  models: {
    llama1b: {
      ...llama,
      head_dim: 64,
      hidden_size: 2048,
      intermediate_size: 8192,
      max_position_embeddings: 131072,
      num_attention_heads: 32,
      num_hidden_layers: 16,
      num_key_value_heads: 8,
      rope_scaling: {
        factor: 32,
        high_freq_factor: 4,
        low_freq_factor: 1,
        original_max_position_embeddings: 8192,
        rope_type: 'llama3',
      },
      rope_theta: 500000,
      tie_word_embeddings: true,
      vocab_size: 128256,
    },
    llama8b: {
      ...llama,
      hidden_size: 4096,
      intermediate_size: 14336,
      max_position_embeddings: 8192,
      num_attention_heads: 32,
      num_hidden_layers: 32,
      num_key_value_heads: 8,
      rope_theta: 500000,
      tie_word_embeddings: false,
      vocab_size: 128256,
    },
    olmoe: {
      ...moe,
      hidden_size: 2048,
      intermediate_size: 1024,
      max_position_embeddings: 4096,
      num_attention_heads: 16,
      num_experts: 64,
      num_experts_per_tok: 8,
      num_hidden_layers: 16,
      num_key_value_heads: 16,
      vocab_size: 50304,
    },
  },
  trainings: [
    { name: 'Llama-3.2-1B', model: 'llama1b', batch: [2, 4096] },
    { name: 'Llama-3.2-1B', model: 'llama1b', batch: [1, 8192] },
    { name: 'Llama-3-8B', model: 'llama8b', batch: [1, 4096] },
    { name: 'OLMoE-1B-7B', model: 'olmoe', batch: [2, 4096] },
  ],
  decoding: { batches: [1, 8], prompt: 128, newTokens: 128 },
  ops: {
    batch: 2,
    seqLength: 4096,
    hidden: 4096,
    ffn: 14336,
    groups: 8,
    headsPerGroup: 4,
    channels: 128,
    vocabulary: 128256,
    logitRows: 4096,
    elements: 2 ** 27,
    experts: 64,
    expertFfn: 1024,
    topk: 8,
  },
  matmuls: [
    [8192, 8192, 8192],
    [8192, 6144, 4096],
    [8192, 28672, 4096],
    [8192, 4096, 14336],
    [4096, 128256, 4096],
  ],
  copyBytes: 2 ** 31,
  leastSeconds: 0.2,
}

const tiny = { hidden_size: 32, intermediate_size: 64, max_position_embeddings: 64, vocab_size: 96 }

/** The same steps in seconds, on an emulated GPU. */
export const rehearsalSizes: Sizes = {
  models: {
    llama1b: {
      ...realSizes.models.llama1b,
      ...tiny,
      head_dim: 16,
      num_attention_heads: 2,
      num_key_value_heads: 1,
      num_hidden_layers: 1,
    },
    llama8b: {
      ...realSizes.models.llama8b,
      ...tiny,
      num_attention_heads: 2,
      num_key_value_heads: 1,
      num_hidden_layers: 3,
    },
    olmoe: {
      ...realSizes.models.olmoe,
      ...tiny,
      intermediate_size: 16,
      num_attention_heads: 2,
      num_experts: 4,
      num_experts_per_tok: 2,
      num_hidden_layers: 2,
      num_key_value_heads: 2,
    },
  },
  trainings: realSizes.trainings.map((training, i) => ({ ...training, batch: [1, i === 1 ? 24 : 16] })),
  decoding: { batches: [1, 2], prompt: 4, newTokens: 2 },
  ops: {
    batch: 1,
    seqLength: 16,
    hidden: 32,
    ffn: 32,
    groups: 1,
    headsPerGroup: 2,
    channels: 16,
    vocabulary: 96,
    logitRows: 8,
    elements: 1024,
    experts: 4,
    expertFfn: 16,
    topk: 2,
  },
  matmuls: [
    [16, 32, 32],
    [16, 96, 32],
  ],
  copyBytes: 4096,
  leastSeconds: 0,
}
