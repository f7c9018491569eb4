// Llama 2, 3, 3.1, 3.2, 3.3 (LlamaForCausalLM): Hugging Face config to TransformerConfig and back, and the mapping table.
// Every config field that stands not in `fields` is kept as it is; both rope spellings are read, the one that is there is kept.
import { parseDtype } from '../../base/dtype.js'
import { ViaductError } from '../../base/errors.js'
import { ConfigReader } from '../configReader.js'
import type { FamilySpec, HfConfig, HfValue } from '../family.js'
import { derived, gated, qkv, type Rule, rename, tied } from '../mapping.js'
import { readRope, sameRope, writeRope } from '../ropeConfig.js'
import { type ActivationName, plainDecoder, type TransformerConfig } from '../transformerConfig.js'

/** HF names of activations; the first of a name is the one that is written. */
const activations: Readonly<Record<string, ActivationName>> = {
  silu: 'silu',
  swish: 'silu',
  gelu: 'gelu',
  gelu_pytorch_tanh: 'gelu_tanh',
  gelu_new: 'gelu_tanh',
  gelu_fast: 'gelu_tanh',
  relu: 'relu',
  relu2: 'relu2',
  quick_gelu: 'quick_gelu',
}

function fromHf(hf: HfConfig): TransformerConfig {
  const read = new ConfigReader(hf, 'llama')
  const hiddenSize = read.count('hidden_size', { max: 2 ** 24 })
  const numLayers = read.count('num_hidden_layers', { max: 10_000 })
  const numAttentionHeads = read.count('num_attention_heads', { max: 2 ** 20 })
  const numQueryGroups = read.count('num_key_value_heads', { max: 2 ** 20, fallback: numAttentionHeads })
  const headDim = read.has('head_dim') ? read.count('head_dim', { max: 2 ** 20 }) : null
  if (headDim === null && hiddenSize % numAttentionHeads !== 0) {
    read.problem(
      `num_attention_heads=${numAttentionHeads} must divide hidden_size=${hiddenSize} where head_dim is not given`,
    )
  }
  if (numAttentionHeads % numQueryGroups !== 0) {
    read.problem(`num_key_value_heads=${numQueryGroups} must divide num_attention_heads=${numAttentionHeads}`)
  }
  const kvChannels = headDim ?? Math.floor(hiddenSize / numAttentionHeads)
  if (kvChannels % 2 !== 0 && hiddenSize % numAttentionHeads === 0)
    read.problem(`head_dim=${kvChannels} must be even: rotary embeddings turn pairs`)
  const maxPositionEmbeddings = read.count('max_position_embeddings', { max: 2 ** 31 - 1, fallback: 2048 })
  const act = read.text('hidden_act', 'silu')
  const activation = Object.hasOwn(activations, act) ? (activations[act] as ActivationName) : 'silu'
  if (!Object.hasOwn(activations, act))
    read.problem(`hidden_act must be one of ${Object.keys(activations).join(', ')}, got ${JSON.stringify(act)}`)
  const attentionBias = read.flag('attention_bias', false)
  const mlpBias = read.flag('mlp_bias', false)
  const rope = readRope(read, maxPositionEmbeddings)
  if (read.has('quantization_config')) {
    read.problem(
      'quantization_config is set: this family has no rule that dequantises, save the model unquantised first',
    )
  }
  const config: TransformerConfig = {
    numLayers,
    hiddenSize,
    ffnHiddenSize: read.count('intermediate_size', { max: 2 ** 26 }),
    numAttentionHeads,
    numQueryGroups,
    kvChannels,
    normalization: 'RMSNorm',
    layernormEpsilon: read.real('rms_norm_eps', { min: 0, fallback: 1e-6 }),
    activation,
    gatedLinearUnit: true,
    addQkvBias: attentionBias,
    addProjBias: attentionBias,
    addMlpBias: mlpBias,
    rotaryBase: rope.base,
    rotaryPercent: 1,
    rotaryInterleaved: false,
    ropeScaling: rope.scaling,
    maxPositionEmbeddings,
    vocabSize: read.count('vocab_size', { max: 2 ** 31 - 1 }),
    shareEmbeddingsAndOutputWeights: read.flag('tie_word_embeddings', false),
    initMethodStd: read.real('initializer_range', { min: 0, fallback: 0.02 }),
    attentionDropout: read.real('attention_dropout', { min: 0, max: 1, fallback: 0 }),
    hiddenDropout: 0,
    paramsDtype: readDtype(read),
    ...plainDecoder,
  }
  read.finish()
  return config
}

function readDtype(read: ConfigReader): TransformerConfig['paramsDtype'] {
  const key = read.has('dtype') ? 'dtype' : 'torch_dtype'
  const name = read.text(key, 'float32')
  try {
    return parseDtype(name)
  } catch {
    read.problem(`${key} must be the name of a dtype, got ${JSON.stringify(name)}`)
    return 'float32'
  }
}

