// The offline converter: Hugging Face folder to checkpoint, back, and checkpoint to checkpoint in another layout. No model and
// no device: headers and options give a plan, conversion.ts carries it out. The layout decides who writes which piece, never what.
import { createHash } from 'node:crypto'
import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { stringify } from 'yaml'
import { type DType, dtypes } from '../../base/dtype.js'
import {
  indexName,
  isCheckpoint,
  iterationFolder,
  type OpenCheckpoint,
  trackerName,
} from '../../checkpoint/checkpointIndex.js'
import type { HfParcel } from '../../checkpoint/hfParcel.js'
import { readCheckpointFile } from '../../checkpoint/loadCheckpoint.js'
import { solo } from '../../checkpoint/ranks.js'
import { checkTarget, writeFileAtomic, writeFlushed } from '../../io/atomic.js'
import type { SourceOptions } from '../../io/hub/modelSource.js'
import { isAddress } from '../../io/hub/remoteFolder.js'
import { copyFiles, listOtherFiles } from '../../io/otherFiles.js'
import type { Binding, Coverage, CoveragePolicy } from '../../models/mapping.js'
import { type ParameterRow, parameterTable } from '../../models/parameterTable.js'
import { composeRegions, identityRegion } from '../../tensor/region.js'
import { type PlannedTensor, type PlanOptions, planExport } from '../exportPlan.js'
import { type HfModel, openHfModel, placeOf, readParcel } from '../hfModel.js'
import { sharedSource } from '../sharedSource.js'
import { coverageOf, exportedConfig, exportUnits, openConverted, recutMove } from './checkpointSource.js'
import { type ConversionOptions, type ConversionOutcome, convert, type Unit } from './conversion.js'
import type { Move } from './moves.js'
import {
  type LayoutOptions,
  layoutOf,
  type PieceTensor,
  planPieces,
  type TargetPiece,
  writeIndex,
} from './pieceTargets.js'

export type { OnProgress } from './conversion.js'

export interface ImportOptions extends CoveragePolicy, SourceOptions, LayoutOptions, ConversionOptions {
  /** Casts floating tensors; default: exactly as in the source. */
  readonly dtype?: DType
  readonly overwrite?: boolean
}

/** What a conversion did. */
export interface ConversionReport extends ConversionOutcome {
  readonly folder: string
  readonly tensors: number
  readonly bytes: number
  readonly coverage: Coverage
  /** Weight files of other formats in the source that are not carried. */
  readonly leftOut: readonly string[]
}

/** What tells a source file from a changed one. */
async function identityOf(
  files: readonly { readonly name: string; readonly path: string; readonly header: Uint8Array | string }[],
) {
  return Promise.all(
    files.map(async ({ name, path, header }) => {
      const { size, mtimeMs } = isAddress(path) ? { size: null, mtimeMs: null } : await stat(path)
      return [name, size, mtimeMs, createHash('sha256').update(header).digest('hex')]
    }),
  )
}

function castTo(dtype: DType | undefined, stored: DType): DType {
  return dtype && dtypes[stored].isFloat ? dtype : stored
}

/**
 * Imports a Hugging Face folder as `dir/iter_0000000`, or a checkpoint as `dir/iter_XXXXXXX` in another layout, optimizer
 * states and all its files included. Collective: every rank calls it; each does a share of the work.
 * @throws what openHfModel or openCheckpoint throws; ERR_TARGET_EXISTS; ERR_TARGET_BUSY; ERR_LAYOUT_INVALID; ERR_NO_SPACE.
 */
export async function importCkpt(source: string, dir: string, options: ImportOptions = {}): Promise<ConversionReport> {
  return !isAddress(source) && (await isCheckpoint(source))
    ? recut(source, dir, options)
    : importHf(source, dir, options)
}

async function importHf(hf: string, dir: string, options: ImportOptions): Promise<ConversionReport> {
  const ranks = options.ranks ?? solo
  const model = await openHfModel(await sharedSource(ranks, hf, options), options)
  const { config, mapping, coverage, parcel, weights } = model
  const layout = layoutOf(config, options, ranks.size)
  const tensors: PieceTensor[] = []
  for (const row of parameterTable(config)) {
    const { parts } = mapping.bindings.get(row.name) as Binding
    const stored = parts.map((part) => weights.tensors.get(part.name)?.entry.dtype).find((d) => d !== undefined)
    if (stored !== undefined) tensors.push({ name: row.name, dtype: castTo(options.dtype, stored), row }) // else permitted to be missing
  }
  const target = planPieces(tensors, config, layout)
  const record = {
    source: 'huggingface',
    hub: model.hub,
    address: model.address,
    partial: coverage.partial,
    ignored: coverage.ignored,
    missing: coverage.missing,
    leftOut: parcel.leftOut,
    dtype: options.dtype ?? null,
  }
  const sources = weights.files.map(({ name, path, header, entries }) => ({
    name,
    path,
    header: header?.bytes ?? JSON.stringify([...entries]),
  }))
  const folder = join(dir, iterationFolder(0))
  const outcome = await convert(
    {
      where: 'import',
      target: folder,
      identity: [await identityOf(sources), parcel.config.text, layout, record],
      admit: () => checkTarget(dir, options.overwrite ?? false),
      layoutRanks: layout.worldSize,
      remote: weights.remote,
      files: target.files,
      units: unitsOf(target.pieces, (piece, output) => importMove(model, piece, output)),
      shaTasks: [...weights.tensors].map(([name, source]) => ({ name, place: () => placeOf(source), units: null })),
      finish: async (output, xxh3, sha256) => {
        await writeFlushed(join(output, 'run_config.yaml'), stringify({ model: config }))
        const state = { iteration: 0, consumedSamples: 0 }
        await writeFlushed(join(output, 'train_state.json'), `${JSON.stringify(state, null, 2)}\n`)
        await writeFlushed(join(output, conversionName), formatRecord(record, sha256))
        await parcel.writeTo(output)
        await writeIndex(output, 0, target, layout.worldSize, xxh3)
      },
      afterwards: () => writeFileAtomic(join(dir, trackerName), '0\n'),
    },
    ranks,
    options,
  )
  return { ...outcome, folder, ...sizeOf(target.pieces, tensors), coverage, leftOut: parcel.leftOut }
}

