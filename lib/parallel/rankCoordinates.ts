// Who a rank is: its place on each axis, from sizes alone. Rank order is Megatron's, tp-cp-ep-dp-pp: of dense parameters tp is the
// fastest, then cp, dp, pp; of experts etp, then ep, edp, pp. Groups are made of these grids in mesh.ts.
import type { ParallelConfig } from './config.js'

/** Axes and their sizes, the fastest first; their product is the world. */
export type Grid = readonly (readonly [axis: string, size: number])[]

/** A rank's index on each axis. `edp`: which copy of its experts it holds. */
export interface RankCoordinates {
  readonly tp: number
  readonly cp: number
  readonly dp: number
  readonly pp: number
  readonly etp: number
  readonly ep: number
  readonly edp: number
}

/** The grid of everything that is not an expert. */
export function denseGrid(parallel: ParallelConfig, worldSize: number): Grid {
  const { tensorModelParallelSize: tp, contextParallelSize: cp, pipelineModelParallelSize: pp } = parallel
  return [
    ['tp', tp],
    ['cp', cp],
    ['dp', worldSize / (tp * cp * pp)],
    ['pp', pp],
  ]
}

/** The grid of experts. */
export function expertGrid(parallel: ParallelConfig, worldSize: number): Grid {
  const { expertTensorParallelSize: etp, expertModelParallelSize: ep, pipelineModelParallelSize: pp } = parallel
  return [
    ['etp', etp],
    ['ep', ep],
    ['edp', worldSize / (etp * ep * pp)],
    ['pp', pp],
  ]
}

/** A rank's index on each axis of a grid. */
export function placeOnGrid(grid: Grid, rank: number): Record<string, number> {
  let rest = rank
  return Object.fromEntries(
    grid.map(([axis, size]) => {
      const at = rest % size
      rest = Math.floor(rest / size)
      return [axis, at]
    }),
  )
}

/** A rank's index on all axes. Sizes must fit the world; see parallelProblems. */
export function rankCoordinates(parallel: ParallelConfig, worldSize: number, rank: number): RankCoordinates {
  return {
    ...placeOnGrid(denseGrid(parallel, worldSize), rank),
    ...placeOnGrid(expertGrid(parallel, worldSize), rank),
  } as unknown as RankCoordinates
}