/** HF key and value of each field that is one to one. */
const fields: readonly (readonly [keyof TransformerConfig, string])[] = [
  ['vocabSize', 'vocab_size'],
  ['hiddenSize', 'hidden_size'],
  ['ffnHiddenSize', 'intermediate_size'],
  ['numLayers', 'num_hidden_layers'],
  ['numAttentionHeads', 'num_attention_heads'],
  ['numQueryGroups', 'num_key_value_heads'],
  ['kvChannels', 'head_dim'],
  ['maxPositionEmbeddings', 'max_position_embeddings'],
  ['initMethodStd', 'initializer_range'],
  ['layernormEpsilon', 'rms_norm_eps'],
  ['shareEmbeddingsAndOutputWeights', 'tie_word_embeddings'],
  ['addQkvBias', 'attention_bias'],
  ['addMlpBias', 'mlp_bias'],
  ['attentionDropout', 'attention_dropout'],
]

function toHf(config: TransformerConfig, source: HfConfig | null): HfConfig {
  const problems: string[] = []
  if (config.normalization !== 'RMSNorm') problems.push(`normalization must be RMSNorm, got ${config.normalization}`)
  if (!config.gatedLinearUnit) problems.push('gatedLinearUnit must be true')
  if (config.addProjBias !== config.addQkvBias) problems.push('addProjBias must equal addQkvBias')
  if (config.rotaryInterleaved || config.rotaryPercent !== 1)
    problems.push('rotary embeddings must turn whole heads in halves')
  const act = Object.keys(activations).find((name) => activations[name] === config.activation)
  if (act === undefined) problems.push(`activation ${config.activation} has no name there`)
  if (problems.length > 0)
    throw new ViaductError('ERR_CONFIG', 'llama', `cannot be written as LlamaForCausalLM: ${problems.join('; ')}`, {
      problems,
    })

  const hf: Record<string, HfValue> = Object.assign(
    Object.create(null),
    source ?? { architectures: ['LlamaForCausalLM'], model_type: 'llama' },
  )
  const before = source === null ? null : fromHf(source)
  for (const [ours, theirs] of fields) {
    if (before === null || before[ours] !== config[ours]) hf[theirs] = config[ours] as HfValue
  }
  if (before === null || before.activation !== config.activation) hf['hidden_act'] = act as string
  if (before === null || before.paramsDtype !== config.paramsDtype)
    hf['dtype' in hf ? 'dtype' : 'torch_dtype'] = config.paramsDtype
  if (before === null || before.rotaryBase !== config.rotaryBase || !sameRope(before.ropeScaling, config.ropeScaling)) {
    writeRope(hf, config.rotaryBase, config.ropeScaling)
  }
  return hf
}

/** Inverse frequencies without scaling, which checkpoints of 2023 carry per layer: base^(-2i/d). */
function inverseFrequencies(config: TransformerConfig): Float64Array {
  return Float64Array.from(
    { length: config.kvChannels / 2 },
    (_, i) => config.rotaryBase ** (-(2 * i) / config.kvChannels),
  )
}

function rules(config: TransformerConfig): Rule[] {
  const ours = 'decoder.layers.*'
  const theirs = 'model.layers.*'
  const heads = { q: `${theirs}.self_attn.q_proj`, k: `${theirs}.self_attn.k_proj`, v: `${theirs}.self_attn.v_proj` }
  const both = (kind: 'weight' | 'bias'): Rule[] => [
    qkv(`${ours}.self_attention.linear_qkv.${kind}`, {
      q: `${heads.q}.${kind}`,
      k: `${heads.k}.${kind}`,
      v: `${heads.v}.${kind}`,
    }),
    rename(`${ours}.self_attention.linear_proj.${kind}`, `${theirs}.self_attn.o_proj.${kind}`),
    gated(`${ours}.mlp.linear_fc1.${kind}`, {
      gate: `${theirs}.mlp.gate_proj.${kind}`,
      up: `${theirs}.mlp.up_proj.${kind}`,
    }),
    rename(`${ours}.mlp.linear_fc2.${kind}`, `${theirs}.mlp.down_proj.${kind}`),
  ]
  return [
    rename('embedding.word_embeddings.weight', 'model.embed_tokens.weight'),
    rename(`${ours}.self_attention.linear_qkv.layer_norm_weight`, `${theirs}.input_layernorm.weight`),
    ...both('weight'),
    ...both('bias'),
    rename(`${ours}.mlp.linear_fc1.layer_norm_weight`, `${theirs}.post_attention_layernorm.weight`),
    rename('decoder.final_layernorm.weight', 'model.norm.weight'),
    config.shareEmbeddingsAndOutputWeights
      ? tied('lm_head.weight', 'model.embed_tokens.weight')
      : rename('output_layer.weight', 'lm_head.weight'),
    derived(`${theirs}.self_attn.rotary_emb.inv_freq`, (c) => [c.kvChannels / 2], inverseFrequencies),
  ]
}

/** The Llama family. */
export const llama: FamilySpec = {
  architectures: ['LlamaForCausalLM'],
  modelType: 'llama',
  fromHf,
  toHf,
  rules,
}