const conversionName = 'conversion.json'

function formatRecord(record: object, sha256: ReadonlyMap<string, string>): string {
  const names = [...sha256].sort(([a], [b]) => (a < b ? -1 : 1))
  const digests = names.length === 0 ? {} : { sha256: Object.fromEntries(names) }
  return `${JSON.stringify({ ...record, ...digests }, null, 2)}\n`
}

function unitsOf(pieces: readonly TargetPiece[], move: (piece: TargetPiece, output: string) => Move): Unit[] {
  return pieces.map((piece) => ({
    bytes: piece.bytes,
    rank: piece.rank,
    move: (output) => move(piece, output),
  }))
}

function sizeOf(pieces: readonly TargetPiece[], tensors: readonly PieceTensor[]): { tensors: number; bytes: number } {
  return { tensors: tensors.length, bytes: pieces.reduce((n, piece) => n + piece.bytes, 0) }
}

/** The step that fills a piece from the Hugging Face tensors that it is made of. */
function importMove({ mapping, weights }: HfModel, piece: TargetPiece, output: string): Move {
  const wanted = [{ from: piece.start, to: piece.start.map(() => 0), size: piece.size }]
  const { parts } = mapping.bindings.get(piece.tensor.name) as Binding
  return {
    kind: 'gather',
    bytes: piece.bytes,
    to: piece.place(output),
    from: parts.flatMap((part) => {
      const source = weights.tensors.get(part.name)
      const regions = source === undefined ? [] : composeRegions(part.regions, wanted)
      return source === undefined || regions.length === 0 ? [] : [{ place: placeOf(source, part), regions }]
    }),
  }
}

const optimizerName = /^optimizer\.[^.]+\.(.+)$/

/** Checkpoint to checkpoint: the same tensors and files, cut for another layout. */
async function recut(source: string, dir: string, options: ImportOptions): Promise<ConversionReport> {
  const ranks = options.ranks ?? solo
  const { checkpoint, parcel } = await openConverted(source)
  const { config, mapping } = readParcel(parcel)
  const coverage = await coverageOf(checkpoint, mapping)
  const layout = layoutOf(config, options, ranks.size)
  const rows = new Map(parameterTable(config).map((row) => [row.name, row]))
  const tensors = [...checkpoint.tensors].map(([name, { dtype, shape }]): PieceTensor => {
    const slot = optimizerName.exec(name)
    const row = rows.get(slot?.[1] ?? name)
    // What is no parameter's (a step count) is kept whole.
    const whole: ParameterRow = { name, shape, cut: 'replicated', layer: 'final', expert: null }
    const fits = row !== undefined && row.shape.join() === shape.join()
    return { name, dtype: slot ? dtype : castTo(options.dtype, dtype), row: fits ? row : whole }
  })
  const target = planPieces(tensors, config, layout)
  const folder = join(dir, iterationFolder(checkpoint.iteration))
  const outcome = await convert(
    {
      where: 'import',
      target: folder,
      identity: [await identityOfCheckpoint(checkpoint), layout, options.dtype ?? null],
      admit: () => checkTarget(dir, options.overwrite ?? false),
      layoutRanks: layout.worldSize,
      files: target.files,
      units: unitsOf(target.pieces, (piece, output) => recutMove(checkpoint, piece, output)),
      shaTasks: [],
      finish: async (output, xxh3) => {
        await copyFiles(checkpoint.folder, await filesBeside(checkpoint), output)
        await writeIndex(output, checkpoint.iteration, target, layout.worldSize, xxh3)
      },
      afterwards: () => writeFileAtomic(join(dir, trackerName), `${checkpoint.iteration}\n`),
    },
    ranks,
    options,
  )
  return { ...outcome, folder, ...sizeOf(target.pieces, tensors), coverage, leftOut: [] }
}

