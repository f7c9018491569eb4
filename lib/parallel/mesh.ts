// The ranks as a grid. Rank order is Megatron's, tp-cp-ep-dp-pp: tensor-parallel neighbours are next to each other. Groups are
// parts of the world, made at creation and shared between meshes of the same sizes.
import { ViaductError } from '../base/errors.js'
import type { Groups } from '../tensor/ctx.js'
import { checkRunnable, contextSizes, type ParallelConfig } from './config.js'
import { CommGroup } from './group.js'
import { denseGrid, expertGrid, type Grid, placeOnGrid } from './rankCoordinates.js'
import type { World } from './world.js'

/**
 * Axes that have a group. `cp_heads`, `cp_ring`: see ContextGroups. `dp_cp`: ranks that share a parameter's gradient, of experts `edp`; `etp_ep`: ranks that hold one copy of the experts; `tp_pp`: ranks that hold one copy of the model; `embd`: first
 * and last stage of a pipeline.
 */
export type Axis =
  | 'tp'
  | 'cp'
  | 'cp_heads'
  | 'cp_ring'
  | 'dp'
  | 'pp'
  | 'ep'
  | 'etp'
  | 'edp'
  | 'etp_ep'
  | 'dp_cp'
  | 'tp_pp'
  | 'tp_kv'
  | 'embd'
  | 'world'

/** Parts of the world along some axes of a grid whose first axis is the innermost. */
export function partsAlong(grid: Grid, axes: readonly string[]): number[][] {
  const parts = new Map<string, number[]>()
  const total = grid.reduce((product, [, size]) => product * size, 1)
  for (let rank = 0; rank < total; rank++) {
    const place = Object.entries(placeOnGrid(grid, rank))
    const key = place.map(([axis, at]) => (axes.includes(axis) ? 0 : at)).join()
    const part = parts.get(key)
    if (part === undefined) parts.set(key, [rank])
    else part.push(rank)
  }
  return [...parts.values()]
}

/** Parallel sizes, and the kv heads where tensor parallelism may exceed them. */
export type MeshConfig = ParallelConfig & { readonly numQueryGroups?: number }

export class Mesh implements Groups {
  readonly world: World
  readonly #sizes: Record<string, number>
  readonly #groups = new Map<string, CommGroup>()
  readonly #grid: Grid

  private constructor(world: World, grid: Grid, sizes: Record<string, number>) {
    this.world = world
    this.#grid = grid
    this.#sizes = sizes
  }

  /**
   * Makes the groups of these sizes; what the world has beyond tp·pp·cp is data parallelism. Every rank calls it.
   * @throws ERR_LAYOUT_INVALID when the sizes do not fit the world.
   */
  static async create(parallel: MeshConfig, world: World): Promise<Mesh> {
    checkRunnable(parallel, world.size)
    const tp = parallel.tensorModelParallelSize
    const cp = parallel.contextParallelSize
    const pp = parallel.pipelineModelParallelSize
    const ep = parallel.expertModelParallelSize
    const etp = parallel.expertTensorParallelSize
    const dp = world.size / (tp * cp * pp)
    const grid = denseGrid(parallel, world.size)
    const experts = expertGrid(parallel, world.size)
    const mesh = new Mesh(world, grid, { tp, cp, dp, pp, ep, etp, dp_cp: dp * cp, world: world.size })
    for (const axis of ['tp', 'cp', 'dp', 'pp'])
      mesh.#groups.set(axis, await world.part(axis, partsAlong(grid, [axis])))
    const { heads, ring } = contextSizes(parallel)
    const shared: Grid = [
      ['tp', tp],
      ['cp_heads', heads],
      ['cp_ring', ring],
      ['cp_rest', cp / heads / ring],
      ...grid.slice(2),
    ]
    for (const axis of ['cp_heads', 'cp_ring'])
      mesh.#groups.set(axis, await world.part(axis, partsAlong(shared, [axis])))
    for (const axis of ['ep', 'etp', 'edp']) mesh.#groups.set(axis, await world.part(axis, partsAlong(experts, [axis])))
    mesh.#groups.set('etp_ep', await world.part('etp_ep', partsAlong(experts, ['etp', 'ep'])))
    // An expert's tensor may be spread over these together, which gathers it at once.
    for (const axes of [
      ['etp', 'pp'],
      ['ep', 'pp'],
      ['etp', 'ep', 'pp'],
    ])
      if (axes.every((axis) => (mesh.#sizes[axis] as number) > 1))
        mesh.#groups.set(axes.join('_'), await world.part(axes.join('_'), partsAlong(experts, axes)))
    mesh.#groups.set('dp_cp', await world.part('dp_cp', partsAlong(grid, ['dp', 'cp'])))
    mesh.#groups.set('tp_pp', await world.part('tp_pp', partsAlong(grid, ['tp', 'pp'])))
    mesh.#groups.set('world', world.group)
    if (pp === 1) mesh.#groups.set('embd', new CommGroup('embd', 0, 1, 0, [world.rank]))
    else {
      const ends = partsAlong(grid, ['pp']).flatMap((stages) => [[stages[0] as number, stages.at(-1) as number]])
      mesh.#groups.set('embd', await world.part('embd', ends))
    }
    if (parallel.numQueryGroups !== undefined) await mesh.kvReplicas(parallel.numQueryGroups)
    return mesh
  }

  /** The group of this rank along an axis. @throws ERR_LAYOUT_INVALID for an axis without a group. */
  get(axis: Axis | (string & {})): CommGroup {
    const group = this.#groups.get(axis)
    if (group !== undefined) return group
    throw new ViaductError(
      'ERR_LAYOUT_INVALID',
      'mesh',
      `expected an axis of ${[...this.#groups.keys()].join(', ')}, got ${axis}${axis === 'tp_kv' ? ': call kvReplicas(numQueryGroups) once' : ''}`,
    )
  }

  /**
   * The ranks that hold copies of the same key and value heads: one, unless tp exceeds the number of kv heads. Also `get('tp_kv')`
   * from then on. Every rank calls it.
   */
  async kvReplicas(numQueryGroups: number): Promise<CommGroup> {
    const tp = this.#sizes.tp as number
    const copies = tp > numQueryGroups && tp % numQueryGroups === 0 ? tp / numQueryGroups : 1
    const split: Grid = [['tp_kv', copies], ['heads', tp / copies], ...this.#grid.slice(1)]
    const group = await this.world.part('tp_kv', partsAlong(split, ['tp_kv']))
    this.#groups.set('tp_kv', group)
    return group
  }

  /** The ranks of each pipeline, in the order of its stages. */
  pipelines(): number[][] {
    return partsAlong(this.#grid, ['pp'])
  }

  /** Sizes by axis, e.g. for the first line of a run. */
  describe(): Record<string, number> {
    return { ...this.#sizes }
  }

  /** The groups belong to the world and end with it. */
  async dispose(): Promise<void> {}
}
