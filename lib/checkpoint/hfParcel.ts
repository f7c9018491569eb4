// What a checkpoint keeps of the Hugging Face folder that it came from: config.json and every other file byte for byte, and how
// its weights were cut into files (names, headers, index), so that an export gives the same files again. No weights.
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { ViaductError } from '../base/errors.js'
import { flush, ioError, writeFlushed } from '../io/atomic.js'
import { copyRegion, createFile, type FileTensor } from '../io/blocks.js'
import { JsonDocument, type JsonValue } from '../io/jsonDocument.js'
import { copyFiles, listOtherFiles } from '../io/otherFiles.js'
import { exists, fileInside } from '../io/paths.js'
import { encodeHeader, parseHeader } from '../io/safetensorsHeader.js'
import { layoutOf, type ShardLayout } from '../io/shardLayout.js'
import { readHeader, type WeightFolder } from '../io/weightFolder.js'
import { identityRegion } from '../tensor/region.js'

const configName = 'config.json'
const layoutName = 'hf_layout.json'
const carriedName = 'hf_carried.safetensors'
const folderName = 'hf'
const tokenizerName = 'tokenizer'
const tokenizerFiles = /^(tokenizer|added_tokens|special_tokens_map|vocab|merges|chat_template)[^/]*$/

/** Config, other files and shard layout of a Hugging Face folder. */
export class HfParcel {
  private constructor(
    /** The folder where `others` lie, or null where there are none. */
    readonly folder: string | null,
    readonly config: JsonDocument,
    /** Names of all files but config and weights. */
    readonly others: readonly string[],
    /** Weight files in other formats than safetensors in the source, which are not carried. */
    readonly leftOut: readonly string[],
    readonly layout: ShardLayout | null,
    /** Tensors that follow from the config and are kept byte for byte, by name. */
    readonly carried: ReadonlyMap<string, FileTensor>,
  ) {}

  /** Of a folder in Hugging Face's layout, its weights opened already; null: config and files only. */
  static async fromFolder(folder: string, weights: WeightFolder | null): Promise<HfParcel> {
    const config = await readConfig(folder)
    const { copied, leftOut } = await listOtherFiles(folder)
    // Weights in safetensors are written again under their names; those of torch.save are left out.
    const carried = new Set(weights?.files.flatMap(({ name, header }) => (header ? [name] : [])))
    if (weights?.index && carried.size > 0) carried.add(weights.index)
    const layout = weights && (await layoutOf(weights))
    return new HfParcel(
      folder,
      config,
      copied.filter((name) => name !== configName),
      leftOut.filter((name) => !carried.has(name)),
      layout,
      new Map(),
    )
  }

  /** Of a model that comes from no folder. */
  static fromConfig(config: JsonDocument): HfParcel {
    return new HfParcel(null, config, [], [], null, new Map())
  }

  /** Of an iter_* folder; null when it has none. */
  static async fromCheckpoint(iterationFolder: string): Promise<HfParcel | null> {
    const folder = join(iterationFolder, folderName)
    if (!(await exists(join(folder, configName)))) return null
    const config = await readConfig(folder)
    const { copied } = await listOtherFiles(folder)
    const layoutFile = join(iterationFolder, layoutName)
    const layout = (await exists(layoutFile))
      ? parseLayout(await JsonDocument.read(layoutFile, 'ERR_CHECKPOINT'), layoutFile)
      : null
    const carriedFile = join(iterationFolder, carriedName)
    const carried = (await exists(carriedFile)) ? await readCarried(carriedFile) : new Map<string, FileTensor>()
    return new HfParcel(
      folder,
      config,
      copied.filter((name) => name !== configName),
      [],
      layout,
      carried,
    )
  }

  /** Names of the weights' tensors; null where no layout is kept. */
  get tensorNames(): ReadonlySet<string> | null {
    return this.layout && new Set(this.layout.files.flatMap((file) => [...file.header.entries.keys()]))
  }

  /** The same files with another config, or with carried tensors. */
  with(changes: { readonly config?: JsonDocument; readonly carried?: ReadonlyMap<string, FileTensor> }): HfParcel {
    const { folder, config, others, leftOut, layout, carried } = this
    return new HfParcel(folder, changes.config ?? config, others, leftOut, layout, changes.carried ?? carried)
  }

