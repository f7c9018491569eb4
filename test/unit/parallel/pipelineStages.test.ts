// Which blocks a stage and its chunks hold, against Megatron's rules written down again, and the strings of custom layouts.
import * as fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { defaultParallel, type ParallelConfig } from '../../../lib/parallel/config.js'
import { pipelineProblems, pipelineStages } from '../../../lib/parallel/pipelineStages.js'

const sized = (pp: number, vpp: number | null, more: Partial<ParallelConfig> = {}): ParallelConfig => ({
  ...defaultParallel,
  pipelineModelParallelSize: pp,
  virtualPipelineModelParallelSize: vpp,
  ...more,
})

/** blocks[stage][chunk]: the indices of the blocks. */
function blocksOf(parallel: ParallelConfig, numLayers: number): number[][][] {
  const stages = pipelineStages(parallel, numLayers)
  const blocks = Array.from({ length: parallel.pipelineModelParallelSize }, () =>
    Array.from({ length: stages.chunks }, (): number[] => []),
  )
  for (let layer = 0; layer < numLayers; layer++) {
    const { stage, chunk } = stages.placeOf(layer)
    blocks[stage]?.[chunk]?.push(layer)
  }
  return blocks
}

describe('stages', () => {
  it('hold runs of blocks, chunk after chunk', () => {
    expect(blocksOf(sized(2, null), 4)).toEqual([[[0, 1]], [[2, 3]]])
    expect(blocksOf(sized(2, 4), 8)).toEqual([
      [[0], [2], [4], [6]],
      [[1], [3], [5], [7]],
    ])
    expect(blocksOf(sized(2, 2), 8)).toEqual([
      [
        [0, 1],
        [4, 5],
      ],
      [
        [2, 3],
        [6, 7],
      ],
    ])
  })

  it('begin where Megatron lets them begin: uneven ends, virtual chunks', () => {
    const end = fc.option(fc.integer({ min: 1, max: 3 }), { nil: null })
    fc.assert(
      fc.property(
        fc.integer({ min: 2, max: 6 }),
        fc.integer({ min: 1, max: 3 }),
        fc.integer({ min: 1, max: 3 }),
        end,
        end,
        (pp, vpp, each, first, last) => {
          const middle = pp - Number(first !== null) - Number(last !== null)
          const [head, tail] = [first ?? 0, last ?? 0]
          const perPass = head + tail + each * middle
          const parallel = sized(pp, vpp, {
            numLayersInFirstPipelineStage: first && first * vpp,
            numLayersInLastPipelineStage: last && last * vpp,
          })
          const blocks = blocksOf(parallel, perPass * vpp)
          for (let stage = 0; stage < pp; stage++) {
            for (let chunk = 0; chunk < vpp; chunk++) {
              const inMiddle = first === null ? stage : stage - 1
              const offset = chunk * perPass + (stage === 0 ? 0 : head + inMiddle * each)
              expect(blocks[stage]?.[chunk]?.[0]).toBe(offset)
            }
          }
        },
      ),
      { seed: 4 },
    )
  })

  it('account for embedding and loss', () => {
    const both = { accountForEmbeddingInPipelineSplit: true, accountForLossInPipelineSplit: true }
    expect(blocksOf(sized(2, null, both), 6)).toEqual([[[0, 1, 2]], [[3, 4, 5]]])
    expect(blocksOf(sized(4, null, both), 6)).toEqual([[[0]], [[1, 2]], [[3, 4]], [[5]]])
    expect(blocksOf(sized(2, 2, { accountForEmbeddingInPipelineSplit: true }), 7)).toEqual([
      [[0], [3, 4]],
      [
        [1, 2],
        [5, 6],
      ],
    ])
    expect(blocksOf(sized(2, null, { accountForLossInPipelineSplit: true }), 1)).toEqual([[[0]], [[]]])
  })
})

