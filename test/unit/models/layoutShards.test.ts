// Every layout cuts every parameter into shards that tile it; loading and saving through them is the identity; optimizer ranges
// tile what a rank holds. Who a rank is comes from a count of its own here.
import * as fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { layoutProblems, rankShards, shardOn } from '../../../lib/models/layoutShards.js'
import { type ParameterRow, parameterTable } from '../../../lib/models/parameterTable.js'
import type { TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { defaultParallel, type ParallelConfig } from '../../../lib/parallel/config.js'
import { type Region, tilingFault, volume } from '../../../lib/tensor/region.js'
import { flatRanges, loadRegions, ownedRegions, type ShardSpec } from '../../../lib/tensor/shardSpec.js'
import { type RandomLayout, randomLayout } from './randomLayouts.js'

interface Place {
  readonly tp: number
  readonly pp: number
  readonly copy: number
  readonly etp: number
  readonly ep: number
  readonly expertCopy: number
}

/** Every rank's place, counted up axis by axis; `copy` and `expertCopy` number the ranks that hold the same. */
function places({ parallel, worldSize }: RandomLayout): Place[] {
  const { tensorModelParallelSize: tp, expertTensorParallelSize: etp, expertModelParallelSize: ep } = parallel
  const perStage = worldSize / parallel.pipelineModelParallelSize
  return Array.from({ length: worldSize }, (_, rank) => {
    const inStage = rank % perStage
    return {
      tp: inStage % tp,
      copy: Math.floor(inStage / tp),
      pp: Math.floor(rank / perStage),
      etp: inStage % etp,
      ep: Math.floor(inStage / etp) % ep,
      expertCopy: Math.floor(inStage / (etp * ep)),
    }
  })
}

type Held = Map<string, { shard: ShardSpec; place: Place }[]>

/** Who holds what, and the same shards on all data-parallel copies; what comes back is of copy 0 alone. */
function holders(layout: RandomLayout): Held {
  const { config, parallel, worldSize } = layout
  const at = places(layout)
  const held: Held = new Map(parameterTable(config).map((row) => [row.name, []]))
  const seen = new Map<string, string>()
  for (let rank = 0; rank < worldSize; rank++) {
    const place = at[rank] as Place
    for (const { row, shard } of rankShards(config, parallel, worldSize, rank)) {
      const isExpert = row.expert !== null
      const key = isExpert ? [row.name, place.pp, place.ep, place.etp] : [row.name, place.pp, place.tp]
      const text = JSON.stringify(shard)
      if ((isExpert ? place.expertCopy : place.copy) === 0) {
        held.get(row.name)?.push({ shard, place })
        seen.set(key.join(), text)
      } else if (seen.get(key.join()) !== text)
        expect.fail(`${row.name}: rank ${rank} holds another shard than its copy`)
    }
  }
  return held
}

/** Copies a box between arrays of the given shapes. */
function copyBox(
  from: Float64Array,
  fromShape: readonly number[],
  to: Float64Array,
  toShape: readonly number[],
  { from: at, to: into, size }: Region,
): void {
  const offset = (start: readonly number[], shape: readonly number[], index: readonly number[]) =>
    start.reduce((sum, s, d) => sum * (shape[d] as number) + s + (index[d] as number), 0)
  const count = volume(size)
  for (let i = 0; i < count; i++) {
    let rest = i
    const index = size.map(() => 0)
    for (let d = size.length - 1; d >= 0; d--) {
      index[d] = rest % (size[d] as number)
      rest = Math.floor(rest / (size[d] as number))
    }
    to[offset(into, toShape, index)] = from[offset(at, fromShape, index)] as number
  }
}

const numbered = (shape: readonly number[]) => Float64Array.from({ length: volume(shape) }, (_, i) => i + 1)

/** The local tensor that a rank loads; what no block covers stays 0. */
function loaded(row: ParameterRow, shard: ShardSpec): Float64Array {
  const local = new Float64Array(volume(shard.localShape))
  for (const region of loadRegions(shard)) copyBox(numbered(row.shape), row.shape, local, shard.localShape, region)
  return local
}

const ownedBoxes = (shard: ShardSpec) => ownedRegions(shard).map(({ to, size }) => ({ start: to, size }))
const check = (property: (layout: RandomLayout) => void, numRuns = 60) =>
  fc.assert(fc.property(randomLayout, property), { seed: 4, numRuns })

describe('random models in random layouts', () => {
  it('fit', () => {
    const kinds = new Set<string>()
    check(({ config, parallel, worldSize }) => {
      expect(layoutProblems(config, parallel, worldSize)).toEqual([])
      const { pipelineModelParallelSize: pp, tensorModelParallelSize: tp } = parallel
      if (config.numMoeExperts !== null && parallel.expertTensorParallelSize > 1) kinds.add('etp')
      if (parallel.expertModelParallelSize > 1) kinds.add('ep')
      if (parallel.pipelineModelParallelLayout !== null && pp > 1) kinds.add('written stages')
      if ((parallel.virtualPipelineModelParallelSize ?? 1) > 1) kinds.add('vpp')
      if (parallel.numLayersInFirstPipelineStage !== null) kinds.add('uneven')
      if (parallel.accountForLossInPipelineSplit && pp > 1) kinds.add('accounted')
      if (config.numQueryGroups < tp) kinds.add('kv copies')
      if (config.vocabSize % tp !== 0) kinds.add('padding')
      if (config.shareEmbeddingsAndOutputWeights && pp > 1) kinds.add('tied ends')
    }, 150)
    // The sample must reach every kind, or the properties below say little.
    expect([...kinds].sort()).toEqual(
      ['accounted', 'ep', 'etp', 'kv copies', 'padding', 'tied ends', 'uneven', 'vpp', 'written stages'].sort(),
    )
  })

  it('are tiled by what the ranks own, data-parallel copies left out', () => {
    check((layout) => {
      const held = holders(layout)
      for (const row of parameterTable(layout.config)) {
        const shards = (held.get(row.name) as { shard: ShardSpec }[]).map(({ shard }) => shard)
        expect(tilingFault(row.shape, shards.flatMap(ownedBoxes)), row.name).toBeNull()
        for (const { localShape, logicalShape, blocks } of shards) {
          expect(logicalShape).toEqual(row.shape)
          const fault = tilingFault(
            localShape,
            blocks.map((b) => ({ start: b.localStart, size: b.size })),
          )
          if (row.cut !== 'vocab') expect(fault, row.name).toBeNull()
        }
      }
    })
  })

  it('come back as they were when they are loaded and saved', () => {
    check((layout) => {
      const held = holders(layout)
      for (const row of parameterTable(layout.config)) {
        const out = new Float64Array(volume(row.shape))
        for (const { shard } of held.get(row.name) ?? []) {
          const local = loaded(row, shard)
          for (const region of ownedRegions(shard)) copyBox(local, shard.localShape, out, row.shape, region)
        }
        expect(out, row.name).toEqual(numbered(row.shape))
      }
    }, 40)
  })

  it('have copies of everything that a rank needs: gate beside up, a key for each query, the tied embedding twice', () => {
    check((layout) => {
      const { config, parallel } = layout
      const { tensorModelParallelSize: tp, pipelineModelParallelSize: pp } = parallel
      const held = holders(layout)
      const D = config.kvChannels
      const perGroup = config.numAttentionHeads / config.numQueryGroups
      for (const row of parameterTable(config)) {
        for (const { shard, place } of held.get(row.name) ?? []) {
          const local = loaded(row, shard)
          const inner = volume(row.shape.slice(1))
          const rows = Array.from({ length: shard.localShape[0] as number }, (_, i) =>
            Math.floor(((local[i * inner] as number) - 1) / inner),
          )
          if (row.cut === 'qkv') {
            // Head by head of this rank: the query, and the key and value of its group, in Megatron's order.
            const mine = Array.from(
              { length: config.numAttentionHeads / tp },
              (_, i) => place.tp * (config.numAttentionHeads / tp) + i,
            )
            const groups = [...new Set(mine.map((head) => Math.floor(head / perGroup)))]
            const expected = groups.flatMap((group) => {
              const base = group * (perGroup + 2) * D
              const run = (start: number, count: number) => Array.from({ length: count }, (_, i) => base + start + i)
              const queries = mine
                .filter((head) => Math.floor(head / perGroup) === group)
                .flatMap((head) => run((head % perGroup) * D, D))
              return [...queries, ...run(perGroup * D, 2 * D)]
            })
            expect(rows, row.name).toEqual(expected)
          }
          if (row.cut === 'gated') {
            const half = rows.length / 2
            const offset = (row.shape[0] as number) / 2
            expect(rows.slice(half), row.name).toEqual(rows.slice(0, half).map((r) => r + offset))
          }
        }
      }
      const tied = config.shareEmbeddingsAndOutputWeights && pp > 1
      const ends = (held.get('embedding.word_embeddings.weight') ?? []).map(({ place }) => place.pp)
      expect([...new Set(ends)]).toEqual(tied ? [0, pp - 1] : [0])
    })
  })

  it('are tiled by ranges that an optimizer cuts anywhere', () => {
    fc.assert(
      fc.property(
        randomLayout,
        fc.array(fc.double({ min: 0, max: 1, noNaN: true }), { maxLength: 4 }),
        (layout, cuts) => {
          const held = holders(layout)
          for (const row of parameterTable(layout.config)) {
            const boxes: { start: readonly number[]; size: readonly number[] }[] = []
            for (const { shard } of held.get(row.name) ?? []) {
              const length = volume(shard.localShape)
              const ends = [...cuts.map((cut) => Math.floor(cut * length)).sort((a, b) => a - b), length]
              const local = loaded(row, shard)
              let begin = 0
              for (const end of ends) {
                for (const { offset, count, block } of flatRanges(shard, begin, end)) {
                  expect(offset >= begin && offset + count <= end).toBe(true)
                  expect(volume(block.size)).toBe(count)
                  const box = new Float64Array(count)
                  copyBox(numbered(row.shape), row.shape, box, block.size, {
                    from: block.globalStart,
                    to: block.size.map(() => 0),
                    size: block.size,
                  })
                  expect(local.slice(offset, offset + count), row.name).toEqual(box)
                  if (block.replica === 0) boxes.push({ start: block.globalStart, size: block.size })
                }
                begin = end
              }
            }
            expect(tilingFault(row.shape, boxes), row.name).toBeNull()
          }
        },
      ),
      { seed: 4, numRuns: 30 },
    )
  })
})

const mixture: TransformerConfig = (fc.sample(randomLayout, { seed: 1, numRuns: 1 })[0] as RandomLayout).config
const sizes: Partial<TransformerConfig> = {
  numLayers: 4,
  hiddenSize: 8,
  numAttentionHeads: 8,
  numQueryGroups: 2,
  kvChannels: 2,
  ffnHiddenSize: 24,
  gatedLinearUnit: true,
  normalization: 'RMSNorm',
  addQkvBias: false,
  addProjBias: true,
  addMlpBias: false,
  vocabSize: 11,
  shareEmbeddingsAndOutputWeights: true,
  qkLayernorm: 'perHead',
  numMoeExperts: 6,
  moeFfnHiddenSize: 8,
  moeLayerFreq: [0, 1, 1, 1],
}
const model: TransformerConfig = { ...mixture, ...sizes }
const layout = (changes: Partial<ParallelConfig>): ParallelConfig => ({ ...defaultParallel, ...changes })
const rowOf = (name: string, config = model) => parameterTable(config).find((row) => row.name === name) as ParameterRow

describe('gradient sums', () => {
  const sums = (name: string, parallel: ParallelConfig, world: number, rank: number, config = model) =>
    shardOn(rowOf(name, config), config, parallel, world, rank)?.blocks.map(({ replica, gradSum }) => [
      replica,
      ...gradSum,
    ])
  const block = 'decoder.layers.1'

  it.each([
    // name, sequence parallel, blocks of rank 1 of tp 4: [replica, ...axes]
    [`${block}.self_attention.linear_qkv.layer_norm_weight`, false, [[1]]],
    [`${block}.self_attention.linear_qkv.layer_norm_weight`, true, [[1, 'tp']]],
    [`${block}.self_attention.linear_proj.bias`, false, [[1]]],
    [`${block}.self_attention.linear_proj.bias`, true, [[1, 'tp']]],
    [`${block}.mlp.router.weight`, true, [[1, 'tp']]],
    ['decoder.final_layernorm.weight', true, [[1, 'tp']]],
    [`${block}.self_attention.q_layernorm.weight`, false, [[1, 'tp']]],
    [`${block}.self_attention.linear_proj.weight`, true, [[0]]],
    [`${block}.self_attention.linear_qkv.weight`, true, [[0], [1, 'tp_kv']]],
    [`${block}.mlp.experts.linear_fc1.weight0`, true, [[0], [0]]],
  ])('of %s with sequence parallelism %s', (name, sequenceParallel, expected) => {
    expect(sums(name, layout({ tensorModelParallelSize: 4, sequenceParallel }), 4, 1)).toEqual(expected)
  })

  it('of norms over the full dimension', () => {
    const full: TransformerConfig = { ...model, qkLayernorm: 'allHeads' }
    const parallel = layout({ tensorModelParallelSize: 4 })
    expect(sums(`${block}.self_attention.q_layernorm.weight`, parallel, 4, 1, full)).toEqual([[0]])
    expect(sums(`${block}.self_attention.k_layernorm.weight`, parallel, 4, 1, full)).toEqual([[1, 'tp_kv']])
    expect(sums(`${block}.self_attention.k_layernorm.weight`, parallel, 4, 2, full)).toEqual([[0, 'tp_kv']])
  })

  it('of a tied embedding: on both ends, owned by the first', () => {
    const parallel = layout({ tensorModelParallelSize: 2, pipelineModelParallelSize: 4 })
    const words = 'embedding.word_embeddings.weight'
    expect(Array.from({ length: 8 }, (_, rank) => sums(words, parallel, 8, rank))).toEqual([
      [[0, 'embd']],
      [[0, 'embd']],
      undefined,
      undefined,
      undefined,
      undefined,
      [[1, 'embd']],
      [[1, 'embd']],
    ])
    expect(sums(words, layout({ tensorModelParallelSize: 2 }), 2, 0)).toEqual([[0]])
  })
})

describe('a layout that does not fit', () => {
  it.each<[string, Partial<ParallelConfig>, number, RegExp[]]>([
    ['experts', { expertModelParallelSize: 4 }, 4, [/must divide the 6 experts, got 4: use 1, 2, 3, 6/]],
    [
      'width of experts',
      { expertTensorParallelSize: 3 },
      3,
      [/expertTensorParallelSize must divide moeFfnHiddenSize=8, got 3/],
    ],
    [
      'width of dense layers',
      { tensorModelParallelSize: 5 },
      5,
      [/numAttentionHeads=8, got 5: use 1, 2, 4, 8/, /numQueryGroups=2/, /ffnHiddenSize=24, got 5/],
    ],
    [
      'stages',
      { pipelineModelParallelSize: 3 },
      3,
      [/numLayers=4 cannot be spread evenly over 3 stages: use pipelineModelParallelSize=1, 2, 4, or/],
    ],
    ['world', { tensorModelParallelSize: 2 }, 3, [/the 3 ranks must be a multiple of tp·pp·cp = 2/]],
    [
      'world of experts',
      { expertModelParallelSize: 2, expertTensorParallelSize: 2 },
      6,
      [/ep·etp = 4 must divide tp·cp·dp = 6: use 4 ranks/],
    ],
    ['no size', { contextParallelSize: 0.5 }, 1, [/contextParallelSize must be a whole number/]],
    [
      'all at once',
      { tensorModelParallelSize: 16, expertModelParallelSize: 4, pipelineModelParallelSize: 3 },
      0,
      [/numAttentionHeads/, /ffnHiddenSize/, /experts/, /spread evenly/],
    ],
  ])('%s', (_, changes, world, expected) => {
    const problems = layoutProblems(model, layout(changes), world)
    expect(problems).toHaveLength(expected.length)
    for (const [i, pattern] of expected.entries()) expect(problems[i]).toMatch(pattern)
    if (world > 0) expect(() => rankShards(model, layout(changes), world, 0)).toThrow(expected[0] as RegExp)
  })

  it('has experts that the model lacks', () => {
    const dense = { ...model, numMoeExperts: null }
    expect(layoutProblems(dense, layout({ expertModelParallelSize: 2 }))).toEqual([
      'expertModelParallelSize=2: the model has no experts, use 1',
    ])
  })
})
