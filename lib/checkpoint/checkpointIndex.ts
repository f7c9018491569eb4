// index.json of a checkpoint: which piece of which logical tensor lies in which file. Reading trusts nothing: pieces must tile
// their tensors, and each must be in its file with that dtype and shape. Pieces are boxes in logical coordinates.
import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { type DType, dtypes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { asideOf } from '../io/atomic.js'
import type { FileTensor } from '../io/blocks.js'
import { JsonDocument, type JsonValue } from '../io/jsonDocument.js'
import { exists, fileInside, isFolder } from '../io/paths.js'
import { readHeader } from '../io/weightFolder.js'
import { tilingFault, volume } from '../tensor/region.js'

export const indexName = 'index.json'
export const trackerName = 'latest_checkpointed_iteration.txt'
export const formatName = 'viaduct-checkpoint'
export const formatVersion = 1

/** A box of a logical tensor, stored as one tensor of a safetensors file. */
export interface Piece {
  readonly file: string
  /** Its name in the file. */
  readonly key: string
  readonly start: readonly number[]
  readonly size: readonly number[]
  /** 128-bit XXH3 of its bytes, 32 hex digits. */
  readonly xxh3: string
}

export interface IndexedTensor {
  readonly dtype: DType
  readonly shape: readonly number[]
  readonly pieces: readonly Piece[]
}

/** An opened and proved checkpoint. */
export interface OpenCheckpoint {
  /** The iter_* folder. */
  readonly folder: string
  readonly iteration: number
  readonly tensors: ReadonlyMap<string, IndexedTensor>
  /** Where a piece's bytes lie. */
  locate(piece: Piece, tensor: IndexedTensor): FileTensor
}

/** `iter_0000100`. */
export function iterationFolder(iteration: number): string {
  return `iter_${String(iteration).padStart(7, '0')}`
}

/** Name of the file that one of the writing ranks makes. */
export function pieceFile(rank: number, size: number): string {
  const digits = (n: number) => String(n).padStart(5, '0')
  return `model-${digits(rank)}-of-${digits(size)}.safetensors`
}

/** A piece's name in its file: the tensor's where the piece is all of it, else with where it starts. */
export function pieceKey(
  name: string,
  shape: readonly number[],
  start: readonly number[],
  size: readonly number[],
): string {
  return size.join() === shape.join() ? name : `${name}@${start.join('_')}`
}

/** Most bytes of a piece, unless one row of it has more: what is hashed and carried at once. */
const mostPieceBytes = 32 * 2 ** 20

/** Cuts a box by rows of dim 0 into boxes of a piece each. */
export function cutBox(
  dtype: DType,
  start: readonly number[],
  size: readonly number[],
): { start: number[]; size: number[] }[] {
  const bits = volume(size) * dtypes[dtype].bits
  const rows = size[0] ?? 1
  const count = Math.min(rows, Math.ceil(bits / 8 / mostPieceBytes))
  if (count <= 1 || (bits / rows) % 8 !== 0) return [{ start: [...start], size: [...size] }]
  const step = Math.ceil(rows / count)
  return Array.from({ length: Math.ceil(rows / step) }, (_, i) => ({
    start: [(start[0] as number) + i * step, ...start.slice(1)],
    size: [Math.min(step, rows - i * step), ...size.slice(1)],
  }))
}

function broken(file: string, message: string, details: Record<string, unknown> = {}): never {
  throw new ViaductError('ERR_CHECKPOINT', 'checkpoint', `${message} (${file})`, { file, ...details })
}

/**
 * The iter_* folder that `dir` means: itself, or the latest complete one below it.
 * @throws ERR_CHECKPOINT when there is none.
 */
export async function resolveCheckpoint(dir: string): Promise<string> {
  if (await exists(join(dir, indexName))) return dir
  const tracker = join(dir, trackerName)
  const candidates: string[] = []
  if (await exists(tracker)) {
    const text = (await readFile(tracker, 'utf8')).trim()
    if (!/^[0-9]{1,15}$/.test(text))
      broken(tracker, `expected an iteration number, got ${JSON.stringify(text.slice(0, 40))}`)
    candidates.push(join(dir, iterationFolder(Number(text))))
  }
  // A writer that was killed before its first tracker has left a complete folder without one.
  const names = (await readdir(dir).catch(() => [])).filter((name) => /^iter_[0-9]{7,}$/.test(name))
  for (const name of names.sort((a, b) => Number(b.slice(5)) - Number(a.slice(5)))) candidates.push(join(dir, name))
  for (const candidate of candidates) {
    if (await exists(join(candidate, indexName))) return candidate
    const aside = await asideOf(candidate)
    if (aside !== null && (await exists(join(aside, indexName)))) return aside
  }
  throw new ViaductError(
    'ERR_CHECKPOINT',
    'checkpoint',
    `expected a checkpoint (${indexName} or ${trackerName}) in ${dir}, found ${(await isFolder(dir)) ? 'none' : 'no such folder'}`,
    { folder: dir },
  )
}

/** True if the folder is one of our checkpoints: a root or an iter_* folder. */
export async function isCheckpoint(dir: string): Promise<boolean> {
  return resolveCheckpoint(dir).then(
    () => true,
    () => false,
  )
}

type Fields = Record<string, JsonValue | undefined>

function fieldsOf(value: JsonValue | undefined, what: string, file: string): Fields {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Fields
  return broken(file, `expected ${what} to be an object`)
}

function countsOf(value: JsonValue | undefined, what: string, file: string): number[] {
  if (Array.isArray(value) && value.every((n) => typeof n === 'number' && Number.isSafeInteger(n) && n >= 0))
    return value as number[]
  return broken(file, `expected ${what} to be a list of whole numbers`)
}

/**
 * Opens a checkpoint and proves it: format, tiling of each tensor, and each piece against its file's header.
 * @throws ERR_CHECKPOINT, ERR_FILE_MISSING, and the errors of safetensors headers.
 */
export async function openCheckpoint(dir: string): Promise<OpenCheckpoint> {
  const folder = await resolveCheckpoint(dir)
  const file = join(folder, indexName)
  const document = await JsonDocument.read(file, 'ERR_CHECKPOINT')
  const root = fieldsOf(document.value, 'the index', file)
  if (root['format'] !== formatName)
    broken(file, `expected format ${formatName}, got ${JSON.stringify(root['format'] ?? null)}`)
  if (root['version'] !== formatVersion)
    broken(
      file,
      `expected format version ${formatVersion}, got ${JSON.stringify(root['version'] ?? null)}: written by another version of Viaduct`,
    )
  const iteration = root['iteration']
  if (typeof iteration !== 'number' || !Number.isSafeInteger(iteration)) broken(file, 'expected a whole iteration')
  const tensors = new Map<string, IndexedTensor>()
  for (const [name, value] of Object.entries(fieldsOf(root['tensors'], 'tensors', file)))
    tensors.set(name, readTensor(name, value, file))

  const names = new Set([...tensors.values()].flatMap((t) => t.pieces.map((p) => p.file)))
  const offsets = new Map<
    string,
    { path: string; start: number; entries: Awaited<ReturnType<typeof readHeader>>['entries'] }
  >()
  for (const name of names) {
    const path = await fileInside(folder, name)
    const header = await readHeader(path, name)
    offsets.set(name, { path, start: header.bytes.length, entries: header.entries })
  }
  for (const [name, tensor] of tensors) {
    for (const piece of tensor.pieces) {
      const entry = offsets.get(piece.file)?.entries.get(piece.key)
      if (entry === undefined || entry.dtype !== tensor.dtype || entry.shape.join() !== piece.size.join()) {
        broken(
          file,
          `expected ${piece.file} to hold ${piece.key} as ${tensor.dtype} [${piece.size}] for ${name}, got ${entry ? `${entry.dtype} [${entry.shape}]` : 'nothing'}`,
          { tensor: name },
        )
      }
    }
  }
  return {
    folder,
    iteration,
    tensors,
    locate(piece, tensor) {
      const at = offsets.get(piece.file) as NonNullable<ReturnType<typeof offsets.get>>
      return {
        path: at.path,
        offset: at.start + (at.entries.get(piece.key)?.begin as number),
        dtype: tensor.dtype,
        shape: piece.size,
      }
    },
  }
}

function readTensor(name: string, value: JsonValue | undefined, file: string): IndexedTensor {
  const fields = fieldsOf(value, `tensor ${name}`, file)
  const dtype = fields['dtype']
  if (typeof dtype !== 'string' || !Object.hasOwn(dtypes, dtype))
    broken(file, `expected a dtype for ${name}, got ${JSON.stringify(dtype ?? null)}`, { tensor: name })
  const shape = countsOf(fields['shape'], `the shape of ${name}`, file)
  const list = fields['pieces']
  if (!Array.isArray(list)) broken(file, `expected pieces for ${name}`, { tensor: name })
  const pieces = (list as readonly JsonValue[]).map((item): Piece => {
    const piece = fieldsOf(item, `a piece of ${name}`, file)
    const text = (key: string) =>
      typeof piece[key] === 'string' ? (piece[key] as string) : broken(file, `expected ${key} for a piece of ${name}`)
    const start = countsOf(piece['start'], `start of a piece of ${name}`, file)
    const size = countsOf(piece['size'], `size of a piece of ${name}`, file)
    if (start.length !== shape.length || size.length !== shape.length)
      broken(file, `expected pieces of rank ${shape.length} for ${name}`, { tensor: name })
    return { file: text('file'), key: text('key'), start, size, xxh3: text('xxh3') }
  })
  const fault = tilingFault(shape, pieces)
  if (fault !== null) broken(file, `expected the pieces of ${name} to tile it, got: ${fault}`, { tensor: name })
  return { dtype: dtype as DType, shape, pieces }
}

/** Text of index.json. */
export function formatIndex(iteration: number, tensors: ReadonlyMap<string, IndexedTensor>): string {
  const rows = [...tensors].map(
    ([name, t]) =>
      `    ${JSON.stringify(name)}: ${JSON.stringify({ dtype: t.dtype, shape: t.shape, pieces: t.pieces })}`,
  )
  return `{\n  "format": "${formatName}",\n  "version": ${formatVersion},\n  "iteration": ${iteration},\n  "tensors": {\n${rows.join(',\n')}\n  }\n}\n`
}
