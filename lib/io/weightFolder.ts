// The tensors of a folder in Hugging Face's layout: one file, or shards with an index; safetensors, or where there are none, files
// of torch.save. Opening proves that each named file exists and is sound and that index and files agree. No tensor byte is read.
import { open, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { ViaductError } from '../base/errors.js'
import type { RemoteBytes } from './hub/remoteBytes.js'
import { decodeUtf8, JsonReader } from './jsonReader.js'
import { checkFileName, exists, fileInside, isFolder } from './paths.js'
import { headerLength, parseHeader, type SafetensorsHeader, type TensorEntry } from './safetensorsHeader.js'
import { openTorchFile } from './torch/torchFile.js'

export const singleFile = 'model.safetensors'
export const indexFile = 'model.safetensors.index.json'
const torchIndexFile = 'pytorch_model.bin.index.json'
const torchFile = /\.(bin|pt|pth|ckpt|pkl|pickle)$/
const usualTorchFile = /^(pytorch_)?model\.(bin|pt|pth)$/

/** One file of weights, proved. */
export interface WeightFile {
  /** Relative to the folder. */
  readonly name: string
  /** Real path. */
  readonly path: string
  /** null: a file of torch.save, which has none. */
  readonly header: SafetensorsHeader | null
  /** `begin` and `end` count from the end of the header, or from the first byte where there is none. */
  readonly entries: ReadonlyMap<string, TensorEntry>
}

/** Where a tensor's bytes lie. */
export interface TensorSource {
  readonly path: string
  /** Byte offset in the file. */
  readonly offset: number
  readonly file: string
  readonly entry: TensorEntry
}

export interface WeightFolder {
  readonly folder: string
  readonly files: readonly WeightFile[]
  /** Name of the index file, or null where one file holds all. */
  readonly index: string | null
  /** In the order of files and bytes. */
  readonly tensors: ReadonlyMap<string, TensorSource>
  /** Where paths are addresses: brings bytes here. Else null. */
  readonly remote: RemoteBytes | null
}

/** Reads and proves the header of one file. @throws the errors of parseHeader; ERR_FILE_MISSING. */
export async function readHeader(path: string, name = path): Promise<SafetensorsHeader> {
  let file: Awaited<ReturnType<typeof open>>
  try {
    file = await open(path, 'r')
  } catch (cause) {
    throw new ViaductError(
      'ERR_FILE_MISSING',
      'safetensors',
      `cannot open ${name}: ${(cause as Error).message}`,
      { file: name },
      { cause },
    )
  }
  try {
    const { size } = await file.stat()
    const first = Buffer.alloc(8)
    const { bytesRead } = await file.read(first, 0, 8, 0)
    const length = headerLength(first.subarray(0, bytesRead), size, name)
    const bytes = Buffer.alloc(8 + length)
    let got = 0
    while (got < bytes.length) {
      const { bytesRead: n } = await file.read(bytes, got, bytes.length - got, got)
      if (n === 0)
        throw new ViaductError(
          'ERR_SAFETENSORS_SIZE',
          'safetensors',
          `expected ${bytes.length} bytes of header, got ${got} (${name})`,
          { file: name },
        )
      got += n
    }
    return parseHeader(bytes, size, name)
  } finally {
    await file.close()
  }
}

async function openFile(path: string, name: string, isTorch: boolean): Promise<WeightFile> {
  if (isTorch) return { name, path, header: null, entries: await openTorchFile(path, name) }
  const header = await readHeader(path, name)
  return { name, path, header, entries: header.entries }
}

/** Tensors of one file by name. */
export function tensorSources(file: WeightFile): Map<string, TensorSource> {
  const start = file.header?.bytes.length ?? 0
  return new Map(
    [...file.entries].map(([name, entry]) => [
      name,
      { path: file.path, offset: start + entry.begin, file: file.name, entry },
    ]),
  )
}

/** Which file an index puts each tensor in. @throws ERR_INDEX, ERR_PATH_ESCAPE */
export async function readIndex(folder: string, indexName: string): Promise<Map<string, string>> {
  const path = await fileInside(folder, indexName)
  const handle = await open(path, 'r')
  const bytes = await handle.readFile().finally(() => handle.close())
  const source = { code: 'ERR_INDEX', where: 'index', file: indexName } as const
  const reader = new JsonReader(decodeUtf8(bytes, source), source)
  const map = new Map<string, string>()
  let seen = false
  if (reader.peek() !== 'object') reader.fail(`expected an object with weight_map, got ${reader.found()}`)
  reader.object((key) => {
    if (key !== 'weight_map') return reader.skip()
    seen = true
    if (reader.peek() !== 'object') reader.fail(`expected weight_map to be an object, got ${reader.found()}`)
    reader.object((tensor) => {
      if (reader.peek() !== 'string')
        reader.fail(`expected the file name of tensor ${JSON.stringify(tensor)}, got ${reader.found()}`)
      map.set(tensor, reader.string())
    })
  })
  reader.end()
  if (!seen || map.size === 0) reader.fail('expected a weight_map with at least one tensor', 0)
  for (const name of new Set(map.values())) checkFileName(name, folder)
  return map
}

/** Which weights a folder has: safetensors wherever there are some. */
async function findWeights(folder: string): Promise<{ readonly index: string | null; readonly single: string | null }> {
  const names = (await readdir(folder)).sort()
  const has = (name: string) => (names.includes(name) ? name : null)
  if (has(indexFile) || has(singleFile)) return { index: has(indexFile), single: has(singleFile) }
  if (has(torchIndexFile)) return { index: torchIndexFile, single: null }
  const files = names.filter((name) => torchFile.test(name))
  const usual = files.filter((name) => usualTorchFile.test(name))
  const [single, second] = usual.length > 0 ? usual : files
  if (single !== undefined && second === undefined) return { index: null, single }
  throw new ViaductError(
    'ERR_FILE_MISSING',
    'weights',
    `expected ${singleFile}, ${indexFile} or one file of torch.save in ${folder}, found ${second ? `${single} and ${second}: remove those that are not the model` : 'none'}`,
    { folder, file: singleFile, files },
  )
}

/**
 * Opens a folder's weights: headers only.
 * @throws ERR_FILE_MISSING, naming every missing shard before any header is read; ERR_INDEX where index and files disagree;
 *   ERR_PATH_ESCAPE; the errors of parseHeader and openTorchFile.
 */
export async function openWeights(folder: string): Promise<WeightFolder> {
  if (!(await isFolder(folder)))
    throw new ViaductError('ERR_FILE_MISSING', 'weights', `expected a folder, found none at ${folder}`, { folder })
  const { index, single } = await findWeights(folder)
  const isTorch = index === torchIndexFile || (index === null && single !== singleFile)
  const map = index ? await readIndex(folder, index) : null
  const names = map ? [...new Set(map.values())].sort() : [single as string]
  if (map && single && !names.includes(single)) {
    throw new ViaductError(
      'ERR_INDEX',
      'index',
      `expected either ${single} or ${index} in ${folder}, got both: remove the one that is stale`,
      { folder },
    )
  }
  const missing: string[] = []
  const paths = new Map<string, string>()
  for (const name of names) {
    if (await exists(join(folder, name))) paths.set(name, await fileInside(folder, name))
    else missing.push(name)
  }
  if (missing.length > 0) {
    throw new ViaductError(
      'ERR_FILE_MISSING',
      'weights',
      `expected ${names.length} files in ${folder}, ${missing.length === 1 ? 'one is' : `${missing.length} are`} missing: ${missing.join(', ')}`,
      { folder, file: missing[0], files: missing },
    )
  }
  const files: WeightFile[] = []
  for (const [name, path] of paths) files.push(await openFile(path, name, isTorch))
  return joinFiles(folder, files, index === null || map === null ? null : { name: index, map })
}

/** The tensors of opened files as one folder. @throws ERR_INDEX where files, or index and files, disagree */
export function joinFiles(
  folder: string,
  files: readonly WeightFile[],
  index: { readonly name: string; readonly map: ReadonlyMap<string, string> } | null,
): WeightFolder {
  const tensors = new Map<string, TensorSource>()
  for (const file of files) {
    for (const [tensor, source] of tensorSources(file)) {
      const other = tensors.get(tensor)
      if (other)
        throw new ViaductError(
          'ERR_INDEX',
          'index',
          `expected tensor ${JSON.stringify(tensor)} in one file, got it in ${other.file} and ${file.name}`,
          { tensor, files: [other.file, file.name] },
        )
      tensors.set(tensor, source)
    }
  }
  if (index) checkIndex(index.map, tensors)
  return { folder, files, index: index?.name ?? null, tensors, remote: null }
}

function checkIndex(map: ReadonlyMap<string, string>, tensors: ReadonlyMap<string, TensorSource>): void {
  const problems: string[] = []
  for (const [tensor, file] of map) {
    const source = tensors.get(tensor)
    if (source === undefined) problems.push(`${tensor} is not in ${file}`)
    else if (source.file !== file) problems.push(`${tensor} is in ${source.file}, not in ${file}`)
  }
  for (const [tensor, source] of tensors)
    if (!map.has(tensor)) problems.push(`${tensor} of ${source.file} is not in the index`)
  if (problems.length === 0) return
  const shown = problems.slice(0, 20).join('; ') + (problems.length > 20 ? `; and ${problems.length - 20} more` : '')
  throw new ViaductError('ERR_INDEX', 'index', `expected the index and the files to name the same tensors: ${shown}`, {
    problems,
  })
}
