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
import type { CopiesAxis, ShardBlock, ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { ranksOf, together } from './ranks.js'

/** A shard to fill. */
export interface SharedShard {
  readonly tensor: Tensor
  readonly shard: ShardSpec
}

/** Which ranks of this host hold the same, along each axis that has copies. */
interface HostGroups {
  /** All ranks that share matrices: tensors that none of them cuts. */
  readonly slices: CommGroup
  /** Those with the same key and value heads. */
  readonly kv: CommGroup
  /** Those that hold everything alike. */
  readonly copies: CommGroup
}

/** The axes of HostGroups, for parameters by the axis of their copies. Experts have no key and value heads. */
const axes = { dp_cp: ['tp', 'tp_kv', 'dp_cp'], edp: ['etp', null, 'edp'] } as const
const known = new WeakMap<Mesh, Map<CopiesAxis, Promise<HostGroups>>>()

/** The groups of a mesh within hosts. The first call for a mesh and an axis is a collective of all its ranks. */
function hostGroups(mesh: Mesh, axis: CopiesAxis): Promise<HostGroups> {
  const ofMesh = known.get(mesh) ?? new Map<CopiesAxis, Promise<HostGroups>>()
  known.set(mesh, ofMesh)
  const made = ofMesh.get(axis) ?? makeGroups(mesh, axis)
  ofMesh.set(axis, made)
  return made
}

async function makeGroups(mesh: Mesh, axis: CopiesAxis): Promise<HostGroups> {
  const names = axes[axis]
  const own = names.map((name) => (name === null ? [mesh.world.rank] : mesh.get(name).ranks))
  const all = await allGatherObject({ host: hostname(), groups: own }, mesh.get('world'))
  const [slices, kv, copies] = names.map((_, i) =>
    partsOfHosts(all.map(({ host, groups }) => ({ host, ranks: groups[i] as readonly number[] }))),
  ) as [number[][], number[][], number[][]]
  // Who reads for the copies must be agreed among those who pass a tensor on to each other; where hosts cut groups unevenly, each
  // copy reads for itself.
  const agreed = areAlike(slices, copies) ? copies : all.map((_, rank) => [rank])
  const groups: CommGroup[] = []
  for (const [i, parts] of [slices, kv, agreed].entries())
    groups.push(await mesh.world.part(`${names[i] ?? 'rank'} of a host`, parts))
  return { slices: groups[0] as CommGroup, kv: groups[1] as CommGroup, copies: groups[2] as CommGroup }
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
  const all = shards.map((_, index) => index)
  const isExpert = (index: number) => shards[index]?.shard.copies === 'edp'
  await fillAlong(
    'dp_cp',
    all.filter((index) => !isExpert(index)),
    shards,
    model,
    read,
  )
  if (model.config.numMoeExperts !== null) await fillAlong('edp', all.filter(isExpert), shards, model, read)
}

/** Fills the shards with these indices, whose copies lie along the axis. */
async function fillAlong(
  axis: CopiesAxis,
  indices: readonly number[],
  shards: readonly SharedShard[],
  model: DistributedModel,
  read: ReadBlocks,
): Promise<void> {
  const own = indices.map((index) => shards[index] as SharedShard)
  const { slices, kv, copies } = await hostGroups(model.mesh, axis)
  const readers = spread(own, copies.size)
  const whole = await wholeOnAll(own, slices)
  const passed: { tensor: Tensor; block: ShardBlock; root: number; group: CommGroup }[] = []
  const reads: { index: number; blocks: ShardBlock[] }[] = []
  for (const [i, { tensor, shard }] of own.entries()) {
    if (readers[i] !== copies.rank) continue
    const blocks: ShardBlock[] = []
    for (const block of shard.blocks) {
      const alike = block.gradSum.includes('tp_kv') ? kv : whole[i] ? slices : null
      const group = alike !== null && alike.size > 1 ? alike : null
      const root = i % (group?.size ?? 1)
      if (group !== null) passed.push({ tensor, block, root, group })
      if (group === null || group.rank === root) blocks.push(block)
    }
    reads.push({ index: indices[i] as number, blocks })
  }
  const boxes = reads.map(({ blocks }) => blocks.map(({ globalStart, size }) => ({ globalStart, size })))
  const shared = await allGatherObject(boxes, slices)
  await together(ranksOf(model.mesh), () =>
    settleAll(
      reads.map(({ index, blocks }, i) =>
        read(index, blocks, { rank: slices.rank, blocks: shared.map((theirs) => theirs[i] ?? []) }),
      ),
    ),
  )
  await withScope(model.ctx(), async (ctx) => {
    for (const { tensor, block, root, group } of passed) broadcast(ctx, rowsOf(ctx, tensor, block), root, group)
    for (const [i, { tensor }] of own.entries()) broadcast(ctx, tensor, readers[i] as number, copies)
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
