// The proof of a round trip: every tensor is cut into the shards of a layout and put together again by the same plans that
// import and export use, or taken from a checkpoint, and compared byte for byte. Beside it: coverage, config fields, files.
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { native } from '../addon/load.js'
import { packageVersion } from '../base/packageRoot.js'
import { type OpenCheckpoint, openCheckpoint } from '../checkpoint/checkpointIndex.js'
import { HfParcel } from '../checkpoint/hfParcel.js'
import { checkPiece } from '../checkpoint/loadCheckpoint.js'
import { type Ranks, solo, together } from '../checkpoint/ranks.js'
import {
  compareRanges,
  createFile,
  type FileTensor,
  readRegion,
  settleAll,
  sha256Range,
  writeRegion,
} from '../io/blocks.js'
import type { SourceOptions } from '../io/hub/modelSource.js'
import { type ByteLease, leaseHere } from '../io/hub/remoteBytes.js'
import type { JsonValue } from '../io/jsonDocument.js'
import { fileInside } from '../io/paths.js'
import type { HfConfig } from '../models/family.js'
import { layoutProblems, type RowCutter, rowCutter } from '../models/layoutShards.js'
import type { Binding, Coverage, CoveragePolicy } from '../models/mapping.js'
import { type ParameterRow, parameterTable } from '../models/parameterTable.js'
import { type ParallelConfig, parallelOf, refuseLayout, smallestWorld } from '../parallel/config.js'
import { Ctx } from '../tensor/ctx.js'
import { composeRegions, invertRegions } from '../tensor/region.js'
import { withScope } from '../tensor/scope.js'
import { loadRegions, ownedRegions } from '../tensor/shardSpec.js'
import { Tensor } from '../tensor/tensor.js'
import { exportPart } from './checkpointSource.js'
import type { OnProgress } from './conversion.js'
import { type HfModel, openHfModel, placeOf } from './hfModel.js'
import { sharedSource } from './sharedSource.js'

/** The layout is simulated: this process cuts the shards of all its ranks. */
export interface VerifyOptions extends CoveragePolicy, SourceOptions, Partial<ParallelConfig> {
  /** A checkpoint to compare the folder with, instead of the layout's shards. */
  readonly ckpt?: string
  readonly ranks?: Ranks
  readonly onProgress?: OnProgress
}

/** One row of the table. */
export interface VerifiedTensor {
  readonly name: string
  readonly shape: readonly number[]
  readonly dtype: string
  readonly bytes: number
  /** Bytes that came back differently, and the offset of the first in the tensor (-1 where none did). */
  readonly differingBytes: number
  readonly firstDifference: number
  readonly sha256Before: string
  readonly sha256After: string
}

/** The certificate of a verification. */
export interface Verification {
  readonly ok: boolean
  /** Something was ignored or allowed to be missing. */
  readonly partial: boolean
  readonly folder: string
  /** Model and commit of a folder of the hub's cache; else null. */
  readonly hub: HfModel['hub']
  /** Where the folder is on a web server; else null. */
  readonly address: string | null
  readonly checkpoint: string | null
  /** The simulated layout. */
  readonly parallel: ParallelConfig
  readonly version: string
  readonly tensors: readonly VerifiedTensor[]
  readonly differingBytes: number
  readonly coverage: Coverage
  /** The config came back byte for byte after a translation there and back. */
  readonly configKept: boolean
  /** Every difference in words, naming tensor or file. */
  readonly problems: readonly string[]
}

/**
 * Verifies a folder. Collective: ranks share the tensors.
 * @throws what openHfModel throws: a folder that cannot be covered is an error, a difference is a result with ok = false.
 */
