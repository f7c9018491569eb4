// Moving boxes of elements between files and tensors, and between files: the native rows with regions and a bounded number of
// calls in flight. Work here is not ordered against streams: `await stream.sync()` first.
import { native } from '../addon/load.js'
import { type DType, dtypes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { type Region, volume } from '../tensor/region.js'
import type { Tensor } from '../tensor/tensor.js'

/** A tensor inside of a file, row-major. */
export interface FileTensor {
  readonly path: string
  /** Bytes from the file's first byte. */
  readonly offset: number
  readonly dtype: DType
  readonly shape: readonly number[]
}

/** Calls in flight: enough to keep disk and cores busy, few enough that scratch memory stays small. */
const mostCalls = 4
const waiting: (() => void)[] = []
let running = 0

async function limited<T>(call: () => Promise<T>): Promise<T> {
  if (running >= mostCalls) await new Promise<void>((resume) => waiting.push(resume))
  else running++
  try {
    return await call()
  } finally {
    const next = waiting.shift()
    if (next) next()
    else running--
  }
}

function code(dtype: DType): number {
  const { code: value } = dtypes[dtype]
  if (value >= 0) return value
  throw new ViaductError('ERR_DTYPE', 'io', `expected a dtype that can be moved by elements, got ${dtype}`)
}

/** tensor[region.to] = file[region.from]; float casts to float, int to int. */
export async function readRegion(source: FileTensor, target: Tensor, region: Region): Promise<void> {
  if (volume(region.size) === 0) return
  await limited(() =>
    native.readBlock(
      source.path,
      source.offset,
      code(source.dtype),
      source.shape,
      region.from,
      region.size,
      target.handle,
      region.to,
    ),
  )
}

/** file[region.to] = tensor[region.from]. The file exists and is large enough. */
export async function writeRegion(source: Tensor, target: FileTensor, region: Region): Promise<void> {
  if (volume(region.size) === 0) return
  await limited(() =>
    native.writeBlock(
      target.path,
      target.offset,
      code(target.dtype),
      target.shape,
      region.to,
      region.size,
      source.handle,
      region.from,
    ),
  )
}

/** to[region.to] = from[region.from], both in files. */
export async function copyRegion(from: FileTensor, to: FileTensor, region: Region): Promise<void> {
  if (volume(region.size) === 0) return
  await limited(() =>
    native.copyBlock(
      from.path,
      from.offset,
      code(from.dtype),
      from.shape,
      region.from,
      to.path,
      to.offset,
      code(to.dtype),
      to.shape,
      region.to,
      region.size,
    ),
  )
}

/** 128-bit XXH3 of a range of a file, 32 hex digits of the canonical form. */
export function hashRange(path: string, offset: number, bytes: number): Promise<string> {
  return limited(() => native.hashRange(path, offset, bytes))
}

/** Bytes that differ between two ranges, and the offset of the first in the range (-1 where none does). */
export function compareRanges(
  a: { readonly path: string; readonly offset: number },
  b: { readonly path: string; readonly offset: number },
  bytes: number,
): Promise<{ readonly differing: number; readonly first: number }> {
  return limited(() => native.compareRanges(a.path, a.offset, b.path, b.offset, bytes))
}

/** A new file whose space is reserved, beginning with `head`. @throws ERR_NO_SPACE, ERR_TARGET_EXISTS */
export function createFile(path: string, bytes: number, head: Uint8Array): Promise<void> {
  return limited(() => native.createFile(path, bytes, head))
}

/** Runs all and waits for all, also when one fails; then throws the first failure. */
export async function settleAll(work: Iterable<Promise<unknown>>): Promise<void> {
  const results = await Promise.allSettled(work)
  const failed = results.find((r) => r.status === 'rejected')
  if (failed) throw failed.reason
}
