// Values that single fields of a model's config may have, for what a person or a file gives without types. What fields must be to each
// other stands with the parts that they describe.
import type { TransformerConfig } from './transformerConfig.js'

type Key = keyof TransformerConfig

const choices: { readonly [K in Key]?: readonly TransformerConfig[K][] } = {
  normalization: ['RMSNorm', 'LayerNorm'],
  activation: ['silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', 'quick_gelu'],
  qkLayernorm: ['perHead', 'allHeads', null],
  softmaxType: ['vanilla', 'learnable'],
}

const switches = [
  'gatedLinearUnit',
  'addQkvBias',
  'addProjBias',
  'addMlpBias',
  'rotaryInterleaved',
  'shareEmbeddingsAndOutputWeights',
  'moeRouterPreSoftmax',
  'moeRouterEnableExpertBias',
  'moeRouterForceLoadBalancing',
  'moeSharedExpertGate',
  'moePadExpertInputToCapacity',
] as const satisfies readonly Key[]

/** Null is a value of theirs. */
const counts = ['windowSize', 'numMoeExperts', 'moeFfnHiddenSize'] as const satisfies readonly Key[]

/** Whatever a field of the model cannot be by itself, a line each. */
export function fieldProblems(config: TransformerConfig): string[] {
  const problems: string[] = []
  const say = (key: Key, fits: boolean, expected: string) =>
    fits || problems.push(`${key} must be ${expected}, got ${JSON.stringify(config[key])}`)
  for (const [key, known] of Object.entries(choices) as [Key, readonly unknown[]][])
    say(key, known.includes(config[key]), `one of ${known.map(String).join(', ')}`)
  for (const key of switches) say(key, typeof config[key] === 'boolean', 'true or false')
  for (const key of counts) {
    const value = config[key]
    say(key, value === null || (Number.isSafeInteger(value) && value >= 1), 'null or a whole number of at least 1')
  }
  const { clipQkv, moeLayerFreq: freq, numLayers } = config
  say('clipQkv', clipQkv === null || clipQkv > 0, 'null or above 0')
  const listed = Array.isArray(freq) && freq.length >= numLayers && freq.every((each) => each === 0 || each === 1)
  say('moeLayerFreq', freq === 1 || listed, `1 or a list of 0 and 1 for each of ${numLayers} layers`)
  return problems
}
