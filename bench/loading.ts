// Loading a warm folder of safetensors into tensors, and what the machine can do: the same bytes by plain positional reads into
// memory that was written before. Commands of ours.ts.
import { open } from 'node:fs/promises'
import type { DType } from '../lib/base/dtype.js'
import { readRegion, settleAll } from '../lib/io/blocks.js'
import { openWeights } from '../lib/io/weightFolder.js'
import { Ctx } from '../lib/tensor/ctx.js'
import { identityRegion } from '../lib/tensor/region.js'
import { Tensor } from '../lib/tensor/tensor.js'

const pieceBytes = 16 * 2 ** 20
let ctx: Ctx | null = null
let memory = Buffer.alloc(0)

/** Every tensor of the folder in memory of its own; freed afterwards, so that the next run finds it warm. */
export async function loadTensors({ folder, dtype }: { folder: string; dtype: DType }) {
  ctx ??= Ctx.create()
  const device = ctx
  const from = performance.now()
  const tensors: Tensor[] = []
  const { tensors: sources } = await openWeights(folder)
  await settleAll(
    [...sources.values()].map(({ path, offset, entry }) => {
      const tensor = Tensor.empty(device, entry.shape, dtype)
      tensors.push(tensor)
      return readRegion({ path, offset, dtype: entry.dtype, shape: entry.shape }, tensor, identityRegion(entry.shape))
    }),
  )
  const seconds = (performance.now() - from) / 1000
  for (const tensor of tensors) tensor.dispose()
  return { seconds }
}

/** All bytes of the folder's files into one buffer by Node's own reads, `threads` at a time. */
export async function rawRead({ folder, threads }: { folder: string; threads: number }) {
  const { files } = await openWeights(folder)
  const opened = await Promise.all(files.map(({ path }) => open(path, 'r')))
  try {
    const sizes = await Promise.all(opened.map(async (file) => (await file.stat()).size))
    const total = sizes.reduce((a, b) => a + b, 0)
    if (memory.length !== total) memory = Buffer.alloc(total, 1)
    const reads: (() => Promise<unknown>)[] = []
    let at = 0
    for (const [i, file] of opened.entries()) {
      const size = sizes[i] as number
      for (let offset = 0; offset < size; offset += pieceBytes) {
        const [to, bytes] = [at, Math.min(pieceBytes, size - offset)]
        reads.push(() => file.read(memory, to, bytes, offset))
        at += bytes
      }
    }
    const lane = async () => {
      for (let read = reads.shift(); read !== undefined; read = reads.shift()) await read()
    }
    const from = performance.now()
    await Promise.all(Array.from({ length: threads }, lane))
    return { seconds: (performance.now() - from) / 1000 }
  } finally {
    await Promise.all(opened.map((file) => file.close()))
  }
}
