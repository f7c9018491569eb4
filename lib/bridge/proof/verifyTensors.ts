// The proof of one parameter: its Hugging Face tensors are cut into the shards of a layout and put together again by the plans that
// import and export use, or taken from a checkpoint, into a scratch file, and compared byte for byte. Memory: one stretch.
import { rm } from 'node:fs/promises'
import { native } from '../../addon/load.js'
import { dtypeBytes } from '../../base/dtype.js'
import type { OpenCheckpoint } from '../../checkpoint/checkpointIndex.js'
import { checkPiece } from '../../checkpoint/loadCheckpoint.js'
import {
  compareRanges,
  copyRegion,
  createFile,
  type FileTensor,
  readRegion,
  settleAll,
  sha256Range,
  writeRegion,
} from '../../io/blocks.js'
import { type ByteLease, leaseHere } from '../../io/hub/remoteBytes.js'
import { type RowCutter, rowCutter } from '../../models/layoutShards.js'
import type { Binding, Part } from '../../models/mapping.js'
import type { ParameterRow } from '../../models/parameterTable.js'
import { type ParallelConfig, smallestWorld } from '../../parallel/config.js'
import { rankCoordinates } from '../../parallel/rankCoordinates.js'
import { Ctx } from '../../tensor/ctx.js'
import { composeRegions, identityRegion, invertRegions, stretches } from '../../tensor/region.js'
import { withScope } from '../../tensor/scope.js'
import { loadRegions, ownedRegions, type ShardSpec } from '../../tensor/shardSpec.js'
import { Tensor } from '../../tensor/tensor.js'
import { type HfModel, placeOf } from '../hfModel.js'
import { exportPart } from '../offline/checkpointSource.js'
import type { CarryingRule, VerifiedTensor } from './certificate.js'
import { sliceName } from './modelSide.js'

/** What the tensors of one parameter came to. */
export interface TensorProof {
  readonly tensors: readonly VerifiedTensor[]
  readonly problems: readonly string[]
}

/** Cutters of the ranks of a layout that hold different shards: data- and context-parallel copies would repeat the same work. */
export interface LayoutCutters {
  readonly dense: readonly RowCutter[]
  readonly expert: readonly RowCutter[]
}

/** The cutters of a layout's smallest world. @throws ERR_LAYOUT_INVALID */
export function layoutCutters(config: HfModel['config'], parallel: ParallelConfig): LayoutCutters {
  const world = smallestWorld(parallel)
  const made = new Map<number, RowCutter>()
  const [dense, expert] = [new Map<string, RowCutter>(), new Map<string, RowCutter>()]
  for (let rank = 0; rank < world; rank++) {
    const { tp, pp, ep, etp } = rankCoordinates(parallel, world, rank)
    const places = [
      [dense, `${pp} ${tp}`],
      [expert, `${pp} ${ep} ${etp}`],
    ] as const
    for (const [cutters, place] of places) {
      if (cutters.has(place)) continue
      const cutter = made.get(rank) ?? rowCutter(config, parallel, world, rank)
      made.set(rank, cutter)
      cutters.set(place, cutter)
    }
  }
  return { dense: [...dense.values()], expert: [...expert.values()] }
}

interface Placed {
  /** HF name, with the index of its slice where it is one: `experts.down_proj[3]`. */
  readonly name: string
  /** The source's file. */
  readonly file: string
  readonly part: Part
  readonly rule: CarryingRule
  readonly source: FileTensor
  readonly bytes: number
  readonly place: FileTensor
}

/**
 * Proves the tensors of one parameter, copies of tied ones included.
 * @param cutters - of the layout that the tensors go through; a checkpoint goes before it.
 * @param file - the scratch file, of the parameter's size.
 */
export async function proveParameter(
  model: HfModel,
  checkpoint: OpenCheckpoint | null,
  row: ParameterRow,
  cutters: LayoutCutters,
  file: string,
): Promise<TensorProof> {
  const binding = model.mapping.bindings.get(row.name) as Binding
  const placed: Placed[] = []
  let offset = 0
  const { tensors: sources } = model.weights
  const own = binding.parts.map((part) => ({ name: part.name, part, rule: { kind: binding.kind, ours: binding.ours } }))
  const copies = model.coverage.tied.flatMap((name) => {
    const part = binding.parts.find((p) => p.name === model.mapping.tied.get(name))
    return part ? [{ name, part, rule: { kind: 'tied' as const, ours: binding.ours } }] : []
  })
  for (const { name, part, rule } of [...own, ...copies]) {
    const source = sources.get(name)
    if (source === undefined) continue
    const bytes = (source.entry.end - source.entry.begin) / (part.slice?.count ?? 1)
    placed.push({
      name: rule.kind === 'tied' ? name : sliceName(part),
      part,
      rule,
      file: source.file,
      source: placeOf(source, part),
      bytes,
      place: { path: file, offset, dtype: source.entry.dtype, shape: part.shape },
    })
    offset += Math.ceil(bytes / 8) * 8
  }
  if (placed.length === 0) return { tensors: [], problems: [] }
  const problems: string[] = []
  await createFile(file, offset, new Uint8Array(0))
  // One parameter's bytes are here at a time, as its copy is.
  const lease = await leaseHere(
    model.weights.remote,
    placed.map(({ source, bytes }) => ({ path: source.path, begin: source.offset, end: source.offset + bytes })),
  )
  try {
    if (checkpoint) problems.push(...(await fromCheckpoint(checkpoint, binding, placed)))
    else await throughShards(model, shardsOf(row, cutters), binding, placed, lease)
    const tensors: VerifiedTensor[] = []
    for (const { name, rule, file: home, source, bytes, place } of placed) {
      const proved = await compareTensor({ name, rule, source: lease.local(source), place, bytes })
      problems.push(...differenceOf(proved, home))
      tensors.push(proved)
    }
    return { tensors, problems }
  } finally {
    await lease.release()
    await rm(file, { force: true })
  }
}

