// A checkpoint as a conversion's source: what an export needs to know of it, and which steps bring its pieces to Hugging Face
// tensors or to the pieces of another layout. Nothing is written here.
import { type DType, dtypes } from '../../base/dtype.js'
import { ViaductError } from '../../base/errors.js'
import { cutBox, type IndexedTensor, type OpenCheckpoint, openCheckpoint } from '../../checkpoint/checkpointIndex.js'
import { HfParcel } from '../../checkpoint/hfParcel.js'
import { checkHash, checkPiece, pieceRegion, readCheckpointFile } from '../../checkpoint/loadCheckpoint.js'
import { copyRegion, type FileTensor, settleAll } from '../../io/blocks.js'
import { JsonDocument, type JsonValue } from '../../io/jsonDocument.js'
import { tensorBytes } from '../../io/safetensorsHeader.js'
import type { HfConfig } from '../../models/family.js'
import type { Binding, Coverage } from '../../models/mapping.js'
import { composeRegions, invertRegions, type Region, volume } from '../../tensor/region.js'
import { type PlannedTensor, sourceDtype } from '../exportPlan.js'
import { type HfModel, readHfConfig } from '../hfModel.js'
import type { Unit } from './conversion.js'
import type { Move } from './moves.js'
import type { TargetPiece } from './pieceTargets.js'

/** A checkpoint with the HF folder's description that it keeps. @throws ERR_CHECKPOINT when it keeps none. */
export async function openConverted(
  dir: string,
  given?: HfParcel,
): Promise<{ checkpoint: OpenCheckpoint; parcel: HfParcel }> {
  const checkpoint = await openCheckpoint(dir)
  const parcel = given ?? (await HfParcel.fromCheckpoint(checkpoint.folder))
  if (parcel === null) {
    throw new ViaductError(
      'ERR_CHECKPOINT',
      'export',
      `expected hf/config.json in ${checkpoint.folder}, found none: export needs the config of a Hugging Face model, save the checkpoint with one or pass --reference`,
      { folder: checkpoint.folder },
    )
  }
  return { checkpoint, parcel }
}

/** The config of an export: the source's text, with the dtype changed where the weights' dtype was. */
export function exportedConfig(parcel: HfParcel, mainDtype: DType): JsonDocument {
  const before = sourceDtype(parcel)
  if (before === null || before === mainDtype) return parcel.config
  const { family, config } = readHfConfig(parcel.config.value as HfConfig)
  return parcel.config.with(
    family.toHf({ ...config, paramsDtype: mainDtype }, parcel.config.value as HfConfig) as JsonValue,
  )
}

/** Copies the pieces of one logical tensor to where a part of it lies in an exported file. */
export async function exportPart(
  checkpoint: OpenCheckpoint,
  binding: Binding,
  part: Binding['parts'][number],
  place: FileTensor,
): Promise<void> {
  const tensor = checkpoint.tensors.get(binding.ours)
  if (tensor === undefined) return
  const toTheirs = invertRegions(part.regions)
  await settleAll(
    tensor.pieces.flatMap((piece) =>
      composeRegions([pieceRegion(piece)], toTheirs).map((region) =>
        copyRegion(checkpoint.locate(piece, tensor), place, region),
      ),
    ),
  )
}

/** Where a tensor of an export comes to lie in the unfinished folder. */
export type PlaceOf = (tensor: PlannedTensor, output: string) => FileTensor

/**
 * One unit a piece of a logical tensor, read once and handed out to every Hugging Face tensor that has a part of it. Pieces that
 * are cut by columns would be written row by row, into pages that other pieces share: there a unit is a run of the target's rows.
 */
export function exportUnits(
  checkpoint: OpenCheckpoint,
  ours: string,
  planned: readonly PlannedTensor[],
  placeOf: PlaceOf,
  verify: boolean,
): Unit[] {
  const tensor = checkpoint.tensors.get(ours) as IndexedTensor
  // The first tensor of each part, then the second: a tied tensor is written twice.
  const copies: PlannedTensor[][] = []
  const seen = new Map<object, number>()
  for (const target of planned) {
    const part = 'part' in target.origin ? target.origin.part : target
    const copy = seen.get(part) ?? 0
    seen.set(part, copy + 1)
    copies[copy] = [...(copies[copy] ?? []), target]
  }
  if (tensor.pieces.some(({ size }) => size.slice(1).join() !== tensor.shape.slice(1).join()))
    return planned.flatMap((target) => gatherUnits(checkpoint, ours, target, placeOf, verify))
  const bits = dtypes[planned[0]?.dtype ?? tensor.dtype].bits * copies.length
  return tensor.pieces.map((piece) => {
    const bytes = (volume(piece.size) * bits) / 8
    const handOut = (targets: readonly PlannedTensor[], output: string) =>
      targets.flatMap((target) => {
        if (!('part' in target.origin)) return []
        const regions = composeRegions([pieceRegion(piece)], invertRegions(target.origin.part.regions))
        return regions.length === 0 ? [] : [{ place: placeOf(target, output), regions }]
      })
    const move = (output: string): Move => ({
      kind: 'scatter',
      bytes,
      from: checkpoint.locate(piece, tensor),
      copies: copies.map((targets) => handOut(targets, output)),
      check: (xxh3) => {
        if (verify) checkHash(ours, piece, xxh3)
      },
    })
    return { bytes, rank: 0, move }
  })
}

