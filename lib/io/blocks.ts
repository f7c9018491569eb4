// Moving boxes of elements between files and tensors, and between files: the native rows with regions and a bounded number of
// calls in flight. Work here is not ordered against streams: `await stream.sync()` first.
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import type { IoCounters } from '../addon/functions.js'
import { native } from '../addon/load.js'
import { type DType, dtypes } from '../base/dtype.js'
import { stopIfAborted, ViaductError } from '../base/errors.js'
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

/** Larger reads are cut, so that one tensor keeps several cores busy. */
const mostReadBytes = 16 * 2 ** 20

/** A region in parts of about `mostReadBytes`, cut along its first dim that has a length. */
function cut(region: Region, dtype: DType): Region[] {
  const bytes = (volume(region.size) * dtypes[dtype].bits) / 8
  const dim = region.size.findIndex((n) => n > 1)
  if (bytes <= mostReadBytes || dim < 0) return [region]
  const length = region.size[dim] as number
  const step = Math.ceil(length / Math.ceil(bytes / mostReadBytes))
  const moved = (start: readonly number[], by: number) => start.map((n, d) => (d === dim ? n + by : n))
  return Array.from({ length: Math.ceil(length / step) }, (_, i) => ({
    from: moved(region.from, i * step),
    to: moved(region.to, i * step),
    size: region.size.map((n, d) => (d === dim ? Math.min(step, length - i * step) : n)),
  }))
}

/**
 * tensor[region.to] = file[region.from]; float casts to float, int to int.
 * @throws ERR_ABORTED when the signal is aborted before its turn comes
 */
