// How a model's weights are cut into safetensors files: names, headers and the index. A source in safetensors keeps its own; one
// of torch.save gets headers that hold its tensors in its order and cut. No tensor byte moves here.
import { readFile } from 'node:fs/promises'
import { fileInside } from './paths.js'
import { encodeHeader, type SafetensorsHeader } from './safetensorsHeader.js'
import { indexFile, singleFile, type WeightFolder } from './weightFolder.js'

/** One safetensors file by name, as it begins. */
export interface ShardFile {
  readonly name: string
  readonly header: SafetensorsHeader
}

/** How the weights lie in files. */
export interface ShardLayout {
  readonly files: readonly ShardFile[]
  /** Name and text of the index, or null where there is none. */
  readonly index: { readonly name: string; readonly text: string } | null
}

/** What a new safetensors file says of itself, as save_pretrained writes it. */
export const newMetadata: ReadonlyMap<string, string> = new Map([['format', 'pt']])

/** The layout of a folder's weights in safetensors. */
export async function layoutOf(weights: WeightFolder): Promise<ShardLayout> {
  const files = weights.files.map(({ name, header, entries }, i) =>
    header
      ? { name, header }
      : { name: shardName(i, weights.files.length), header: encodeHeader([...entries.values()], newMetadata) },
  )
  if (weights.index === null) return { files, index: null }
  if (weights.files.some(({ header }) => header === null)) return { files, index: indexOf(files) }
  const text = await readFile(await fileInside(weights.folder, weights.index), 'utf8')
  return { files, index: { name: weights.index, text } }
}

/** The name of file `i` of `count`. */
export function shardName(i: number, count: number): string {
  const digits = (n: number) => String(n).padStart(5, '0')
  return count === 1 ? singleFile : `model-${digits(i + 1)}-of-${digits(count)}.safetensors`
}

/** The index as save_pretrained writes it: total size, then tensors by name. */
export function indexOf(files: readonly ShardFile[]): { name: string; text: string } {
  let total = 0
  const rows: [string, string][] = []
  for (const { name, header } of files) {
    for (const entry of header.entries.values()) {
      total += entry.end - entry.begin
      rows.push([entry.name, name])
    }
  }
  rows.sort(([a], [b]) => (a < b ? -1 : 1))
  return {
    name: indexFile,
    text: `${JSON.stringify({ metadata: { total_size: total }, weight_map: Object.fromEntries(rows) }, null, 2)}\n`,
  }
}