/** Units of about a piece each that fill a Hugging Face tensor in the order of its bytes. */
function gatherUnits(
  checkpoint: OpenCheckpoint,
  ours: string,
  target: PlannedTensor,
  placeOf: PlaceOf,
  verify: boolean,
): Unit[] {
  if (!('part' in target.origin)) return []
  const { regions } = target.origin.part
  const origin = target.shape.map(() => 0)
  return cutBox(target.dtype, origin, target.shape).map(({ start, size }) => {
    const bytes = tensorBytes(target.dtype, size)
    const wanted = composeRegions(invertRegions(regions), [{ from: start, to: origin, size }])
    const move = (output: string): Move => {
      const whole = placeOf(target, output)
      const offset = whole.offset + ((start[0] ?? 0) / (size[0] ?? 1)) * bytes
      return gatherMove(checkpoint, ours, wanted, { ...whole, offset, shape: size }, verify)
    }
    return { bytes, rank: 0, move }
  })
}

/** The step that fills a piece of another layout. */
export function recutMove(
  checkpoint: OpenCheckpoint,
  { tensor, start, size, place }: TargetPiece,
  output: string,
): Move {
  const wanted = [{ from: start, to: start.map(() => 0), size }]
  return gatherMove(checkpoint, tensor.name, wanted, place(output), true)
}

/** Fills a tensor of a file from the pieces of a logical tensor, which are proved before they are read. */
function gatherMove(
  checkpoint: OpenCheckpoint,
  name: string,
  wanted: readonly Region[],
  to: FileTensor,
  verify: boolean,
): Move {
  const tensor = checkpoint.tensors.get(name) as IndexedTensor
  const touched = tensor.pieces.flatMap((piece) => {
    const regions = composeRegions([pieceRegion(piece)], wanted)
    return regions.length === 0 ? [] : [{ piece, regions }]
  })
  return {
    kind: 'gather',
    bytes: tensorBytes(to.dtype, to.shape),
    to,
    from: touched.map(({ piece, regions }) => ({ place: checkpoint.locate(piece, tensor), regions })),
    proofs: !verify
      ? []
      : touched.map(({ piece }) => ({
          name: `${piece.file}/${piece.key}`,
          prove: () => checkPiece(checkpoint, name, tensor, piece),
        })),
  }
}

/** Which of the model's tensors the checkpoint has; those that its conversion allowed to be missing may be absent. */
export async function coverageOf(checkpoint: OpenCheckpoint, mapping: HfModel['mapping']): Promise<Coverage> {
  const text = await readCheckpointFile(checkpoint, 'conversion.json')
  const record =
    text === null
      ? {}
      : (JsonDocument.parse(text, 'conversion.json', 'ERR_CHECKPOINT').value as {
          readonly missing?: readonly string[]
          readonly ignored?: readonly string[]
        })
  const permitted = new Set(record.missing ?? [])
  const absent: string[] = []
  const wrong: string[] = []
  for (const { ours, shape, parts } of mapping.bindings.values()) {
    const tensor = checkpoint.tensors.get(ours)
    if (tensor === undefined) absent.push(...parts.filter((part) => !permitted.has(part.name)).map(() => ours))
    else if (tensor.shape.join() !== shape.join())
      wrong.push(`${ours}: expected [${shape}] from hf/config.json, got [${tensor.shape}]`)
  }
  const missing = [...new Set(absent)]
  if (missing.length + wrong.length > 0) {
    throw new ViaductError(
      missing.length > 0 ? 'ERR_COVERAGE' : 'ERR_TENSOR_SHAPE',
      'export',
      [...missing.map((name) => `${name} is missing from the checkpoint`), ...wrong].slice(0, 50).join('; '),
      { missing, shapes: wrong },
    )
  }
  const mapped = [...mapping.byTheirs.keys()].filter((name) => !permitted.has(name))
  const ignored = record.ignored ?? []
  return {
    mapped,
    tied: [],
    derived: [],
    ignored,
    missing: [...permitted],
    partial: ignored.length + permitted.size > 0,
  }
}