export async function verify(path: string, options: VerifyOptions = {}): Promise<Verification> {
  const ranks = options.ranks ?? solo
  const parallel = parallelOf(options)
  const model = await openHfModel(await sharedSource(ranks, path, options), options)
  refuseLayout(layoutProblems(model.config, parallel))
  const world = smallestWorld(parallel)
  const cutters = Array.from({ length: world }, (_, rank) => rowCutter(model.config, parallel, world, rank))
  const checkpoint = options.ckpt === undefined ? null : await openCheckpoint(options.ckpt)
  const own: { tensors: VerifiedTensor[]; problems: string[] } = { tensors: [], problems: [] }
  const [configKept, configProblem] = checkConfig(model)
  if (configProblem && ranks.rank === 0) own.problems.push(configProblem)
  if (checkpoint && ranks.rank === 0) own.problems.push(...(await compareFiles(model, checkpoint)))

  const scratch = await mkdtemp(join(tmpdir(), 'viaduct-verify-'))
  const all = await together(ranks, async () => {
    try {
      const rows = parameterTable(model.config).filter((_, i) => i % ranks.size === ranks.rank)
      const total = [...model.weights.tensors.values()].reduce((n, { entry }) => n + entry.end - entry.begin, 0)
      for (const row of rows) {
        const binding = model.mapping.bindings.get(row.name) as Binding
        const result = await verifyBinding(model, checkpoint, row, binding, cutters, join(scratch, 'tensor'))
        own.tensors.push(...result.tensors)
        own.problems.push(...result.problems)
        options.onProgress?.(
          own.tensors.reduce((n, t) => n + t.bytes, 0),
          Math.ceil(total / ranks.size),
        )
      }
      return own
    } finally {
      await rm(scratch, { recursive: true, force: true })
    }
  })
  const order = new Map([...model.weights.tensors.keys()].map((name, i) => [name, i]))
  const place = ({ name }: VerifiedTensor) => order.get(name.replace(/\[\d+\]$/, '')) ?? 0
  const tensors = all.flatMap((r) => r.tensors).sort((a, b) => place(a) - place(b))
  const problems = all.flatMap((r) => r.problems)
  return {
    ok: problems.length === 0,
    partial: model.coverage.partial,
    folder: model.folder,
    hub: model.hub,
    address: model.address,
    checkpoint: checkpoint?.folder ?? null,
    parallel,
    version: packageVersion(),
    tensors,
    differingBytes: tensors.reduce((n, t) => n + t.differingBytes, 0),
    coverage: model.coverage,
    configKept,
    problems,
  }
}

/** The translation there and back must give the same text. */
function checkConfig({ parcel, family, config }: HfModel): [boolean, string | null] {
  const source = parcel.config.value as HfConfig
  const back = parcel.config.with(family.toHf(config, source) as JsonValue)
  return back.text === parcel.config.text
    ? [true, null]
    : [false, 'config.json does not come back byte for byte from its translation']
}

interface Placed {
  /** HF name, with the index of its slice where it is one: `experts.down_proj[3]`. */
  readonly name: string
  /** The source's file. */
  readonly file: string
  readonly part: Binding['parts'][number]
  readonly source: FileTensor
  readonly bytes: number
  readonly place: FileTensor
}

