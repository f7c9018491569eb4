// A model as one side of a comparison: a Hugging Face folder or a checkpoint, its tensors by Hugging Face names. Opening proves that
// the files are sound, not that they are complete: what is missing shows in the comparison.
import type { DType } from '../../base/dtype.js'
import { isCheckpoint, type OpenCheckpoint } from '../../checkpoint/checkpointIndex.js'
import type { HfParcel } from '../../checkpoint/hfParcel.js'
import { pieceRegion } from '../../checkpoint/loadCheckpoint.js'
import type { BoxMove } from '../../io/blocks.js'
import { modelFolder, type SourceOptions } from '../../io/hub/modelSource.js'
import type { FamilySpec } from '../../models/family.js'
import { type Binding, type Mapping, type Part, type TensorNames, tensorShape } from '../../models/mapping.js'
import type { TransformerConfig } from '../../models/transformerConfig.js'
import { composeRegions, identityRegion, invertRegions } from '../../tensor/region.js'
import { mappingOf, openUnproved, placeOf, readParcel } from '../hfModel.js'
import { openConverted } from '../offline/checkpointSource.js'

/** A tensor wherever its elements lie. */
export interface TensorView {
  readonly dtype: DType
  readonly shape: readonly number[]
  /** Regions from tensors in files onto this one, which they tile. */
  moves(): readonly BoxMove[]
}

export interface ModelSide {
  readonly kind: 'folder' | 'checkpoint'
  /** The folder, or the iter_* folder. */
  readonly folder: string
  readonly family: FamilySpec
  readonly config: TransformerConfig
  readonly mapping: Mapping
  readonly parcel: HfParcel
  /** By Hugging Face name; a stack of experts slice by slice, `experts.down_proj[3]`. */
  readonly tensors: ReadonlyMap<string, TensorView>
  /** Logical tensors of a checkpoint that are no weights of the model, by their own names: optimizer states above all. */
  readonly extra: ReadonlyMap<string, TensorView>
  /** The same tensors in the spelling that other names have: experts one by one, or stacked. */
  spelledAs(names: TensorNames): ReadonlyMap<string, TensorView>
}

/** A tensor's name in reports: of a slice, with its index. */
export function sliceName(part: Part): string {
  return part.slice === null ? part.name : `${part.name}[${part.slice.index}]`
}

/**
 * Opens a folder, a hub id or a checkpoint.
 * @throws what openUnproved throws; ERR_CHECKPOINT, also for a checkpoint that keeps no config.
 */
export async function openSide(path: string, options: SourceOptions = {}): Promise<ModelSide> {
  const folder = await modelFolder(path, options)
  return (await isCheckpoint(folder)) ? checkpointSide(folder) : folderSide(folder)
}

type LogicalTensors = (binding: Binding) => TensorView | null

async function folderSide(path: string): Promise<ModelSide> {
  const { folder, family, config, mapping, parcel, weights } = await openUnproved(path)
  const tensors = new Map<string, TensorView>()
  for (const [name, source] of weights.tensors) {
    const { dtype, shape } = source.entry
    const readers = mapping.byTheirs.get(name) ?? []
    const parts = readers.flatMap(({ part }) =>
      part.slice !== null && tensorShape(part).join() === shape.join() ? [part] : [],
    )
    if (parts.length === 0) tensors.set(name, inOnePlace(dtype, shape, placeOf(source)))
    for (const part of parts) tensors.set(sliceName(part), inOnePlace(dtype, part.shape, placeOf(source, part)))
  }
  const logical: LogicalTensors = ({ ours }) => {
    const { parts, shape } = mapping.bindings.get(ours) as Binding
    const sources = parts.map((part) => ({ part, source: weights.tensors.get(part.name) }))
    const dtype = sources[0]?.source?.entry.dtype
    const sound = sources.every(
      ({ part, source }) => source?.entry.dtype === dtype && source?.entry.shape.join() === tensorShape(part).join(),
    )
    if (dtype === undefined || !sound) return null
    const moves = () =>
      sources.flatMap(({ part, source }) => (source ? [{ place: placeOf(source, part), regions: part.regions }] : []))
    return { dtype, shape, moves }
  }
  const spelledAs = (names: TensorNames) => {
    const other = mappingOf(family, config, names)
    const isSame = [...other.byTheirs.keys()].every((name) => mapping.byTheirs.has(name))
    if (isSame) return tensors
    const respelled = throughMapping(other, other.byTheirs.keys(), logical)
    const left = [...tensors].filter(([name]) => !mapping.byTheirs.has(name.replace(/\[\d+\]$/, '')))
    return new Map([...respelled, ...left])
  }
  return { kind: 'folder', folder, family, config, mapping, parcel, tensors, extra: new Map(), spelledAs }
}

async function checkpointSide(path: string): Promise<ModelSide> {
  const { checkpoint, parcel } = await openConverted(path)
  const { family, config, mapping } = readParcel(parcel)
  const logical: LogicalTensors = ({ ours }) => logicalTensor(checkpoint, ours)
  const named = (by: Mapping, names: Iterable<string>) => {
    const tensors = throughMapping(by, names, logical)
    for (const [name, place] of parcel.carried) tensors.set(name, inOnePlace(place.dtype, place.shape, place))
    return tensors
  }
  const extra = new Map<string, TensorView>()
  for (const name of checkpoint.tensors.keys())
    if (!mapping.bindings.has(name)) extra.set(name, logicalTensor(checkpoint, name) as TensorView)
  return {
    kind: 'checkpoint',
    folder: checkpoint.folder,
    family,
    config,
    mapping,
    parcel,
    tensors: named(mapping, parcel.tensorNames ?? mapping.byTheirs.keys()),
    extra,
    spelledAs(names) {
      const other = mappingOf(family, config, names)
      const copies = [...(parcel.tensorNames ?? [])].filter((name) => other.tied.has(name))
      return named(other, [...other.byTheirs.keys(), ...copies])
    },
  }
}

function inOnePlace(dtype: DType, shape: readonly number[], place: BoxMove['place']): TensorView {
  return { dtype, shape, moves: () => [{ place, regions: [identityRegion(shape)] }] }
}

function logicalTensor(checkpoint: OpenCheckpoint, name: string): TensorView | null {
  const tensor = checkpoint.tensors.get(name)
  if (tensor === undefined) return null
  const { dtype, shape, pieces } = tensor
  const moves = () =>
    pieces.map((piece) => ({ place: checkpoint.locate(piece, tensor), regions: [pieceRegion(piece)] }))
  return { dtype, shape, moves }
}

/** Tensors by HF names, read out of logical ones. A logical tensor that is absent or of another shape gives none. */
function throughMapping(mapping: Mapping, names: Iterable<string>, logical: LogicalTensors): Map<string, TensorView> {
  const tensors = new Map<string, TensorView>()
  for (const name of names) {
    const original = mapping.tied.get(name)
    for (const { binding, part } of mapping.byTheirs.get(original ?? name) ?? []) {
      const whole = logical(binding)
      if (whole === null || whole.shape.join() !== binding.shape.join()) continue
      const toTheirs = invertRegions(part.regions)
      tensors.set(original === undefined ? sliceName(part) : name, {
        dtype: whole.dtype,
        shape: part.shape,
        moves: () =>
          whole.moves().flatMap(({ place, regions }) => {
            const composed = composeRegions(regions, toTheirs)
            return composed.length === 0 ? [] : [{ place, regions: composed }]
          }),
      })
    }
  }
  return tensors
}
