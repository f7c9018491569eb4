// What every suite is given, and the models, tokens and sizes that several measure. Sizes are those of peer.py.
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { Side } from '../side.js'
import { writeSyntheticModel } from '../syntheticModel.js'

export type SizeName = 'a' | 'b' | 'moe'
/** Sizes of dense models. */
export type DenseSize = Exclude<SizeName, 'moe'>
export type DtypeName = 'float32' | 'bfloat16'

export interface BenchOptions {
  readonly sizes: readonly SizeName[]
  readonly dtypes: readonly DtypeName[]
  readonly pairs: number
  /** No further pair begins after this long, once three are there. */
  readonly limitSeconds: number
  readonly threads: number
  readonly python: string
  /** Folder for models and conversions. */
  readonly work: string
  readonly gigabytes: number
  readonly newTokens: number
  /** Only work whose name has this in it. */
  readonly only: string
}

export const sizes = {
  a: { batch: 8, seqLength: 256, vocabulary: 8192, text: '4 layers of 256, vocabulary 8192, batch 8×256' },
  moe: {
    batch: 8,
    seqLength: 256,
    vocabulary: 8192,
    text: 'Qwen3-MoE of 4 layers of 256, 4 of 16 experts of 192, vocabulary 8192, batch 8×256',
  },
  b: { batch: 4, seqLength: 512, vocabulary: 32000, text: '8 layers of 512, vocabulary 32000, batch 4×512' },
} as const

export { randomTokens } from '../tokens.js'

export const isMade = (folder: string) => existsSync(join(folder, 'config.json'))

export async function modelFolder(options: BenchOptions, size: SizeName, peer: Side | undefined): Promise<string> {
  const folder = join(options.work, size)
  if (!isMade(folder)) await peer?.call('make', { folder, size })
  return folder
}

/** A large bfloat16 folder that is loaded and converted; made when it is not there. */
export function syntheticFolder({ work, gigabytes }: BenchOptions): string {
  const folder = join(work, `synthetic-${gigabytes}`)
  if (!existsSync(join(folder, 'model.safetensors.index.json'))) writeSyntheticModel(folder, gigabytes * 1e9)
  return folder
}
