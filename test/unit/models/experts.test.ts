// Families with experts: published configs come back as they are, their parameters add up to the published sizes, and mapping
// tables cover both spellings of the tensors that Transformers writes.
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { JsonDocument, type JsonValue } from '../../../lib/io/jsonDocument.js'
import { openWeights } from '../../../lib/io/weightFolder.js'
import type { FamilySpec, HfConfig } from '../../../lib/models/family.js'
import { bindRules, type MappingRule, proveCoverage, type Rule } from '../../../lib/models/mapping.js'
import { parameterTable } from '../../../lib/models/parameterTable.js'
import { expressAsHf, familyOf } from '../../../lib/models/registry.js'
import { hasExperts, type TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { volume } from '../../../lib/tensor/region.js'

/** Fields of config.json as published, and how many parameters the published weights have. */
const published: Record<string, { text: string; parameters: number }> = {
  'Qwen3-30B-A3B': {
    parameters: 30_532_122_624,
    text: `{
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
  "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
  "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
  "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936
}`,
  },
  'Qwen1.5-MoE-A2.7B': {
    parameters: 14_315_784_192,
    text: `{
  "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
  "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
  "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408,
  "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
  "num_key_value_heads": 16, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": true,
  "use_sliding_window": false, "vocab_size": 151936
}`,
  },
  'OLMoE-1B-7B-0924': {
    parameters: 6_919_161_856,
    text: `{
  "architectures": ["OlmoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "clip_qkv": null,
  "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024,
  "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false, "num_attention_heads": 16,
  "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
  "output_router_logits": false, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
  "router_aux_loss_coef": 0.01, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 50304
}`,
  },
  'Mixtral-8x7B-v0.1': {
    parameters: 46_702_792_704,
    text: `{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
  "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true,
  "vocab_size": 32000
}`,
  },
}
const fixtures = join(import.meta.dirname, '../../fixtures/moe')
const cases = ['qwen3_moe', 'olmoe', 'mixtral', 'qwen2_moe']

function read(document: JsonDocument) {
  const hf = document.value as HfConfig
  const family = familyOf(hf)
  return { document, hf, family, config: family.fromHf(hf) }
}
const parse = (text: string) => read(JsonDocument.parse(text, 'config.json'))
const models = Object.keys(published)
const model = (name: string, edit: (text: string) => string = (t) => t) => parse(edit(published[name]?.text ?? ''))
const fixture = async (name: string) => read(await JsonDocument.read(join(fixtures, name, 'config.json'), 'ERR_JSON'))
const edited = ({ document, hf, family, config }: ReturnType<typeof read>, change: Partial<TransformerConfig>) =>
  document.with(family.toHf({ ...config, ...change }, hf) as JsonValue).text
const bind = (family: FamilySpec, config: TransformerConfig, names: ReadonlyMap<string, unknown> | null = null) =>
  bindRules(family.rules(config), parameterTable(config), config, names)

describe('published configs', () => {
  it.each(models)('%s comes back byte for byte, and as a new config', (name) => {
    const { document, family, config } = model(name)
    expect(edited(model(name), {})).toBe(document.text)
    expect(family.fromHf(family.toHf(config, null))).toEqual(config)
    expect(expressAsHf(config)?.family).toBe(family)
    expect(family.runs).toBe(true)
  })
  it.each(models)('%s has as many parameters as published', (name) => {
    const { config, family } = model(name)
    const table = parameterTable(config)
    expect(table.reduce((sum, row) => sum + volume(row.shape), 0)).toBe(published[name]?.parameters)
    expect(bind(family, config).bindings.size).toBe(table.length)
  })
  it('say nothing of several balance losses, which no config of Hugging Face has', () => {
    const olmoe = model('OLMoE-1B-7B-0924')
    const several = { moeRouterLoadBalancingType: ['aux_loss', 'seq_aux_loss'], moeAuxLossCoeff: [0.1, 0.2] } as const
    expect(edited(olmoe, several)).toBe(olmoe.document.text)
    expect(JSON.parse(edited(olmoe, { moeAuxLossCoeff: 0.5 }))).toMatchObject({ router_aux_loss_coef: 0.5 })
  })
  it('mean what Transformers makes of them', () => {
    expect(model('Qwen3-30B-A3B').config).toMatchObject({
      numMoeExperts: 128,
      moeRouterTopk: 8,
      moeFfnHiddenSize: 768,
      moeLayerFreq: 1,
      moeRouterPreSoftmax: false,
      moeRouterLoadBalancingType: 'aux_loss',
      moeAuxLossCoeff: 0.001,
      qkLayernorm: 'perHead',
      windowSize: null,
      rotaryBase: 1e6,
    })
    expect(model('OLMoE-1B-7B-0924').config).toMatchObject({
      moeFfnHiddenSize: 1024,
      moeRouterPreSoftmax: true,
      moeRouterLoadBalancingType: 'seq_aux_loss',
      moeAuxLossCoeff: 0.01,
      qkLayernorm: 'allHeads',
      clipQkv: null,
    })
    expect(model('Mixtral-8x7B-v0.1').config).toMatchObject({
      numMoeExperts: 8,
      moeFfnHiddenSize: 14_336,
      moeRouterPreSoftmax: false,
      qkLayernorm: null,
      windowSize: null,
      rotaryBase: 1e6,
    })
    const bare = model('Mixtral-8x7B-v0.1', (t) => t.replace('"rope_theta": 1000000.0, ', ''))
    expect(bare.config.rotaryBase).toBe(1e6)
  })
})

describe('fields of their own', () => {
  const qwen = (more: string) => model('Qwen3-30B-A3B', (t) => t.replace('"mlp_only_layers": []', more))
  it('place dense layers among those with experts', () => {
    const { config } = qwen('"mlp_only_layers": [0, 47, 99]')
    const dense = Array.from({ length: 48 }, (_, i) => i).filter((i) => !hasExperts(config, i))
    expect(dense).toEqual([0, 47])
    const step = model('Qwen3-30B-A3B', (t) => t.replace('"decoder_sparse_step": 1', '"decoder_sparse_step": 3'))
    expect([0, 1, 2, 3, 4, 5].map((i) => hasExperts(step.config, i))).toEqual([false, false, true, false, false, true])
    for (const each of [step, qwen('"mlp_only_layers": [3]'), qwen('"mlp_only_layers": null')]) {
      expect(edited(each, {})).toBe(each.document.text)
      expect(each.family.fromHf(each.family.toHf(each.config, null))).toEqual(each.config)
    }
  })
  it('have a window only where it is used', () => {
    const off = model('Qwen3-30B-A3B', (t) => t.replace('"sliding_window": null', '"sliding_window": 4096'))
    expect(off.config.windowSize).toBeNull()
    const on = edited(off, { windowSize: 128 })
    expect(parse(on).config.windowSize).toBe(128)
    expect(on).toBe(
      off.document.text
        .replace('"sliding_window": 4096', '"sliding_window": 128')
        .replace('"use_sliding_window": false', '"use_sliding_window": true'),
    )
    const mixtral = model('Mixtral-8x7B-v0.1')
    expect(parse(edited(mixtral, { windowSize: 4096 })).config.windowSize).toBe(4096)
  })
  it('change alone, in the spelling that is there', async () => {
    const qwen3 = await fixture('qwen3_moe')
    expect(qwen3.hf['num_local_experts']).toBe(4)
    expect(edited(qwen3, { numMoeExperts: 3 })).toBe(
      qwen3.document.text.replace('"num_local_experts": 4', '"num_local_experts": 3'),
    )
    const hub = model('Qwen3-30B-A3B')
    expect(edited(hub, { numMoeExperts: 64, moeRouterPreSoftmax: true })).toBe(
      hub.document.text
        .replace('"num_experts": 128', '"num_experts": 64')
        .replace('"norm_topk_prob": true', '"norm_topk_prob": false'),
    )
    const olmoe = model('OLMoE-1B-7B-0924')
    expect(edited(olmoe, { clipQkv: 10 })).toBe(olmoe.document.text.replace('"clip_qkv": null', '"clip_qkv": 10'))
  })
  it('are refused when they make no sense, all together', () => {
    const broken = (text: string) => text.replace('"num_experts_per_tok": 8', '"num_experts_per_tok": 129')
    expect(() =>
      model('Qwen3-30B-A3B', (t) => broken(t).replace('"mlp_only_layers": []', '"mlp_only_layers": "all"')),
    ).toThrow(/num_experts_per_tok must be from 1 to 128.*mlp_only_layers must be a list/)
    expect(() => model('Qwen3-30B-A3B', (t) => t.replace('{', '{"num_local_experts": 4,'))).toThrow(/must be equal/)
    expect(() => model('Qwen3-30B-A3B', (t) => t.replace('"num_experts": 128', '"num_experts": 60000'))).toThrow(
      /more than the 1048576 experts/,
    )
    expect(() => model('OLMoE-1B-7B-0924', (t) => t.replace('{', '{"head_dim": 64,'))).toThrow(/head_dim=64/)
    const { config, family } = model('Mixtral-8x7B-v0.1')
    expect(() => family.toHf({ ...config, qkLayernorm: 'perHead', moeFfnHiddenSize: 7 }, null)).toThrow(
      /qkLayernorm="perHead" would come back as null; moeFfnHiddenSize=7 would come back as 14336/,
    )
    expect(() => familyOf({ architectures: ['LlamaForCausalLM'], model_type: 'llama' }).toHf(config, null)).toThrow(
      /numMoeExperts=8 would come back as null/,
    )
  })
})

describe('mapping', () => {
  it.each(cases.flatMap((name) => [name, `${name}_fused`]))('covers what Transformers writes: %s', async (name) => {
    const { family, config } = await fixture(name)
    const { tensors } = await openWeights(join(fixtures, name))
    const facts = new Map([...tensors].map(([key, { entry }]) => [key, entry]))
    const mapping = bind(family, config, facts)
    const { mapped, partial } = proveCoverage(mapping, facts)
    expect([mapped.length, partial]).toEqual([facts.size, false])
    const refused = (change: (m: typeof facts) => void) => {
      const spoilt = new Map(facts)
      change(spoilt)
      return () => proveCoverage(bind(family, config, spoilt), spoilt)
    }
    const expert = [...facts.keys()].find((key) => key.includes('.experts.')) as string
    const entry = facts.get(expert) as typeof facts extends Map<string, infer E> ? E : never
    expect(refused((m) => m.delete(expert))).toThrow(new RegExp(`missing from the source: ${expert}`))
    const [first = 0, ...rest] = entry.shape
    expect(refused((m) => m.set(expert, { ...entry, shape: [first + 1, ...rest] }))).toThrow(/wrong shape/)
    const extra = name.endsWith('_fused') ? `${expert}.bias` : expert.replace(/experts\.\d+/, 'experts.99')
    expect(refused((m) => m.set(extra, entry))).toThrow(new RegExp(`unexpected in the source: ${extra}`))
  })
  it('refuses a source that has both spellings', async () => {
    const { family, config } = await fixture('olmoe')
    const facts = new Map<string, { dtype: 'bfloat16'; shape: readonly number[] }>()
    for (const name of ['olmoe', 'olmoe_fused'])
      for (const [key, { entry }] of (await openWeights(join(fixtures, name))).tensors)
        facts.set(key, { dtype: 'bfloat16', shape: entry.shape })
    expect(() => proveCoverage(bind(family, config, facts), facts)).toThrow(
      /6 tensors unexpected in the source: model.layers.0.mlp.experts.gate_up_proj, model/,
    )
  })
  it('names new files as the hub does, expert by expert', () => {
    const { family, config } = model('Mixtral-8x7B-v0.1')
    const { byTheirs, bindings } = bind(family, config)
    expect(bindings.get('decoder.layers.31.mlp.experts.linear_fc1.weight7')?.parts.map((p) => p.name)).toEqual([
      'model.layers.31.block_sparse_moe.experts.7.w1.weight',
      'model.layers.31.block_sparse_moe.experts.7.w3.weight',
    ])
    expect(bindings.has('decoder.layers.0.pre_mlp_layernorm.weight')).toBe(true)
    expect(byTheirs.get('model.layers.2.block_sparse_moe.gate.weight')?.[0]?.binding.ours).toBe(
      'decoder.layers.2.mlp.router.weight',
    )
  })
  it('tells a table that leaves a slice of a stack unread, or reads one twice', async () => {
    const { family, config } = await fixture('mixtral_fused')
    const { tensors } = await openWeights(join(fixtures, 'mixtral_fused'))
    const fewer = parameterTable(config).filter((row) => row.expert !== 3)
    expect(() => bindRules(family.rules(config), fewer, config, tensors)).toThrow(/3 of the 4 slices of .*gate_up_proj/)
    const rules = family.rules(config).map((rule): Rule => {
      if (rule.kind !== 'spellings') return rule
      const theirs = rule.choices.map((choice) =>
        choice.map((r): MappingRule => ({ ...r, theirs: r.theirs.map((n) => n.replace('gate_up_proj', 'down_proj')) })),
      )
      return { ...rule, choices: theirs }
    })
    expect(() => bindRules(rules, parameterTable(config), config, tensors)).toThrow(/down_proj is read by two rules/)
  })
})
