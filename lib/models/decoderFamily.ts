// What families of decoder-only models share: the fields of their Hugging Face configs that all have, and the translation in both
// directions. A family file says only what is its own. Fields that nobody names stay in the config as they are.
import { isDeepStrictEqual } from 'node:util'
import { parseDtype } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { ConfigReader } from './configReader.js'
import type { FamilySpec, HfConfig, HfValue } from './family.js'
import type { Rule } from './mapping.js'
import { readRope, sameRope, writeRope } from './ropeConfig.js'
import { type ActivationName, plainDecoder, type TransformerConfig, transformerKeys } from './transformerConfig.js'

/** Our field and the HF field that means the same, with all its spellings: the first is for new configs. */
export type FieldPair = readonly [keyof TransformerConfig, ...string[]]

/** A family as its file describes it. */
export interface DecoderFamily {
  readonly architecture: string
  readonly modelType: string
  readonly runs: boolean
  /** What HF fields that are absent mean. */
  readonly absent: Readonly<Record<'maxPositionEmbeddings' | 'layernormEpsilon' | 'rotaryBase', number>>
  /** The family's own fields that are one to one, for writing. */
  readonly fields: readonly FieldPair[]
  /** Reads the family's own fields; `common` holds all that the families share. */
  read(read: ConfigReader, common: TransformerConfig): Partial<TransformerConfig>
  /** Writes what is not one to one, where it changed. */
  write?(
    hf: Record<string, HfValue>,
    config: TransformerConfig,
    changed: (key: keyof TransformerConfig) => boolean,
  ): void
  rules(config: TransformerConfig): Rule[]
}

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

const commonFields: readonly FieldPair[] = [
  ['vocabSize', 'vocab_size'],
  ['hiddenSize', 'hidden_size'],
  ['ffnHiddenSize', 'intermediate_size'],
  ['numLayers', 'num_hidden_layers'],
  ['numAttentionHeads', 'num_attention_heads'],
  ['numQueryGroups', 'num_key_value_heads'],
  ['maxPositionEmbeddings', 'max_position_embeddings'],
  ['initMethodStd', 'initializer_range'],
  ['layernormEpsilon', 'rms_norm_eps'],
  ['shareEmbeddingsAndOutputWeights', 'tie_word_embeddings'],
  ['attentionDropout', 'attention_dropout'],
]

/** Settings of training that no HF config has. */
const unwritten: readonly (keyof TransformerConfig)[] = ['hiddenDropout', 'moeRouterLoadBalancingType']

/** Coefficients of several balance losses: an HF config has one. */
const unwritable = (key: keyof TransformerConfig, config: TransformerConfig): boolean =>
  key === 'moeAuxLossCoeff' && Array.isArray(config[key])

/** A family from its description. */
export function defineFamily(family: DecoderFamily): FamilySpec {
  const { architecture, modelType, runs, rules } = family
  const fromHf = (hf: HfConfig): TransformerConfig => {
    const read = new ConfigReader(hf, modelType)
    const common = readCommon(read, family.absent)
    const config = { ...common, ...family.read(read, common) }
    read.finish()
    return config
  }
  const toHf = (config: TransformerConfig, source: HfConfig | null): HfConfig => {
    const hf: Record<string, HfValue> = Object.assign(
      Object.create(null),
      source ?? { architectures: [architecture], model_type: modelType },
    )
    const before = source === null ? null : fromHf(source)
    const changed = (key: keyof TransformerConfig) => before === null || !sameField(key, before, config)
    for (const [key, ...names] of [...commonFields, ...family.fields]) {
      if (changed(key) && !unwritable(key, config)) hf[spellingIn(hf, names)] = config[key] as HfValue
    }
    if (changed('activation'))
      hf['hidden_act'] = Object.keys(activations).find((name) => activations[name] === config.activation) ?? null
    if (changed('paramsDtype')) hf['dtype' in hf ? 'dtype' : 'torch_dtype'] = config.paramsDtype
    if (changed('rotaryBase') || changed('ropeScaling')) writeRope(hf, config.rotaryBase, config.ropeScaling)
    family.write?.(hf, config, changed)
    const problems = lostFields(config, hf, fromHf)
    if (problems.length > 0)
      throw new ViaductError('ERR_CONFIG', modelType, `cannot be written as ${architecture}: ${problems.join('; ')}`, {
        problems,
      })
    return hf
  }
  return { architectures: [architecture], modelType, runs, fromHf, toHf, rules }
}

/** The name under which a config has a field; the first one where it has none. */
export function spellingIn(hf: HfConfig, names: readonly string[]): string {
  return names.find((name) => Object.hasOwn(hf, name)) ?? (names[0] as string)
}

function sameField(key: keyof TransformerConfig, a: TransformerConfig, b: TransformerConfig): boolean {
  return key === 'ropeScaling' ? sameRope(a.ropeScaling, b.ropeScaling) : isDeepStrictEqual(a[key], b[key])
}

/** What a config that was written does not say as it was meant: it is read again and compared. */
function lostFields(config: TransformerConfig, hf: HfConfig, fromHf: FamilySpec['fromHf']): string[] {
  let back: TransformerConfig
  try {
    back = fromHf(hf)
  } catch (error) {
    if (error instanceof ViaductError) return [error.message]
    throw error
  }
  // A scaling may leave fields to their defaults, which reading fills in.
  const meant = { ...config, ropeScaling: { ...back.ropeScaling, ...config.ropeScaling } }
  return transformerKeys
    .filter((key) => !unwritten.includes(key) && !unwritable(key, config) && !sameField(key, meant, back))
    .map((key) => `${key}=${JSON.stringify(config[key])} would come back as ${JSON.stringify(back[key])}`)
}

