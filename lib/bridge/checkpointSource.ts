// A checkpoint as a conversion's source: what an export needs to know of it, and which steps bring its pieces to Hugging Face
// tensors or to the pieces of another layout. Nothing is written here.
import { type DType, dtypes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { type IndexedTensor, type OpenCheckpoint, openCheckpoint } from '../checkpoint/checkpointIndex.js'
import { HfParcel } from '../checkpoint/hfParcel.js'
import { checkHash, checkPiece, pieceRegion, readCheckpointFile } from '../checkpoint/loadCheckpoint.js'
import { copyRegion, type FileTensor, settleAll } from '../io/blocks.js'
import { JsonDocument, type JsonValue } from '../io/jsonDocument.js'
import type { HfConfig } from '../models/family.js'
import type { Binding, Coverage } from '../models/mapping.js'
import { composeRegions, invertRegions, volume } from '../tensor/region.js'
import type { Unit } from './conversion.js'
import { type PlannedTensor, sourceDtype } from './exportPlan.js'
import { type HfModel, readHfConfig } from './hfModel.js'
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

/** One unit a piece of a logical tensor, read once and handed out to every Hugging Face tensor that has a part of it. */
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

/** The step that fills a piece of another layout. Source pieces are proved before they are read. */
export function recutMove(checkpoint: OpenCheckpoint, target: TargetPiece, output: string): Move {
  const name = target.tensor.name
  const tensor = checkpoint.tensors.get(name) as IndexedTensor
  const wanted = [{ from: target.start, to: target.start.map(() => 0), size: target.size }]
  const touched = tensor.pieces.flatMap((piece) => {
    const regions = composeRegions([pieceRegion(piece)], wanted)
    return regions.length === 0 ? [] : [{ piece, regions }]
  })
  return {
    kind: 'gather',
    bytes: target.bytes,
    to: target.place(output),
    from: touched.map(({ piece, regions }) => ({ place: checkpoint.locate(piece, tensor), regions })),
    proofs: touched.map(({ piece }) => ({
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
