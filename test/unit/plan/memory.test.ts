// What the memory model says of layouts, exactly: parameters 1 / (tp·pp), optimizer state 1 / dp, activations with sequence parallelism,
// schedules and recompute. Real ranks are held to it in test/train/memory.test.ts.
import { describe, expect, it } from 'vitest'
import { resolve } from '../../../lib/config/resolve.js'
import type { ProviderInit } from '../../../lib/models/provider.js'
import { parameterCount } from '../../../lib/plan/cost.js'
import { type MemoryUse, memoryByStage } from '../../../lib/plan/memory.js'
import { type MemoryTask, memoryConfig } from '../../train/memoryRank.js'

// Vocabulary that is padded alike in each layout.
const even: Partial<ProviderInit> = { vocabSize: 1024, numLayers: 8 }
const stages = (model: Partial<ProviderInit>, ranks: number, more: Omit<MemoryTask, 'model'> = {}): MemoryUse[] =>
  memoryByStage(resolve(memoryConfig({ ...more, model: { ...even, ...model } }), ranks))
const sum = (uses: readonly MemoryUse[], key: keyof MemoryUse) => uses.reduce((total, use) => total + use[key], 0)

describe('parameters', () => {
  const norms = (2 * 8 + 1) * 128
  const parameters = parameterCount(memoryConfig({ model: even }).model)

  it('are those of the model on one rank', () => {
    const [one] = stages({}, 1)
    expect(one?.weights).toBe(4 * parameters)
    expect(one?.gradients).toBe(4 * parameters)
    expect(one?.optimizer).toBe(8 * parameters)
  })

  it.each([1, 2, 4].flatMap((tp) => [1, 2, 4].map((pp) => [tp, pp] as const)))(
    'are shared out over tp %i and pp %i, but for norms, which each tp rank has',
    (tp, pp) => {
      const uses = stages({ tensorModelParallelSize: tp, pipelineModelParallelSize: pp }, tp * pp)
      expect(uses).toHaveLength(pp)
      expect(sum(uses, 'weights')).toBe(4 * ((parameters - norms) / tp + norms))
      expect(sum(uses, 'gradients')).toBe(sum(uses, 'weights'))
    },
  )

  it('of a tied embedding are on both ends of a pipeline', () => {
    const tied = { shareEmbeddingsAndOutputWeights: true }
    const table = 4 * 1024 * 128
    expect(sum(stages({ ...tied, pipelineModelParallelSize: 2 }, 2), 'weights')).toBe(
      sum(stages(tied, 1), 'weights') + table,
    )
  })
})

describe('optimizer state', () => {
  it.each([1, 2, 4, 8])('is shared out over dp %i', (dp) => {
    for (const mixedPrecision of ['fp32', 'bf16_mixed'] as const) {
      const [one] = stages({}, 1, { mixedPrecision })
      const [many] = stages({}, dp, { mixedPrecision })
      expect(many?.optimizer).toBe((one as MemoryUse).optimizer / dp)
      expect(many?.weights).toBe(one?.weights)
      const [copied] = stages({}, dp, {
        mixedPrecision,
        ddp: { useDistributedOptimizer: false, overlapParamGather: false },
      })
      expect(copied?.optimizer).toBe(one?.optimizer)
    }
  })

  it('has masters where weights are bfloat16', () => {
    const [wide] = stages({}, 1, { mixedPrecision: 'fp32' })
    const [mixed] = stages({}, 1, { mixedPrecision: 'bf16_mixed' })
    expect(mixed?.weights).toBe((wide as MemoryUse).weights / 2)
    expect(mixed?.optimizer).toBe((wide as MemoryUse).optimizer * 1.5)
  })
})