export async function readRegion(
  source: FileTensor,
  target: Tensor,
  region: Region,
  signal?: AbortSignal,
): Promise<void> {
  if (volume(region.size) === 0) return
  const { path, offset, dtype, shape } = source
  await settleAll(
    cut(region, dtype).map(({ from, to, size }) =>
      limited(() => {
        stopIfAborted(signal, 'io')
        return native.readBlock(path, offset, code(dtype), shape, from, size, target.handle, to)
      }),
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

/** to[region.to] = from[region.from], both in files. @throws ERR_ABORTED when the signal is aborted before its turn comes. */
export async function copyRegion(
  from: FileTensor,
  to: FileTensor,
  region: Region,
  signal?: AbortSignal,
): Promise<void> {
  if (volume(region.size) === 0) return
  await limited(() => {
    stopIfAborted(signal, 'io')
    return native.copyBlock(
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
    )
  })
}

/** Regions between a box and one other tensor in a file. */
export interface BoxMove {
  readonly place: FileTensor
  readonly regions: readonly Region[]
}

export interface BoxOptions {
  /** Take the XXH3 of the box's bytes on the way. */
  readonly hash: boolean
  readonly signal?: AbortSignal
}

/**
 * Fills a whole tensor in a file, in the order of its bytes, from regions source -> target of tensors in other files. Casts are
 * fused; the hash is that of the bytes written, without a second read. The file exists and is large enough. Regions must
 * cover the target without overlap; all tensors have its rank.
 * @throws ERR_COVERAGE where an element of the target has no source, ERR_IO where a source ends early, ERR_ABORTED
 */
export async function gatherBox(
  target: FileTensor,
  sources: readonly BoxMove[],
  options: BoxOptions,
): Promise<{ readonly xxh3: string | null }> {
  const plan = new MovePlan(target)
  for (const { place, regions } of sources) plan.add(place, regions, (r) => [r.to, r.from])
  return plan.run(native.gatherBox, options)
}

/** The hash that gatherBox would give, of a tensor that is written nowhere. @throws as gatherBox */
export async function hashBox(
  box: { readonly dtype: DType; readonly shape: readonly number[] },
  sources: readonly BoxMove[],
  options: { readonly signal?: AbortSignal } = {},
): Promise<string> {
  const { xxh3 } = await gatherBox({ path: '', offset: 0, ...box }, sources, { ...options, hash: true })
  return xxh3 as string
}

/**
 * The mirror: reads a whole tensor of a file once, in order, and writes its regions source -> target into tensors of other files.
 * The hash is that of the bytes read, known when they are written: who expects another one discards the targets.
 * @throws as gatherBox, but elements may go nowhere or to several places
 */
export async function scatterBox(
  source: FileTensor,
  targets: readonly BoxMove[],
  options: BoxOptions,
): Promise<{ readonly xxh3: string | null }> {
  const plan = new MovePlan(source)
  for (const { place, regions } of targets) plan.add(place, regions, (r) => [r.from, r.to])
  return plan.run(native.scatterBox, options)
}

/**
 * tensor[region.to] = source[region.from] for all regions of a tensor of a file that is read once, whole and in order. The hash is
 * that of the bytes read, known when they are in place: who expects another one discards the tensor.
 * @throws as scatterBox
 */
export async function readHashed(
  source: FileTensor,
  target: Tensor,
  regions: readonly Region[],
  options: { readonly signal?: AbortSignal } = {},
): Promise<{ readonly xxh3: string }> {
  const plan = new MovePlan(source)
  plan.add({ path: '', offset: 0, dtype: target.dtype, shape: target.shape }, regions, (r) => [r.from, r.to])
  const xxh3 = await plan.start(
    (paths, numbers, stopId) => native.readHashed(paths, numbers, target.handle, stopId),
    options.signal,
  )
  return { xxh3 }
}

/** The plan of a move as the native rows take it: see MoveReader in native/binding/io.cc. */
class MovePlan {
  readonly #paths = new Map<string, number>()
  readonly #numbers: number[]
  readonly #rank: number

  constructor(box: FileTensor) {
    this.#rank = box.shape.length
    this.#numbers = [this.#rank]
    this.#tensor(box)
  }

  add(place: FileTensor, regions: readonly Region[], starts: (r: Region) => [readonly number[], readonly number[]]) {
    this.#tensor(place)
    this.#numbers.push(regions.length)
    for (const region of regions) {
      for (const numbers of [...starts(region), region.size]) this.#dims(numbers)
    }
  }

  async run(move: typeof native.gatherBox, { hash, signal }: BoxOptions): Promise<{ readonly xxh3: string | null }> {
    const xxh3 = await this.start((paths, plan, stopId) => move(paths, plan, hash, stopId), signal)
    return { xxh3: hash ? xxh3 : null }
  }

  /** Calls a native row when its turn has come. */
  start<T>(row: (paths: string[], plan: Float64Array, stopId: number) => Promise<T>, signal?: AbortSignal): Promise<T> {
    const plan = Float64Array.from(this.#numbers)
    return limited(() => row([...this.#paths.keys()], plan, signal ? stopIdOf(signal) : 0))
  }

  #tensor({ path, offset, dtype, shape }: FileTensor): void {
    if (!this.#paths.has(path)) this.#paths.set(path, this.#paths.size)
    this.#numbers.push(this.#paths.get(path) as number, offset, code(dtype))
    this.#dims(shape)
  }

  #dims(numbers: readonly number[]): void {
    if (numbers.length !== this.#rank) {
      throw new ViaductError(
        'ERR_SHAPE',
        'io',
        `expected tensors and regions of rank ${this.#rank}, got one of [${numbers}]`,
      )
    }
    this.#numbers.push(...numbers)
  }
}

const stopIds = new WeakMap<AbortSignal, number>()
let lastStopId = 0

/** The number by which native moves know a signal. @throws ERR_ABORTED when it was aborted already */
function stopIdOf(signal: AbortSignal): number {
  stopIfAborted(signal, 'io')
  let id = stopIds.get(signal)
  if (id === undefined) {
    id = ++lastStopId
    stopIds.set(signal, id)
    const stopId = id
    signal.addEventListener('abort', () => native.stopMoves(stopId), { once: true })
  }
  return id
}

/** 128-bit XXH3 of a range of a file, 32 hex digits of the canonical form. @throws ERR_ABORTED as copyRegion */
export function hashRange(path: string, offset: number, bytes: number, signal?: AbortSignal): Promise<string> {
  return limited(async () => {
    stopIfAborted(signal, 'io')
    return native.hashRange(path, offset, bytes)
  })
}

/** SHA-256 of a range of a file, 64 hex digits. */
export function sha256Range(path: string, offset: number, bytes: number): Promise<string> {
  if (native.hasSha256()) return limited(() => native.sha256Range(path, offset, bytes))
  return limited(() => sha256InNode(path, offset, bytes))
}

async function sha256InNode(path: string, offset: number, bytes: number): Promise<string> {
  const hash = createHash('sha256')
  if (bytes > 0) {
    const range = createReadStream(path, { start: offset, end: offset + bytes - 1, highWaterMark: 1 << 20 })
    let got = 0
    for await (const chunk of range) {
      hash.update(chunk as Buffer)
      got += (chunk as Buffer).length
    }
    if (got < bytes)
      throw new ViaductError('ERR_IO', 'file', `expected ${bytes - got} more bytes, got the end of ${path}`, {
        file: path,
      })
  }
  return hash.digest('hex')
}

/** Bytes that this process has read and written through this file's functions, for reports and tests. */
export function ioCounters(): IoCounters {
  return native.ioCounters()
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