  /** Writes config.json and all other files into a folder and flushes them. */
  async writeFiles(target: string): Promise<void> {
    if (this.folder !== null) await copyFiles(this.folder, this.others, target)
    await writeFlushed(join(target, configName), this.config.text)
  }

  /** Writes the parcel into an unfinished iter_* folder: `hf/` and the layout. */
  async writeTo(iterationFolder: string): Promise<void> {
    const target = join(iterationFolder, folderName)
    try {
      await mkdir(target)
    } catch (cause) {
      throw ioError(cause, `cannot make ${target}`)
    }
    await this.writeFiles(target)
    await flush(target)
    if (this.layout) await writeFlushed(join(iterationFolder, layoutName), formatLayout(this.layout))
    if (this.carried.size > 0) await writeCarried(join(iterationFolder, carriedName), this.carried)
    await this.writeTokenizer(join(iterationFolder, tokenizerName))
  }

  /** Copies the tokenizer's files alone, for who reads text beside the checkpoint. Nothing where there are none. */
  async writeTokenizer(target: string): Promise<void> {
    const files = this.others.filter((name) => tokenizerFiles.test(name))
    if (this.folder === null || files.length === 0) return
    await copyFiles(this.folder, files, target)
    await flush(target)
  }
}

async function readCarried(path: string): Promise<Map<string, FileTensor>> {
  const header = await readHeader(path, carriedName)
  const place = (begin: number) => header.bytes.length + begin
  return new Map(
    [...header.entries].map(([name, { dtype, shape, begin }]) => [name, { path, offset: place(begin), dtype, shape }]),
  )
}

async function writeCarried(path: string, carried: ReadonlyMap<string, FileTensor>): Promise<void> {
  const header = encodeHeader([...carried].map(([name, { dtype, shape }]) => ({ name, dtype, shape })))
  await createFile(path, header.fileBytes, header.bytes)
  for (const [name, from] of carried) {
    const offset = header.bytes.length + (header.entries.get(name)?.begin as number)
    await copyRegion(from, { path, offset, dtype: from.dtype, shape: from.shape }, identityRegion(from.shape))
  }
  await flush(path)
}

/** config.json of a folder. @throws ERR_FILE_MISSING, ERR_JSON with the position, ERR_HF_CONFIG when it is no object. */
export async function readConfig(folder: string): Promise<JsonDocument> {
  const document = await JsonDocument.read(await fileInside(folder, configName))
  if (typeof document.value !== 'object' || document.value === null || Array.isArray(document.value)) {
    throw new ViaductError(
      'ERR_HF_CONFIG',
      'config',
      `expected an object in ${join(folder, configName)}, got ${JSON.stringify(document.value).slice(0, 60)}`,
      { file: configName },
    )
  }
  return document
}

/** Headers are kept as their exact text, padding included. */
function formatLayout(layout: ShardLayout): string {
  const files = layout.files.map(({ name, header }) => ({
    name,
    bytes: header.fileBytes,
    header: Buffer.from(header.bytes.subarray(8)).toString('utf8'),
  }))
  return `${JSON.stringify({ files, index: layout.index }, null, 1)}\n`
}

function parseLayout(document: JsonDocument, file: string): ShardLayout {
  const broken = (): never => {
    throw new ViaductError(
      'ERR_CHECKPOINT',
      'checkpoint',
      `expected names, sizes and headers of files in ${file}, got something else`,
      { file },
    )
  }
  const record = (value: JsonValue | undefined): Record<string, JsonValue | undefined> =>
    typeof value === 'object' && value !== null && !Array.isArray(value)
      ? (value as Record<string, JsonValue>)
      : broken()
  const root = record(document.value)
  const list = root['files']
  if (!Array.isArray(list)) return broken()
  const files = (list as readonly JsonValue[]).map((item) => {
    const { name, bytes, header } = record(item)
    if (typeof name !== 'string' || typeof bytes !== 'number' || typeof header !== 'string') return broken()
    const json = Buffer.from(header)
    const length = Buffer.alloc(8)
    length.writeBigUInt64LE(BigInt(json.length))
    return { name, header: parseHeader(Buffer.concat([length, json]), bytes, name) }
  })
  if (root['index'] === null) return { files, index: null }
  const { name, text } = record(root['index'])
  if (typeof name !== 'string' || typeof text !== 'string') return broken()
  return { files, index: { name, text } }
}