describe('fully sharded', () => {
  const fsdp = { ddp: { useMegatronFsdp: true } }
  it.each([2, 4])(
    'weights, gradients and state are shared out over dp %i, units are whole beside activations',
    (dp) => {
      const [one] = stages({}, 1) as [MemoryUse]
      const [many] = stages({}, dp, fsdp) as [MemoryUse]
      for (const part of ['weights', 'gradients', 'optimizer'] as const) expect(many[part]).toBe(one[part] / dp)
      // At the end of the forward pass: the output layer with its norm, the last layer that is next, and what was the embedding's gradient.
      const table = 1024 * 128
      const layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 320 + 2 * 128
      expect(many.activations).toBe(one.activations + 4 * (table + 128 + layer) + 4 * table)
    },
  )

  it('is nothing on one rank', () => expect(stages({}, 1, fsdp)).toEqual(stages({}, 1)))
})

describe('activations', () => {
  const of = (model: Partial<ProviderInit>, ranks: number, more: Omit<MemoryTask, 'model'> = {}) =>
    stages(model, ranks, more).map(({ activations }) => activations)
  const hidden = 4 * 64 * 128 * 4

  it('fall with tp, and with sequence parallelism to almost 1 / tp', () => {
    const [one = 0] = of({}, 1)
    const [tp4 = 0] = of({ tensorModelParallelSize: 4 }, 4)
    const [sp4 = 0] = of({ tensorModelParallelSize: 4, sequenceParallel: true }, 4)
    expect(tp4).toBeGreaterThan(one / 4 + 8 * 3 * hidden)
    // All tokens' rows are whole only while a linear reads or makes them.
    expect(sp4).toBeLessThan(one / 4 + 3 * hidden)
    expect(sp4).toBeGreaterThan(one / 4)
  })

  it('of 1F1B are those of its stages, of GPipe those of all micro-batches', () => {
    const pp4 = (pipelineSchedule: '1f1b' | 'gpipe', globalBatchSize: number) =>
      of({ pipelineModelParallelSize: 4, pipelineSchedule }, 4, { globalBatchSize })
    expect(pp4('1f1b', 64)).toEqual(pp4('1f1b', 32))
    expect(pp4('gpipe', 64)[0]).toBeGreaterThan(1.9 * (pp4('gpipe', 32)[0] as number))
    const [first = 0, second = 0, third = 0] = pp4('1f1b', 32)
    expect(first).toBeGreaterThan(second)
    expect(second).toBeGreaterThan(third)
  })

  it('fall with recomputed layers to their inputs and the layers of a group', () => {
    const full = (recomputeNumLayers: number, recomputeMethod: 'uniform' | 'block' = 'uniform') =>
      of({ recomputeGranularity: 'full', recomputeMethod, recomputeNumLayers }, 1)[0] as number
    const [plain = 0] = of({}, 1)
    const layer = full(2) - full(1) + 4 * hidden // of the same 8 layers, one more is there again, and 4 groups keep their input instead of 8
    expect(full(1)).toBeGreaterThan(8 * hidden + layer - hidden)
    expect(full(1)).toBeLessThan(8 * hidden + 1.5 * layer)
    expect(plain).toBeGreaterThan(8 * layer)
    // Of a block of 8 layers one is there again too.
    expect(full(8, 'block')).toBe(full(1))
    expect(full(4, 'block')).toBeGreaterThan(4 * layer)
  })

  it.each([
    [['core_attn'], 128 * 4 + 8 * 4],
    [['layernorm'], 2 * 128 * 4],
    [['mlp_act'], 320 * 4],
    // The stream, the norm's output and statistics, three widths of 320; what came in is kept instead.
    [['mlp'], 128 * 4 + 4 + 3 * 320 * 4],
  ] as const)('fall with %j by what each layer keeps of a token no more', (recomputeModules, bytes) => {
    const at = (numLayers: number) => {
      const [plain = 0] = of({ numLayers }, 1)
      const [again = 0] = of({ numLayers, recomputeGranularity: 'selective', recomputeModules }, 1)
      return plain - again
    }
    expect(at(9) - at(8)).toBe(4 * 64 * bytes)
  })

  it('of bfloat16 are about half', () => {
    const [wide = 0] = of({}, 1)
    const [narrow = 0] = of({}, 1, { mixedPrecision: 'bf16_mixed' })
    expect(narrow / wide).toBeGreaterThan(0.5)
    expect(narrow / wide).toBeLessThan(0.52)
  })
})
