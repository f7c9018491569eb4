// Recompute: the same bits in every form, and of each layer exactly the tensors that the form says are kept, by the device's live counters.
import * as fc from 'fast-check'
import { afterAll, describe, expect, test } from 'vitest'
import {
  defaultRecompute,
  layerRuns,
  type RecomputeModule,
  type RecomputeSettings,
  recomputeProblems,
} from '../../../lib/models/recomputeSettings.js'
import type { TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { Tensor } from '../../../lib/tensor/tensor.js'
import { base, layerBytes, type Measured, measure, root } from './measuredPass.js'

afterAll(() => root.scope.close())

/** Bytes that a form keeps of all layers. */
function expectedKept(config: TransformerConfig, settings: RecomputeSettings): number {
  const { norm, attention, mlp, acted, all } = layerBytes(config)
  const selected = settings.recomputeGranularity === 'selective' ? (settings.recomputeModules ?? []) : []
  const has = (name: RecomputeModule) => selected.includes(name)
  let layer = all
  if (has('core_attn')) layer -= attention.output + attention.lse
  // The feed-forward part's input, less both halves of the norm and all behind it.
  if (has('mlp')) layer -= norm.output + norm.statistics + mlp
  if (has('layernorm')) layer -= norm.output * (has('mlp') ? 1 : 2)
  if (has('mlp_act') && !has('mlp') && config.gatedLinearUnit) layer -= acted
  const runs = layerRuns(settings, { first: 0, end: config.numLayers, hasEmbedding: true, hasHead: true })
  return runs.reduce((sum, { layers, again }) => sum + (again ? norm.input : layers.length * layer), 0)
}

const modules = ['core_attn', 'layernorm', 'mlp_act', 'mlp'] as const
const settingsOf = (given: Partial<RecomputeSettings>): RecomputeSettings => ({ ...defaultRecompute, ...given })
const selective = (...recomputeModules: RecomputeModule[]) =>
  settingsOf({ recomputeGranularity: 'selective', recomputeModules })
const full = (recomputeMethod: 'uniform' | 'block' | null, recomputeNumLayers: number | null) =>
  settingsOf({ recomputeGranularity: 'full', recomputeMethod, recomputeNumLayers })

const forms = fc.oneof(
  fc.subarray([...modules], { minLength: 1 }).map((names) => selective(...names)),
  fc
    .tuple(fc.constantFrom('uniform' as const, 'block' as const), fc.integer({ min: 1, max: base.numLayers }))
    .map(([method, count]) => full(method, count)),
)
const models = fc.record({
  hiddenDropout: fc.constantFrom(0, 0.2),
  paramsDtype: fc.constantFrom('float32' as const, 'bfloat16' as const),
  normalization: fc.constantFrom('RMSNorm' as const, 'LayerNorm' as const),
  gatedLinearUnit: fc.boolean(),
  addProjBias: fc.boolean(),
  numLayers: fc.constantFrom(1, 3, 6),
})

describe('recompute', () => {
  test('any form of any model has the bits of none, and keeps what it says', async () => {
    const none = new Map<string, Promise<Measured>>()
    const without = (changes: Partial<TransformerConfig>) => {
      const name = JSON.stringify(changes)
      const found = none.get(name) ?? measure(changes, {})
      none.set(name, found)
      return found
    }
    const property = fc.asyncProperty(
      models,
      forms,
      fc.constantFrom('now', 'defer'),
      async (changes, form, weights) => {
        const config = { ...base, ...changes }
        const [plain, again] = [
          await without(changes),
          await measure(changes, { recompute: form }, weights as 'now' | 'defer'),
        ]
        expect(again.loss).toBe(plain.loss)
        expect(again.gradients).toEqual(plain.gradients)
        const saved = expectedKept(config, settingsOf({})) - expectedKept(config, form)
        expect(plain.kept - again.kept).toBe(saved)
      },
    )
    const numRuns = process.env['VIADUCT_TEST_FULL'] === '1' ? 200 : 12
    await fc.assert(property, { numRuns, seed: 20261126 })
  }, 240_000)

  test.each([
    ['core_attn', selective('core_attn')],
    ['layernorm', selective('layernorm')],
    ['mlp_act', selective('mlp_act')],
    ['mlp', selective('mlp')],
    ['all modules', selective(...modules)],
    ['full, uniform, 1', full('uniform', 1)],
    ['full, uniform, 2', full('uniform', 2)],
    ['full, block, 3', full('block', 3)],
  ])('the measured peak of a step falls by what is not kept: %s', async (_, form) => {
    const changes = { hiddenDropout: 0.1 }
    const [plain, again] = [await measure(changes, {}), await measure(changes, { recompute: form })]
    const config = { ...base, ...changes }
    const { all, norm, attention, acted } = layerBytes(config)
    // What the backward pass has again beside what is kept, where it begins: the last group, the last feed-forward part, or the output
    // that the last layer's last linear reads.
    const runs = layerRuns(form, { first: 0, end: config.numLayers, hasEmbedding: true, hasHead: true })
    const last = runs.at(-1) as { layers: readonly number[]; again: boolean }
    const chosen = form.recomputeGranularity === 'selective' ? (form.recomputeModules ?? []) : []
    let back = last.again ? last.layers.length * all - norm.input : 0
    if (chosen.includes('mlp'))
      back += all - 2 * norm.input - norm.output - norm.statistics - attention.qkv - attention.output - attention.lse
    else if (chosen.includes('mlp_act')) back += acted
    else if (chosen.includes('layernorm')) back += norm.output
    const saved = expectedKept(config, settingsOf({})) - expectedKept(config, form) - back
    // Where exactly the peak lies differs by a tensor or two of one layer.
    expect(Math.abs(plain.peak - again.peak - saved)).toBeLessThan(0.1 * plain.peak)
    expect(again.peak).toBeLessThan(plain.peak)
  })

  test('a tensor that was given up is no input for anybody else', async () => {
    const tensor = Tensor.full(root, [4], 'float32', 1)
    tensor.evict()
    expect(tensor.isEvicted && !tensor.isFreed).toBe(true)
    expect(() => tensor.handle).toThrow(
      expect.objectContaining({ code: 'ERR_HANDLE', message: expect.stringContaining('was given up until') }),
    )
    expect(() => tensor.refill(Tensor.full(root, [5], 'float32', 2))).toThrow('cannot get memory')
    tensor.refill(Tensor.full(root, [4], 'float32', 2))
    expect(await tensor.toFloat32Array()).toEqual(Float32Array.of(2, 2, 2, 2))
    tensor.dispose()
  })
})

describe('layerRuns', () => {
  const part = { first: 3, end: 8, hasEmbedding: false, hasHead: false }
  test.each([
    ['nothing again', {}, [[3, 4, 5, 6, 7]], []],
    ['selective', selective('mlp'), [[3, 4, 5, 6, 7]], []],
    ['full', full(null, null), [[3], [4], [5], [6], [7]], [0, 1, 2, 3, 4]],
    ['uniform 2: the last group is smaller', full('uniform', 2), [[3, 4], [5, 6], [7]], [0, 1, 2]],
    ['block 2', full('block', 2), [[3], [4], [5, 6, 7]], [0, 1]],
    ['block of more than there are', full('block', 9), [[3], [4], [5], [6], [7]], [0, 1, 2, 3, 4]],
  ])('%s', (_, settings, layers, again) => {
    const runs = layerRuns(settingsOf(settings), part)
    expect(runs.map((run) => run.layers)).toEqual(layers)
    expect(runs.flatMap((run, i) => (run.again ? [i] : []))).toEqual(again)
  })

  test('a chunk without layers has no run', () => {
    expect(layerRuns(settingsOf({}), { ...part, end: 3 })).toEqual([])
    expect(layerRuns(full('uniform', 2), { ...part, end: 3 })).toEqual([])
  })
})

describe('the settings', () => {
  test.each<[string, object, readonly string[]]>([
    ['none', {}, []],
    ['selective', selective(...modules), []],
    ['modules null are core_attn', { recomputeGranularity: 'selective', recomputeModules: null }, []],
    ['full', full(null, null), []],
    ['uniform', full('uniform', 4), []],
    ['another granularity', { recomputeGranularity: 'half' }, ["must be 'full', 'selective' or null, got \"half\""]],
    ['another method', full('even' as 'block', 1), ["must be 'uniform', 'block' or null, got \"even\""]],
    [
      'method and layers without full',
      { recomputeMethod: 'block', recomputeNumLayers: 2 },
      ['recomputeMethod="block" needs recomputeGranularity=\'full\', got null', 'recomputeNumLayers=2 needs'],
    ],
    [
      'selective with method',
      { ...selective('mlp'), recomputeMethod: 'uniform' },
      ['recomputeMethod="uniform" needs recomputeGranularity=\'full\', got "selective"'],
    ],
    ['no layers', full('uniform', 0), ['must be a whole number of at least 1, got 0']],
    ['half layers', full('uniform', 1.5), ['got 1.5']],
    ['more than a chunk has', full('block', 5), ["at most 4, the layers of a stage's largest chunk, got 5"]],
    ['block without layers', full('block', null), ['recomputeNumLayers must be set']],
    [
      'modules of experts and latent attention',
      selective('moe_act' as 'mlp', 'shared_experts' as 'mlp', 'mla_up_proj' as 'mlp'),
      [
        '"moe_act", which belongs to activations of experts alone, not built yet: use core_attn, layernorm, mlp_act, mlp, moe',
        '"shared_experts", which',
        '"mla_up_proj", which belongs to multi-latent attention, not built yet',
      ],
    ],
    [
      'a module that is none',
      selective('constructor' as 'mlp'),
      ['"constructor", expected core_attn, layernorm, mlp_act, mlp, moe'],
    ],
    ['no module', selective(), ["is empty for recomputeGranularity='selective'"]],
    [
      'no list',
      { ...selective(), recomputeModules: 'mlp' },
      ['must be a list of core_attn, layernorm, mlp_act, mlp, moe, got "mlp"'],
    ],
    [
      'modules without selective',
      { recomputeModules: ['mlp'] },
      ["[mlp] needs recomputeGranularity='selective', got null"],
    ],
    [
      'several at once',
      {
        recomputeGranularity: 'selective',
        recomputeMethod: 'all',
        recomputeNumLayers: -1,
        recomputeModules: ['moe_act', 3],
      },
      [
        "must be 'uniform'",
        'recomputeMethod="all" needs',
        'recomputeNumLayers=-1 needs',
        'at least 1, got -1',
        '"moe_act", which',
        '3, expected',
      ],
    ],
  ])('%s', (_, settings, expected) => {
    const problems = recomputeProblems(settingsOf(settings as Partial<RecomputeSettings>), 4)
    expect(problems).toEqual(expected.map((text) => expect.stringContaining(text)))
  })
})
