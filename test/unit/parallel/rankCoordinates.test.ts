// Who a rank is, against Megatron's order written as nested loops and the groups that its documentation lists.
import * as fc from 'fast-check'
import { expect, it } from 'vitest'
import {
  defaultParallel,
  describeParallel,
  type ParallelConfig,
  parallelProblems,
  runProblems,
  smallestWorld,
} from '../../../lib/parallel/config.js'
import { type RankCoordinates, rankCoordinates } from '../../../lib/parallel/rankCoordinates.js'

const sized = (changes: Partial<ParallelConfig>): ParallelConfig => ({ ...defaultParallel, ...changes })

/** Ranks that differ along one axis of a grid alone. */
function groupsAlong(
  parallel: ParallelConfig,
  world: number,
  axis: keyof RankCoordinates,
  fixed: (keyof RankCoordinates)[],
) {
  const groups = new Map<string, number[]>()
  for (let rank = 0; rank < world; rank++) {
    const at = rankCoordinates(parallel, world, rank)
    const key = fixed.map((other) => at[other]).join()
    const group = groups.get(key) ?? []
    group[at[axis]] = rank
    groups.set(key, group)
  }
  return [...groups.values()]
}

it('lists the groups of 16 ranks at tp 2, pp 4', () => {
  const parallel = sized({ tensorModelParallelSize: 2, pipelineModelParallelSize: 4 })
  const along = (axis: 'tp' | 'dp' | 'pp') =>
    groupsAlong(
      parallel,
      16,
      axis,
      (['tp', 'cp', 'dp', 'pp'] as const).filter((other) => other !== axis),
    )
  expect(along('tp')).toEqual([
    [0, 1],
    [2, 3],
    [4, 5],
    [6, 7],
    [8, 9],
    [10, 11],
    [12, 13],
    [14, 15],
  ])
  expect(along('dp')).toEqual([
    [0, 2],
    [1, 3],
    [4, 6],
    [5, 7],
    [8, 10],
    [9, 11],
    [12, 14],
    [13, 15],
  ])
  expect(along('pp')).toEqual([
    [0, 4, 8, 12],
    [1, 5, 9, 13],
    [2, 6, 10, 14],
    [3, 7, 11, 15],
  ])
})

it('lists the groups of 16 ranks at tp 2, cp 2, ep 4, pp 2', () => {
  const parallel = sized({
    tensorModelParallelSize: 2,
    contextParallelSize: 2,
    expertModelParallelSize: 4,
    pipelineModelParallelSize: 2,
  })
  const dense = ['tp', 'cp', 'dp', 'pp'] as const
  expect(
    groupsAlong(
      parallel,
      16,
      'cp',
      dense.filter((a) => a !== 'cp'),
    ),
  ).toEqual([
    [0, 2],
    [1, 3],
    [4, 6],
    [5, 7],
    [8, 10],
    [9, 11],
    [12, 14],
    [13, 15],
  ])
  expect(groupsAlong(parallel, 16, 'ep', ['etp', 'edp', 'pp'])).toEqual([
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9, 10, 11],
    [12, 13, 14, 15],
  ])
  expect(groupsAlong(parallel, 16, 'edp', ['etp', 'ep', 'pp'])).toEqual([
    [0, 4],
    [1, 5],
    [2, 6],
    [3, 7],
    [8, 12],
    [9, 13],
    [10, 14],
    [11, 15],
  ])
})

it('counts tp, cp, dp, pp and etp, ep, edp, pp, the first the fastest', () => {
  const size = fc.integer({ min: 1, max: 3 })
  fc.assert(
    fc.property(size, size, size, size, size, (tp, cp, pp, ep, etp) => {
      const parallel = sized({
        tensorModelParallelSize: tp,
        contextParallelSize: cp,
        pipelineModelParallelSize: pp,
        expertModelParallelSize: ep,
        expertTensorParallelSize: etp,
      })
      const world = smallestWorld(parallel)
      expect(parallelProblems(parallel, world)).toEqual([])
      const dp = world / (tp * cp * pp)
      const edp = world / (etp * ep * pp)
      for (let fewer = 1; fewer < dp; fewer++) expect(parallelProblems(parallel, tp * cp * pp * fewer)).toHaveLength(1)
      let rank = 0
      for (let p = 0; p < pp; p++)
        for (let d = 0; d < dp; d++)
          for (let c = 0; c < cp; c++)
            for (let t = 0; t < tp; t++)
              expect(rankCoordinates(parallel, world, rank++)).toMatchObject({ tp: t, cp: c, dp: d, pp: p })
      rank = 0
      for (let p = 0; p < pp; p++)
        for (let d = 0; d < edp; d++)
          for (let e = 0; e < ep; e++)
            for (let t = 0; t < etp; t++)
              expect(rankCoordinates(parallel, world, rank++)).toMatchObject({ etp: t, ep: e, edp: d, pp: p })
    }),
    { seed: 4, numRuns: 40 },
  )
})

it('takes any layout, and refuses by name what only converts', () => {
  const parallel = sized({
    tensorModelParallelSize: 2,
    pipelineModelParallelSize: 2,
    virtualPipelineModelParallelSize: 2,
    contextParallelSize: 2,
    expertModelParallelSize: 2,
    expertTensorParallelSize: 2,
    sequenceParallel: true,
    numLayersInFirstPipelineStage: 2,
  })
  expect(parallelProblems(parallel, 8)).toEqual([])
  expect(describeParallel(parallel)).toBe('tp 2, pp 2, vpp 2, cp 2, ep 2, etp 2')
  expect(runProblems(parallel, 8)).toEqual([])
  expect(runProblems(sized({ sequenceParallel: true }))).toEqual([
    expect.stringContaining('sequenceParallel=true needs tensorModelParallelSize of at least 2'),
  ])
})
