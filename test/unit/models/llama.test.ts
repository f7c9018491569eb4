// The Llama family: configs come back byte for byte, both rope spellings, and the mapping table covers the model.
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { JsonDocument, type JsonValue } from '../../../lib/io/jsonDocument.js'
import { llama } from '../../../lib/models/families/llama.js'
import type { HfConfig } from '../../../lib/models/family.js'
import { shardOf, tensorParallelProblems } from '../../../lib/models/layoutShards.js'
import { bindRules, matchesPattern } from '../../../lib/models/mapping.js'
import { parameterTable } from '../../../lib/models/parameterTable.js'
import type { TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { tilingFault } from '../../../lib/tensor/region.js'

const base = `{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama",
  "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
  "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "hidden_act": "silu",
  "unknown": {"kept": 1.50, "nan": NaN}, EXTRA
}`
const parse = (extra: string) => JsonDocument.parse(base.replace('EXTRA', extra), 'config.json')
const hf = (d: JsonDocument) => d.value as HfConfig
const config = (extra = '"x": 1') => llama.fromHf(hf(parse(extra)))
const edited = (d: JsonDocument, change: Partial<TransformerConfig>) =>
  d.with(llama.toHf({ ...llama.fromHf(hf(d)), ...change }, hf(d)) as JsonValue).text

const scalings = {
  linear: '"rope_scaling": {"type": "linear", "factor": 2.0}',
  dynamic: '"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 5e5',
  llama3:
    '"rope_theta": 500000.0, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}',
  yarn: '"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "mscale": 0.7, "mscale_all_dim": 0.8, "attention_factor": 1.1, "truncate": false, "original_max_position_embeddings": 4096}',
  modern: '"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"',
  none: '"rope_scaling": null, "rope_theta": {"__float__": "10000.0"}, "torch_dtype": "float16"',
  head: '"head_dim": 32, "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true',
}

describe('config', () => {
  it.each(Object.entries(scalings))('%s comes back byte for byte', (_, extra) => {
    const document = parse(extra)
    expect(edited(document, {})).toBe(document.text)
  })
  it('reads the scalings', () => {
    expect(config(scalings.linear).ropeScaling).toEqual({ type: 'linear', factor: 2 })
    expect(config(scalings.llama3)).toMatchObject({
      rotaryBase: 500_000,
      ropeScaling: {
        type: 'llama3',
        factor: 32,
        lowFreqFactor: 1,
        highFreqFactor: 4,
        originalMaxPositionEmbeddings: 8192,
      },
    })
    expect(config(scalings.yarn).ropeScaling).toEqual({
      type: 'yarn',
      factor: 4,
      betaFast: 32,
      mscale: 0.7,
      mscaleAllDim: 0.8,
      attentionFactor: 1.1,
      truncate: false,
      originalMaxPositionEmbeddings: 4096,
    })
    expect(config(scalings.modern)).toMatchObject({ rotaryBase: 1e6, paramsDtype: 'bfloat16' })
    expect(config(scalings.none)).toMatchObject({ rotaryBase: 10_000, paramsDtype: 'float16' })
    expect(config(scalings.head)).toMatchObject({
      kvChannels: 32,
      addQkvBias: true,
      addProjBias: true,
      addMlpBias: true,
      shareEmbeddingsAndOutputWeights: true,
    })
  })
  it('changes only what was changed, in the spelling that is there', () => {
    const old = parse(scalings.llama3)
    expect(edited(old, { rotaryBase: 250_000 })).toBe(old.text.replace('500000.0', '250000.0'))
    expect(edited(old, { ropeScaling: { ...config(scalings.llama3).ropeScaling, factor: 8 } })).toBe(
      old.text.replace('"factor": 32.0', '"factor": 8.0'),
    )
    const modern = parse(scalings.modern)
    expect(edited(modern, { rotaryBase: 2e6 })).toBe(modern.text.replace('1e6', '2000000.0'))
    expect(edited(modern, { paramsDtype: 'float32' })).toBe(modern.text.replace('bfloat16', 'float32'))
    expect(edited(modern, { vocabSize: 132, activation: 'gelu_tanh' })).toBe(
      modern.text.replace('131', '132').replace('"silu"', '"gelu_pytorch_tanh"'),
    )
  })
  it('a new config reads back as the same model', () => {
    for (const extra of Object.values(scalings)) {
      const model = config(extra)
      expect(llama.fromHf(llama.toHf(model, null))).toEqual(model)
    }
  })
  it('refuses what the family cannot say', () => {
    expect(() => llama.toHf({ ...config(), normalization: 'LayerNorm', addProjBias: true }, null)).toThrow(
      /RMSNorm.*addProjBias/,
    )
  })
})

describe('mapping', () => {
  it('covers every variant', () => {
    for (const extra of ['"x": 1', scalings.head, '"tie_word_embeddings": true', '"attention_bias": true']) {
      const c = config(extra)
      const mapping = bindRules(llama.rules(c), parameterTable(c), c)
      expect([...mapping.bindings.keys()].sort()).toEqual(
        parameterTable(c)
          .map((r) => r.name)
          .sort(),
      )
    }
  })
  it('puts query group by query group, gate first', () => {
    const c = config()
    const { byTheirs } = bindRules(llama.rules(c), parameterTable(c), c)
    // 2 groups of 4 heads of 8 channels: group 1 begins at row (4 + 2) * 8 = 48.
    expect(byTheirs.get('model.layers.1.self_attn.q_proj.weight')?.[0]?.part.regions[1]).toEqual({
      from: [32, 0],
      to: [48, 0],
      size: [32, 64],
    })
    expect(byTheirs.get('model.layers.1.self_attn.k_proj.weight')?.[0]?.part.regions[1]).toEqual({
      from: [8, 0],
      to: [80, 0],
      size: [8, 64],
    })
    expect(byTheirs.get('model.layers.1.self_attn.v_proj.weight')?.[0]?.part.regions[0]).toEqual({
      from: [0, 0],
      to: [40, 0],
      size: [8, 64],
    })
    expect(byTheirs.get('model.layers.0.mlp.up_proj.weight')?.[0]?.part.regions).toEqual([
      { from: [0, 0], to: [96, 0], size: [96, 64] },
    ])
  })
  it('names a table with a hole', () => {
    const c = config()
    const rules = llama.rules(c)
    expect(() => bindRules(rules.slice(1), parameterTable(c), c)).toThrow(
      /embedding.word_embeddings.weight has no rule/,
    )
    expect(() => bindRules([...rules, rules[0] as (typeof rules)[0]], parameterTable(c), c)).toThrow(/two rules/)
  })
  it('shards of every layout tile each parameter', () => {
    const sizes = fc.record({
      tp: fc.constantFrom(1, 2, 3, 4, 6, 8),
      groups: fc.integer({ min: 1, max: 8 }),
      per: fc.integer({ min: 1, max: 6 }),
      vocab: fc.integer({ min: 1, max: 50 }),
    })
    fc.assert(
      fc.property(sizes, ({ tp, groups, per, vocab }) => {
        const c: TransformerConfig = {
          ...config(),
          numQueryGroups: groups,
          numAttentionHeads: groups * per,
          kvChannels: 4,
          vocabSize: vocab,
          ffnHiddenSize: 24,
        }
        fc.pre(tensorParallelProblems(c, tp).length === 0)
        for (const row of parameterTable(c)) {
          const blocks = Array.from({ length: tp }, (_, r) => shardOf(row, c, { rank: r, size: tp })).flatMap(
            (s) => s.blocks,
          )
          expect(
            tilingFault(
              row.shape,
              blocks.filter((b) => b.replica === 0).map((b) => ({ start: b.globalStart, size: b.size })),
            ),
          ).toBeNull()
          for (let r = 0; r < tp; r++) {
            const { localShape, blocks: own } = shardOf(row, c, { rank: r, size: tp })
            const fault = tilingFault(
              localShape,
              own.map((b) => ({ start: b.localStart, size: b.size })),
            )
            if (row.cut !== 'vocab') expect(fault).toBeNull()
          }
        }
      }),
      { seed: 2 },
    )
  })
  it('patterns', () => {
    expect(matchesPattern('a.b[0]', 'a.?[*]')).toBe(true)
    expect(matchesPattern('axb', 'a.b')).toBe(false)
    expect(matchesPattern('model.norm.weight', 'norm')).toBe(false)
  })
})
