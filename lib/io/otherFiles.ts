// The files of a model folder that are not weights: listed and copied byte for byte, never opened for their meaning, none run.
import { copyFile, mkdir, readdir } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { flush, ioError } from './atomic.js'
import { fileInside } from './paths.js'

const weights =
  /\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|gguf|h5|msgpack|onnx|npz)(\.index\.json)?$|\.safetensors\.index\.json$/i
/** True for a name that weights have, in any format. */
export function isWeightFile(name: string): boolean {
  return weights.test(name)
}

/** Names among weight files left out that look like shards of the model: stray ones, which its index does not name. */
export function strayShards(leftOut: readonly string[]): string[] {
  return leftOut.filter((name) => /-\d{5}-of-\d{5}\.safetensors$/.test(name))
}

const skippedFolders = new Set(['.git', '.cache'])

/** Files beside the weights, and weight files in other formats that nobody carries. Relative names, sorted. */
export interface OtherFiles {
  readonly copied: readonly string[]
  readonly leftOut: readonly string[]
}

/** Lists a folder and the folders in it. */
export async function listOtherFiles(folder: string): Promise<OtherFiles> {
  const copied: string[] = []
  const leftOut: string[] = []
  const walk = async (relative: string) => {
    for (const entry of await readdir(join(folder, relative), { withFileTypes: true })) {
      const name = relative === '' ? entry.name : `${relative}/${entry.name}`
      if (entry.isDirectory()) {
        if (!skippedFolders.has(entry.name)) await walk(name)
      } else if (isWeightFile(entry.name)) leftOut.push(name)
      else copied.push(name)
    }
  }
  await walk('')
  return { copied: copied.sort(), leftOut: leftOut.sort() }
}

/** Copies files of one folder into another and flushes them. @throws ERR_PATH_ESCAPE for links that leave the folder. */
export async function copyFiles(from: string, names: readonly string[], to: string): Promise<void> {
  for (const name of names) {
    const real = await fileInside(from, name)
    const target = join(to, name)
    try {
      await mkdir(dirname(target), { recursive: true })
      await copyFile(real, target)
      await flush(target)
    } catch (cause) {
      throw ioError(cause, `cannot copy ${name}`)
    }
  }
}