/** A tensor that is kept as it is because it follows from the config. @param kept - in the checkpoint; null: none is given. */
export async function proveDerived(
  model: HfModel,
  name: string,
  kept: FileTensor | null,
  file: string,
): Promise<TensorProof> {
  const source = model.parcel.carried.get(name) as FileTensor
  const { entry, file: home } = model.weights.tensors.get(name) as NonNullable<
    ReturnType<HfModel['weights']['tensors']['get']>
  >
  const bytes = entry.end - entry.begin
  if (kept !== null && (kept.dtype !== source.dtype || kept.shape.join() !== source.shape.join())) {
    const [here, there] = [source, kept].map(({ dtype, shape }) => `${dtype} [${shape}]`)
    return { tensors: [], problems: [`${name} is ${here} in the folder, ${there} in the checkpoint`] }
  }
  const copy = { path: file, offset: 0, dtype: source.dtype, shape: source.shape }
  if (kept === null) {
    await createFile(file, bytes, new Uint8Array(0))
    await copyRegion(source, copy, identityRegion(source.shape))
  }
  try {
    const rule = { kind: 'derived', ours: null } as const
    const proved = await compareTensor({ name, rule, source, place: kept ?? copy, bytes })
    return { tensors: [proved], problems: differenceOf(proved, home) }
  } finally {
    if (kept === null) await rm(file, { force: true })
  }
}

async function compareTensor(
  tensor: Pick<Placed, 'name' | 'rule' | 'source' | 'place' | 'bytes'>,
): Promise<VerifiedTensor> {
  const { name, rule, source, place, bytes } = tensor
  const { differing, first } = await compareRanges(source, place, bytes)
  return {
    name,
    shape: source.shape,
    dtype: source.dtype,
    bytes,
    rule,
    differingBytes: differing,
    firstDifference: first,
    sha256Before: await sha256Range(source.path, source.offset, bytes),
    sha256After: await sha256Range(place.path, place.offset, bytes),
  }
}

function differenceOf({ name, bytes, differingBytes, firstDifference }: VerifiedTensor, home: string): string[] {
  if (differingBytes === 0) return []
  return [`${name} of ${home}: ${differingBytes} of ${bytes} bytes differ, the first at byte ${firstDifference}`]
}

/** The shards of a parameter that own a part of it. */
function shardsOf(row: ParameterRow, cutters: LayoutCutters): ShardSpec[] {
  return (row.expert === null ? cutters.dense : cutters.expert).flatMap((cut) => {
    const shard = cut(row)
    return shard !== null && ownedRegions(shard).length > 0 ? [shard] : []
  })
}

/** Bytes of a shard that are in memory at a time. */
const mostBytes = 32 * 2 ** 20

/** Import plan into every shard, export plan out of it, stretch by stretch. */
async function throughShards(
  model: HfModel,
  shards: readonly ShardSpec[],
  binding: Binding,
  placed: readonly Placed[],
  lease: ByteLease,
): Promise<void> {
  const dtype = placed[0]?.source.dtype as FileTensor['dtype']
  const ctx = Ctx.create({ device: 'cpu' })
  try {
    for (const shard of shards) {
      for (const { start, size } of stretches(shard.localShape, mostBytes / dtypeBytes(dtype))) {
        const toStretch = [{ from: start, to: size.map(() => 0), size }]
        const incoming = composeRegions(loadRegions(shard), toStretch)
        const outgoing = composeRegions(invertRegions(toStretch), ownedRegions(shard))
        if (outgoing.length === 0) continue
        await withScope(ctx, async (inner) => {
          const local = Tensor.empty(inner, size, dtype)
          native.fill(inner.stream.id, local.handle, 0)
          await inner.stream.sync()
          await settleAll(
            binding.parts.flatMap((part) => {
              const source = model.weights.tensors.get(part.name)
              if (source === undefined) return []
              const place = lease.local(placeOf(source, part))
              return composeRegions(part.regions, incoming).map((region) => readRegion(place, local, region))
            }),
          )
          await settleAll(
            placed.flatMap(({ part, place }) =>
              composeRegions(outgoing, invertRegions(part.regions)).map((region) => writeRegion(local, place, region)),
            ),
          )
        })
      }
    }
  } finally {
    ctx.scope.close()
  }
}

async function fromCheckpoint(
  checkpoint: OpenCheckpoint,
  binding: Binding,
  placed: readonly Placed[],
): Promise<string[]> {
  const tensor = checkpoint.tensors.get(binding.ours)
  const names = placed.map((p) => p.name).join(', ')
  if (tensor === undefined) return [`${names}: ${binding.ours} is missing from the checkpoint`]
  if (tensor.shape.join() !== binding.shape.join())
    return [
      `${names}: ${binding.ours} is [${tensor.shape}] in the checkpoint, [${binding.shape}] by the folder's config`,
    ]
  const problems: string[] = []
  for (const piece of tensor.pieces) {
    await checkPiece(checkpoint, binding.ours, tensor, piece).catch((error: unknown) =>
      problems.push((error as Error).message),
    )
  }
  for (const { name, part, place } of placed) {
    if (place.dtype === tensor.dtype) await exportPart(checkpoint, binding, part, place)
    else problems.push(`${name} is ${place.dtype} in the folder, ${tensor.dtype} in the checkpoint`)
  }
  return problems
}