describe('a written layout', () => {
  const written = (pp: number, text: string, numLayers: number) =>
    blocksOf(sized(pp, null, { pipelineModelParallelLayout: text }), numLayers)

  it.each<[string, number, number, number[][][]]>([
    ['E|t*3|t|L', 4, 4, [[[]], [[0, 1, 2]], [[3]], [[]]]],
    ['Et|ttL', 2, 3, [[[0]], [[1, 2]]]],
    [
      'Et|t|t|tL',
      2,
      4,
      [
        [[0], [2]],
        [[1], [3]],
      ],
    ],
    [
      'Et*2,(|t)*2,|L',
      2,
      4,
      [
        [[0, 1], [3]],
        [[2], []],
      ],
    ],
    ['E,tt,L', 1, 2, [[[0, 1]]]],
  ])('%s on %i stages', (text, pp, layers, expected) => {
    expect(written(pp, text, layers)).toEqual(expected)
  })

  it('of 61 blocks on 16 stages of two chunks', () => {
    const blocks = written(16, 'Et*3|(tt|)*29,|L', 61)
    expect(blocks[0]).toEqual([
      [0, 1, 2],
      [33, 34],
    ])
    expect(blocks[13]).toEqual([
      [27, 28],
      [59, 60],
    ])
    expect(blocks.slice(14)).toEqual([
      [[29, 30], []],
      [[31, 32], []],
    ])
  })

  it.each<[string, string, Partial<ParallelConfig>, RegExp]>([
    ['multi-token prediction', 'Et|mL', {}, /layer m \(multi-token prediction\)/],
    ['a strange letter', 'Ex|tL', {}, /has "x" where one of these is expected: E embedding/],
    ['an open bracket', 'E(t|tL', {}, /has "\(" where/],
    ['too few blocks', 'Et|L', {}, /must have numLayers=2 times t, got 1/],
    ['no embedding', 'tt|L', {}, /must begin with its only E/],
    ['two losses', 'EtL|tL', {}, /its only L in the last/],
    ['an embedding that is not on the first stage', '|EttL', {}, /must begin with its only E in the first stage/],
    ['a number of stages', 'Et|t|L', {}, /a multiple of pipelineModelParallelSize=2 stages, got 3/],
    ['other chunks', 'Et|tL', { virtualPipelineModelParallelSize: 2 }, /pp·vpp = 4 stages, got 2/],
    ['a count beside it', 'Et|tL', { numLayersInFirstPipelineStage: 1 }, /numLayersInFirstPipelineStage=1 conflicts/],
    ['accounting beside it', 'Et|tL', { accountForLossInPipelineSplit: true }, /accountForLoss.* conflicts/],
    ['an absurd repetition', 'Et*99999999999|L', {}, /more than 100000 layers/],
    ['absurd nested repetitions', '(Et*9999)*99999|L', {}, /more than 100000 layers/],
  ])('is refused for %s', (_, text, more, pattern) => {
    const parallel = sized(2, null, { pipelineModelParallelLayout: text, ...more })
    expect(pipelineProblems(parallel, 2).join('\n')).toMatch(pattern)
    expect(() => pipelineStages(parallel, 2)).toThrow(pattern)
  })
})

it.each<[string, ParallelConfig, number, RegExp]>([
  [
    'an uneven number',
    sized(3, null),
    8,
    /numLayers=8 cannot be spread evenly over 3 stages: use pipelineModelParallelSize=1, 2, 4, 8, or/,
  ],
  [
    'chunks that do not divide',
    sized(2, 3),
    8,
    /over 2 stages of 3 chunks: use no virtualPipelineModelParallelSize, or pipelineModelParallelLayout=Et\*2\|t\*2\|t\|t\|t\|tL/,
  ],
  [
    'chunks of one stage',
    sized(1, 2),
    8,
    /virtualPipelineModelParallelSize=2 needs .* of at least 2, got 1: use pipelineModelParallelSize=2, 4, or no virtual/,
  ],
  ['a first stage alone', sized(1, null, { numLayersInFirstPipelineStage: 2 }), 8, /needs pipelineModelParallelSize/],
  [
    'a first stage that chunks do not divide',
    sized(2, 2, { numLayersInFirstPipelineStage: 3 }),
    8,
    /=2 divides, got 3/,
  ],
  [
    'ends that leave blocks over',
    sized(2, null, { numLayersInFirstPipelineStage: 2, numLayersInLastPipelineStage: 2 }),
    8,
    /less numLayersInLastPipelineStage=2 cannot be spread/,
  ],
  ['ends that have more than all', sized(3, null, { numLayersInFirstPipelineStage: 9 }), 8, /cannot be spread/],
  [
    'both ways to say it',
    sized(2, null, { numLayersInFirstPipelineStage: 3, accountForLossInPipelineSplit: true }),
    8,
    /conflicts with accounting/,
  ],
])('refuses %s', (_, parallel, layers, pattern) => {
  expect(pipelineProblems(parallel, layers).join('\n')).toMatch(pattern)
})