/** The files of a checkpoint that are neither its index nor hold pieces. */
async function filesBeside({ folder, tensors }: OpenCheckpoint): Promise<string[]> {
  const { copied, leftOut } = await listOtherFiles(folder)
  const weights = new Set([...tensors.values()].flatMap(({ pieces }) => pieces.map(({ file }) => file)))
  return [...copied, ...leftOut].filter((name) => name !== indexName && !weights.has(name))
}

/** The index has the hash of every byte; sizes and times of the files tell that they are those. */
async function identityOfCheckpoint(checkpoint: OpenCheckpoint) {
  const { folder, tensors } = checkpoint
  const files = new Set([...tensors.values()].flatMap(({ pieces }) => pieces.map(({ file }) => file)))
  const index = Buffer.from((await readCheckpointFile(checkpoint, indexName)) as string)
  return identityOf([indexName, ...files].map((name) => ({ name, path: join(folder, name), header: index })))
}

export interface ExportOptions extends PlanOptions, ConversionOptions {
  /** Stands for the description that the checkpoint keeps. */
  readonly parcel?: HfParcel
  readonly overwrite?: boolean
  /** Checks the XXH3 of every piece. Default true. */
  readonly verify?: boolean
}

/**
 * Exports a checkpoint as a Hugging Face folder: the source's files, names and headers where nothing changed. Collective: each
 * rank does a share of the work.
 * @throws ERR_CHECKPOINT, ERR_CHECKPOINT_HASH, ERR_COVERAGE when a tensor of the model is not in the checkpoint,
 *   ERR_TARGET_EXISTS, ERR_TARGET_BUSY, ERR_NO_SPACE
 */
export async function exportCkpt(dir: string, hf: string, options: ExportOptions = {}): Promise<ConversionReport> {
  const ranks = options.ranks ?? solo
  const { checkpoint, parcel } = await openConverted(dir, options.parcel)
  const { mapping } = readParcel(parcel)
  const coverage = await coverageOf(checkpoint, mapping)
  const plan = planExport(mapping, parcel, (ours) => checkpoint.tensors.get(ours)?.dtype ?? null, options)
  const described = parcel.with({ config: exportedConfig(parcel, plan.mainDtype) })
  const place = ({ file, offset, dtype, shape }: PlannedTensor, output: string) => ({
    path: join(output, file),
    offset,
    dtype,
    shape,
  })
  const { units, unitsByTensor } = planUnits(checkpoint, plan.tensors, place, options.verify ?? true)
  const outcome = await convert(
    {
      where: 'export',
      target: hf,
      identity: [
        await identityOfCheckpoint(checkpoint),
        described.config.text,
        plan.files.map(({ name, header }) => [name, createHash('sha256').update(header.bytes).digest('hex')]),
      ],
      admit: () => checkTarget(hf, options.overwrite ?? false),
      layoutRanks: 1,
      files: plan.files,
      units,
      shaTasks: plan.files.flatMap(({ name: file, header }) =>
        [...header.entries.values()].map(({ name, dtype, shape, begin }) => ({
          name,
          place: (output: string) => ({ path: join(output, file), offset: header.bytes.length + begin, dtype, shape }),
          units: unitsByTensor.get(name) as [number, number],
        })),
      ),
      finish: async (output, _, sha256) => {
        await described.writeFiles(output)
        if (plan.index) await writeFlushed(join(output, plan.index.name), plan.index.text)
        if (sha256.size > 0)
          await writeFlushed(join(output, conversionName), formatRecord({ source: 'viaduct' }, sha256))
      },
    },
    ranks,
    options,
  )
  const bytes = plan.tensors.reduce((n, t) => n + t.bytes, 0)
  return { ...outcome, folder: hf, tensors: plan.tensors.length, bytes, coverage, leftOut: [] }
}

/** Units in the order in which the files want their logical tensors, and between which of them each tensor is written. */
function planUnits(
  checkpoint: OpenCheckpoint,
  planned: readonly PlannedTensor[],
  place: (tensor: PlannedTensor, output: string) => ReturnType<typeof placeOf>,
  verify: boolean,
): { units: Unit[]; unitsByTensor: Map<string, [number, number]> } {
  const groups = new Map<string, PlannedTensor[]>()
  for (const tensor of planned) {
    const key = 'binding' in tensor.origin ? `ours ${tensor.origin.binding.ours}` : `carried ${tensor.name}`
    groups.set(key, [...(groups.get(key) ?? []), tensor])
  }
  const units: Unit[] = []
  const unitsByTensor = new Map<string, [number, number]>()
  for (const group of groups.values()) {
    const [{ origin, bytes, shape }] = group as [PlannedTensor]
    const first = units.length
    if ('binding' in origin) units.push(...exportUnits(checkpoint, origin.binding.ours, group, place, verify))
    else {
      const from = [{ place: origin.carried, regions: [identityRegion(shape)] }]
      units.push({
        bytes,
        rank: 0,
        move: (output) => ({ kind: 'gather', bytes, to: place(group[0] as PlannedTensor, output), from }),
      })
    }
    for (const { name } of group) {
      const known = unitsByTensor.get(name)
      unitsByTensor.set(name, [known?.[0] ?? first, units.length])
    }
  }
  return { units, unitsByTensor }
}
