// Copies of a shard on several ranks of one host: one rank reads, the others get it through their group. Which blocks have copies
// follows from shards and mesh; what reading means is the caller's. Ranks on other hosts read for themselves.
import { hostname } from 'node:os'
import { settleAll } from '../io/blocks.js'
import type { DistributedModel } from '../models/distributedModel.js'
import { allGatherObject, broadcast } from '../parallel/collectives.js'
import type { CommGroup } from '../parallel/group.js'
import type { Mesh } from '../parallel/mesh.js'
import type { Ctx } from '../tensor/ctx.js'
import { volume } from '../tensor/region.js'
import { withScope } from '../tensor/scope.js'
import type { ShardBlock, ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { ranksOf, together } from './ranks.js'

/** A shard to fill. */
export interface SharedShard {
  readonly tensor: Tensor
  readonly shard: ShardSpec
}

/** Which ranks of this host hold the same, along each axis that has copies. */
interface HostGroups {
  /** All tensor-parallel ranks: tensors that none of them cuts. */
  readonly tp: CommGroup
  /** Those with the same key and value heads. */
  readonly tp_kv: CommGroup
  /** Data-parallel ranks: everything. */
  readonly dp_cp: CommGroup
}

const axes = ['tp', 'tp_kv', 'dp_cp'] as const
const known = new WeakMap<Mesh, Promise<HostGroups>>()

/** The groups of a mesh within hosts. The first call for a mesh is a collective of all its ranks. */
function hostGroups(mesh: Mesh): Promise<HostGroups> {
  const made = known.get(mesh) ?? makeGroups(mesh)
  known.set(mesh, made)
  return made
}

async function makeGroups(mesh: Mesh): Promise<HostGroups> {
  const own = axes.map((axis) => mesh.get(axis).ranks)
  const all = await allGatherObject({ host: hostname(), groups: own }, mesh.get('world'))
  const [tp, tp_kv, dp_cp] = axes.map((_, i) =>
    partsOfHosts(all.map(({ host, groups }) => ({ host, ranks: groups[i] as readonly number[] }))),
  ) as [number[][], number[][], number[][]]
  // Who reads for the copies must be agreed among those who pass a tensor on to each other; where hosts cut groups unevenly, each
  // copy reads for itself.
  const copies = areAlike(tp, dp_cp) ? dp_cp : all.map((_, rank) => [rank])
  const made = [tp, tp_kv, copies].map((parts, i) => () => mesh.world.part(`${axes[i]} of a host`, parts))
  const groups: CommGroup[] = []
  for (const make of made) groups.push(await make())
  return { tp: groups[0] as CommGroup, tp_kv: groups[1] as CommGroup, dp_cp: groups[2] as CommGroup }
}

/** The world in parts: each rank's group, without the ranks on other hosts than its own. @param all - by rank of the world */
export function partsOfHosts(all: readonly { readonly host: string; readonly ranks: readonly number[] }[]): number[][] {
  const parts = new Map<string, number[]>()
  for (const { host, ranks } of all) {
    const here = ranks.filter((rank) => all[rank]?.host === host)
    parts.set(here.join(), here)
  }
  return [...parts.values()]
}

/** True where all ranks of each of `parts` have the same place in parts of `copies` of the same size. */
export function areAlike(parts: readonly (readonly number[])[], copies: readonly (readonly number[])[]): boolean {
  const places = new Map(copies.flatMap((ranks) => ranks.map((rank, i) => [rank, `${i} of ${ranks.length}`] as const)))
  return parts.every(([first, ...rest]) => rest.every((rank) => places.get(rank) === places.get(first as number)))
}

const isWhole = ({ logicalShape, blocks }: ShardSpec) =>
  blocks.length === 1 && blocks[0]?.size.every((n, d) => n === logicalShape[d]) === true

/**
 * Which shards all ranks of the group hold whole. Asked, as one rank cannot tell: a vocabulary that is padded may leave all of its
 * rows to the first rank.
 */
async function wholeOnAll(shards: readonly SharedShard[], group: CommGroup): Promise<boolean[]> {
  const all = await allGatherObject(shards.map(({ shard }) => (isWhole(shard) ? '1' : '0')).join(''), group)
  return shards.map((_, i) => all.every((flags) => flags[i] === '1'))
}

/** Ranks of one host that fill the same copy of a tensor together. */
export interface Sharers {
  /** This one of them. */
  readonly rank: number
  /** What each of them reads. */
  readonly blocks: readonly (readonly Pick<ShardBlock, 'globalStart' | 'size'>[])[]
}

/** Fills the given blocks of the shard with this index; also called with no blocks, where others read all of them. */
export type ReadBlocks = (index: number, blocks: readonly ShardBlock[], sharers: Sharers) => Promise<void>

/**
 * Fills shards so that each byte is read once a host. Without a model this rank reads all of its own. With one every rank of its
 * mesh calls, with shards of the same tensors in the same order; all have finished reading before anything is passed on.
 * @throws what `read` throws; ERR_RANK_FAILED on the other ranks
 */
export async function fillOnce(
  shards: readonly SharedShard[],
  model: DistributedModel | null,
  read: ReadBlocks,
): Promise<void> {
  for (const stream of new Set(shards.map(({ tensor }) => tensor.stream))) await stream.sync()
  if (model === null || model.mesh.get('world').size === 1) {
    await settleAll(shards.map(({ shard: { blocks } }, index) => read(index, blocks, { rank: 0, blocks: [blocks] })))
    return
  }
  const { tp, tp_kv, dp_cp } = await hostGroups(model.mesh)
  const readers = spread(shards, dp_cp.size)
  const whole = await wholeOnAll(shards, tp)
  const passed: { tensor: Tensor; block: ShardBlock; root: number; group: CommGroup }[] = []
  const reads: { index: number; blocks: ShardBlock[] }[] = []
  for (const [index, { tensor, shard }] of shards.entries()) {
    if (readers[index] !== dp_cp.rank) continue
    const blocks: ShardBlock[] = []
    for (const block of shard.blocks) {
      const copies = block.gradSum.includes('tp_kv') ? tp_kv : whole[index] ? tp : null
      const group = copies !== null && copies.size > 1 ? copies : null
      const root = index % (group?.size ?? 1)
      if (group !== null) passed.push({ tensor, block, root, group })
      if (group === null || group.rank === root) blocks.push(block)
    }
    reads.push({ index, blocks })
  }
  const boxes = reads.map(({ blocks }) => blocks.map(({ globalStart, size }) => ({ globalStart, size })))
  const shared = await allGatherObject(boxes, tp)
  await together(ranksOf(model.mesh), () =>
    settleAll(
      reads.map(({ index, blocks }, i) =>
        read(index, blocks, { rank: tp.rank, blocks: shared.map((own) => own[i] ?? []) }),
      ),
    ),
  )
  await withScope(model.ctx(), async (ctx) => {
    for (const { tensor, block, root, group } of passed) broadcast(ctx, rowsOf(ctx, tensor, block), root, group)
    for (const [index, { tensor }] of shards.entries()) broadcast(ctx, tensor, readers[index] as number, dp_cp)
    await ctx.stream.sync()
  })
}

/** Which of `size` copies reads which shard: the next goes to whoever has least. Equal on all ranks. */
function spread(shards: readonly SharedShard[], size: number): number[] {
  const loads = Array.from({ length: size }, () => 0)
  return shards.map(({ shard }) => {
    const least = loads.indexOf(Math.min(...loads))
    loads[least] = (loads[least] as number) + volume(shard.logicalShape)
    return least
  })
}

/** A block that is a run of whole rows of the local tensor, as a contiguous view. */
function rowsOf(ctx: Ctx, tensor: Tensor, { localStart, size }: ShardBlock): Tensor {
  const begin = localStart.reduce((sum, at, d) => sum + at * (tensor.strides[d] as number), 0)
  return tensor.view(ctx, size, tensor.strides, begin)
}