async function verifyBinding(
  model: HfModel,
  checkpoint: OpenCheckpoint | null,
  row: ParameterRow,
  binding: Binding,
  cutters: readonly RowCutter[],
  file: string,
): Promise<{ tensors: VerifiedTensor[]; problems: string[] }> {
  const placed: Placed[] = []
  let offset = 0
  const { tensors: sources } = model.weights
  const copies = model.coverage.tied.map((copy) => ({
    name: copy,
    part: binding.parts.find((p) => p.name === model.mapping.tied.get(copy)),
  }))
  for (const { name, part } of [...binding.parts.map((p) => ({ name: p.name, part: p })), ...copies]) {
    const source = sources.get(name)
    if (source === undefined || part === undefined) continue
    const bytes = (source.entry.end - source.entry.begin) / (part.slice?.count ?? 1)
    placed.push({
      name: part.slice === null ? name : `${name}[${part.slice.index}]`,
      part,
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
    else await throughShards(model, row, binding, placed, cutters, lease)
    const tensors: VerifiedTensor[] = []
    for (const { name, file: home, source: there, bytes, place } of placed) {
      const source = lease.local(there)
      const { differing, first } = await compareRanges(source, place, bytes)
      if (differing > 0)
        problems.push(`${name} of ${home}: ${differing} of ${bytes} bytes differ, the first at byte ${first}`)
      tensors.push({
        name,
        shape: source.shape,
        dtype: source.dtype,
        bytes,
        differingBytes: differing,
        firstDifference: first,
        sha256Before: await sha256Range(source.path, source.offset, bytes),
        sha256After: await sha256Range(place.path, place.offset, bytes),
      })
    }
    return { tensors, problems }
  } finally {
    await lease.release()
    await rm(file, { force: true })
  }
}

/** Import plan into the shards of every rank of the layout, export plan out of them. */
async function throughShards(
  model: HfModel,
  row: ParameterRow,
  binding: Binding,
  placed: readonly Placed[],
  cutters: readonly RowCutter[],
  lease: ByteLease,
): Promise<void> {
  const dtype = placed[0]?.source.dtype as FileTensor['dtype']
  const ctx = Ctx.create({ device: 'cpu' })
  await withScope(ctx, async (inner) => {
    for (const cut of cutters) {
      const shard = cut(row)
      if (shard === null || shard.blocks.length === 0) continue
      const local = Tensor.empty(inner, shard.localShape, dtype)
      native.fill(inner.stream.id, local.handle, 0)
      await inner.stream.sync()
      for (const part of binding.parts) {
        const source = model.weights.tensors.get(part.name)
        if (source)
          await settleAll(
            composeRegions(part.regions, loadRegions(shard)).map((region) =>
              readRegion(lease.local(placeOf(source, part)), local, region),
            ),
          )
      }
      for (const { part, place } of placed) {
        await settleAll(
          composeRegions(ownedRegions(shard), invertRegions(part.regions)).map((region) =>
            writeRegion(local, place, region),
          ),
        )
      }
      local.dispose()
    }
  })
  ctx.scope.close()
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

/** Files beside the tensors: names, headers, index, config and every other file, and tensors that only one side has. */
async function compareFiles(model: HfModel, checkpoint: OpenCheckpoint): Promise<string[]> {
  const problems: string[] = []
  const kept = await HfParcel.fromCheckpoint(checkpoint.folder)
  for (const name of checkpoint.tensors.keys()) {
    if (!name.startsWith('optimizer.') && !model.mapping.bindings.has(name))
      problems.push(`${name} is in the checkpoint, and nothing in the folder maps to it`)
  }
  if (kept === null) return [...problems, `hf/config.json is missing from ${checkpoint.folder}`]
  if (kept.config.text !== model.parcel.config.text)
    problems.push('config.json differs from the one that the checkpoint keeps')
  if (kept.layout) {
    const ours = new Map(kept.layout.files.map((file) => [file.name, file.header.bytes]))
    for (const { name, header } of model.parcel.layout?.files ?? []) {
      const bytes = ours.get(name)
      ours.delete(name)
      if (bytes === undefined) problems.push(`${name} is not among the files that the checkpoint keeps`)
      else if (!Buffer.from(bytes).equals(Buffer.from(header.bytes)))
        problems.push(`${name}: its header differs from the one that the checkpoint keeps`)
    }
    for (const name of ours.keys()) problems.push(`${name} is kept in the checkpoint but not in the folder`)
    if ((kept.layout.index?.text ?? null) !== (model.parcel.layout?.index?.text ?? null))
      problems.push('the index differs from the one that the checkpoint keeps')
  }
  const theirs = new Set(model.parcel.others)
  for (const name of kept.others) {
    if (!theirs.delete(name)) problems.push(`${name} is kept in the checkpoint but not in the folder`)
    else if (!(await sameFile(model.folder, kept.folder as string, name)))
      problems.push(`${name} differs from the one that the checkpoint keeps`)
  }
  for (const name of theirs) problems.push(`${name} is not among the files that the checkpoint keeps`)
  for (const name of model.coverage.derived) {
    const place = kept.carried.get(name)
    const source = model.parcel.carried.get(name) as FileTensor
    const bytes =
      (model.weights.tensors.get(name)?.entry.end ?? 0) - (model.weights.tensors.get(name)?.entry.begin ?? 0)
    if (place === undefined) problems.push(`${name} is missing from the checkpoint`)
    else if ((await compareRanges(source, place, bytes)).differing > 0)
      problems.push(`${name} differs from the one that the checkpoint keeps`)
  }
  return problems
}

async function sameFile(a: string, b: string, name: string): Promise<boolean> {
  const [left, right] = await Promise.all([a, b].map(async (folder) => readFile(await fileInside(folder, name))))
  return (left as Buffer).equals(right as Buffer)
}