function readCommon(read: ConfigReader, absent: DecoderFamily['absent']): TransformerConfig {
  const hiddenSize = read.count('hidden_size', { max: 2 ** 24 })
  const numAttentionHeads = read.count('num_attention_heads', { max: 2 ** 20 })
  const numQueryGroups = read.count('num_key_value_heads', { max: 2 ** 20, fallback: numAttentionHeads })
  if (numAttentionHeads % numQueryGroups !== 0)
    read.problem(`num_key_value_heads=${numQueryGroups} must divide num_attention_heads=${numAttentionHeads}`)
  const maxPositionEmbeddings = read.count('max_position_embeddings', {
    max: 2 ** 31 - 1,
    fallback: absent.maxPositionEmbeddings,
  })
  const rope = readRope(read, maxPositionEmbeddings, absent.rotaryBase)
  if (read.has('quantization_config'))
    read.problem(
      'quantization_config is set: this family has no rule that dequantises, save the model unquantised first',
    )
  return {
    numLayers: read.count('num_hidden_layers', { max: 10_000 }),
    hiddenSize,
    ffnHiddenSize: read.count('intermediate_size', { max: 2 ** 26 }),
    numAttentionHeads,
    numQueryGroups,
    kvChannels: readHeadDim(read, hiddenSize, numAttentionHeads),
    normalization: 'RMSNorm',
    layernormEpsilon: read.real('rms_norm_eps', { min: 0, fallback: absent.layernormEpsilon }),
    activation: readActivation(read),
    gatedLinearUnit: true,
    addQkvBias: false,
    addProjBias: false,
    addMlpBias: false,
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
}

function readHeadDim(read: ConfigReader, hiddenSize: number, heads: number): number {
  if (!read.has('head_dim') && hiddenSize % heads !== 0) {
    read.problem(`num_attention_heads=${heads} must divide hidden_size=${hiddenSize} where head_dim is not given`)
    return 2
  }
  const channels = read.has('head_dim') ? read.count('head_dim', { max: 2 ** 20 }) : hiddenSize / heads
  if (channels % 2 !== 0) read.problem(`head_dim=${channels} must be even: rotary embeddings turn pairs`)
  return channels
}

function readActivation(read: ConfigReader): ActivationName {
  const name = read.text('hidden_act', 'silu')
  if (Object.hasOwn(activations, name)) return activations[name] as ActivationName
  read.problem(`hidden_act must be one of ${Object.keys(activations).join(', ')}, got ${JSON.stringify(name)}`)
  return 'silu'
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

/** `attention_bias`: biases of all four projections. */
export function readAttentionBias(read: ConfigReader): Pick<TransformerConfig, 'addQkvBias' | 'addProjBias'> {
  const bias = read.flag('attention_bias', false)
  return { addQkvBias: bias, addProjBias: bias }
}

/**
 * Fields that all mixtures of experts have.
 * @param names - spellings of the number of experts.
 * @param auxLoss - what an absent router_aux_loss_coef means.
 */
export function readExperts(
  read: ConfigReader,
  { numLayers }: TransformerConfig,
  names: readonly string[],
  auxLoss: number,
): Partial<TransformerConfig> {
  const given = names.filter((name) => read.has(name))
  if (new Set(given.map((name) => read.get(name))).size > 1) read.problem(`${given.join(' and ')} must be equal`)
  const name = given[0] ?? (names[0] as string)
  const numMoeExperts = read.count(name, { max: 2 ** 16 })
  if (numMoeExperts * numLayers > 2 ** 20)
    read.problem(`${name}=${numMoeExperts} in ${numLayers} layers are more than the ${2 ** 20} experts of a model`)
  return {
    numMoeExperts,
    moeRouterTopk: read.count('num_experts_per_tok', { max: numMoeExperts }),
    moeAuxLossCoeff: read.real('router_aux_loss_coef', { min: 0, fallback: auxLoss }),
    moeRouterLoadBalancingType: 'aux_loss',
  }
}

/** For writing what readExperts reads. */
export function expertFields(names: readonly string[]): FieldPair[] {
  return [
    ['numMoeExperts', ...names],
    ['moeRouterTopk', 'num_experts_per_tok'],
    ['moeAuxLossCoeff', 'router_aux_loss_coef'],
  ]
}

/** A layer has experts unless `mlp_only_layers` names it or it is none of every `decoder_sparse_step`. */
export function readDenseLayers(read: ConfigReader, numLayers: number): TransformerConfig['moeLayerFreq'] {
  const step = read.count('decoder_sparse_step', { max: 2 ** 31 - 1, fallback: 1 })
  const dense = read.get('mlp_only_layers') ?? []
  if (!Array.isArray(dense) || !dense.every((i) => Number.isInteger(i))) {
    read.problem(`mlp_only_layers must be a list of whole numbers, got ${JSON.stringify(dense)}`)
    return 1
  }
  const without = new Set(dense)
  const layers = Array.from({ length: numLayers }, (_, i) => (!without.has(i) && (i + 1) % step === 0 ? 1 : 0))
  return layers.includes(0) ? layers : 1
}

/** Writes what readDenseLayers reads. */
export function writeDenseLayers(hf: Record<string, HfValue>, moeLayerFreq: TransformerConfig['moeLayerFreq']): void {
  const layers = moeLayerFreq === 1 ? [] : moeLayerFreq
  const dense = layers.flatMap((has, i) => (has === 0 ? [i] : []))
  Object.assign(hf, { decoder_sparse_step: 1, mlp_only_layers: dense })
}
