// Hugging Face's Llama tensors in Megatron's layout and gradients back, written from the two definitions, independent of lib/models'
// mapping rules. Whole tensors only: one rank.
import { join } from 'node:path'
import { plainDecoder, type TransformerConfig } from '../../lib/models/transformerConfig.js'
import { fixtureConfig, type HostTensor, llamaFixtures, readSafetensorsFile } from '../fixtures/safetensorsFile.js'

export interface Fixture {
  readonly config: TransformerConfig
  /** HF name to values. */
  readonly weights: ReadonlyMap<string, HostTensor>
  /** Inputs and results of Transformers. */
  readonly expected: ReadonlyMap<string, HostTensor>
}

const camel = (key: string) => key.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase())

export function readFixture(name: string): Fixture {
  const hf = fixtureConfig(name) as unknown as Record<string, number & boolean> & {
    rope_scaling: Record<string, unknown> | null
  }
  const scaling = Object.fromEntries(Object.entries(hf.rope_scaling ?? {}).map(([k, v]) => [camel(k), v]))
  const config: TransformerConfig = {
    numLayers: hf['num_hidden_layers']!,
    hiddenSize: hf['hidden_size']!,
    ffnHiddenSize: hf['intermediate_size']!,
    numAttentionHeads: hf['num_attention_heads']!,
    numQueryGroups: hf['num_key_value_heads']!,
    kvChannels: hf['head_dim']!,
    normalization: 'RMSNorm',
    layernormEpsilon: hf['rms_norm_eps']!,
    activation: 'silu',
    gatedLinearUnit: true,
    addQkvBias: hf['attention_bias']!,
    addProjBias: hf['attention_bias']!,
    addMlpBias: hf['mlp_bias']!,
    rotaryBase: hf['rope_theta']!,
    rotaryPercent: 1,
    rotaryInterleaved: false,
    ropeScaling: { ...scaling, type: (scaling['ropeType'] ?? scaling['type'] ?? 'default') as 'default' },
    maxPositionEmbeddings: hf['max_position_embeddings']!,
    vocabSize: hf['vocab_size']!,
    shareEmbeddingsAndOutputWeights: hf['tie_word_embeddings']!,
    initMethodStd: 0.02,
    attentionDropout: 0,
    hiddenDropout: 0,
    paramsDtype: 'float32',
    ...plainDecoder,
  }
  const folder = join(llamaFixtures, name)
  return {
    config,
    weights: readSafetensorsFile(join(folder, 'model.safetensors')),
    expected: readSafetensorsFile(join(folder, 'expected.safetensors')),
  }
}

/** Where rows of a Megatron tensor come from: HF name and first row, count rows each. */
interface Run {
  readonly name: string
  readonly start: number
  readonly count: number
}

function attentionRuns(
  prefix: string,
  suffix: string,
  { numQueryGroups: G, numAttentionHeads, kvChannels: D }: TransformerConfig,
): Run[] {
  const R = numAttentionHeads / G
  const runs: Run[] = []
  for (let g = 0; g < G; g++) {
    runs.push({ name: `${prefix}q_proj.${suffix}`, start: g * R * D, count: R * D })
    runs.push({ name: `${prefix}k_proj.${suffix}`, start: g * D, count: D })
    runs.push({ name: `${prefix}v_proj.${suffix}`, start: g * D, count: D })
  }
  return runs
}

/** The HF rows that make up a Megatron parameter, in order. */
export function runsOf(name: string, config: TransformerConfig): Run[] {
  const whole = (hf: string): Run[] => [{ name: hf, start: 0, count: -1 }]
  const layer = /^decoder\.layers\.(\d+)\.(.*)$/.exec(name)
  if (!layer) {
    const outer: Record<string, string> = {
      'embedding.word_embeddings.weight': 'model.embed_tokens.weight',
      'decoder.final_layernorm.weight': 'model.norm.weight',
      'output_layer.weight': 'lm_head.weight',
    }
    return whole(outer[name]!)
  }
  const prefix = `model.layers.${layer[1]}.`
  const part = layer[2]!
  const suffix = part.endsWith('.bias') ? 'bias' : 'weight'
  const F = config.ffnHiddenSize
  if (part === 'self_attention.linear_qkv.layer_norm_weight') return whole(`${prefix}input_layernorm.weight`)
  if (part === 'mlp.linear_fc1.layer_norm_weight') return whole(`${prefix}post_attention_layernorm.weight`)
  if (part.includes('linear_qkv')) return attentionRuns(`${prefix}self_attn.`, suffix, config)
  if (part.includes('linear_proj')) return whole(`${prefix}self_attn.o_proj.${suffix}`)
  if (part.includes('linear_fc2')) return whole(`${prefix}mlp.down_proj.${suffix}`)
  return ['gate', 'up'].map((half) => ({ name: `${prefix}mlp.${half}_proj.${suffix}`, start: 0, count: F }))
}

/** A Megatron tensor out of HF tensors. */
export function pack(runs: readonly Run[], source: ReadonlyMap<string, HostTensor>): Float32Array {
  const parts = runs.map(({ name, start, count }) => {
    const { data, shape } = source.get(name)!
    const width = data.length / shape[0]!
    return count < 0 ? data : data.subarray(start * width, (start + count) * width)
  })
  const out = new Float32Array(parts.reduce((n, part) => n + part.length, 0))
  let at = 0
  for (const part of parts) {
    out.set(part, at)
    at += part.length
  }
  return out
}
