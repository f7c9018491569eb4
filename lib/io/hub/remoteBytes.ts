// Tensor bytes that lie on a web server, brought here for one piece of work and let go after it. They lie in sparse files, each
// byte at its offset in the remote file, so that plans need another path and nothing else. What is held at a time is bounded.
import { open, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { dtypes } from '../../base/dtype.js'
import { ViaductError } from '../../base/errors.js'
import { contiguousStrides } from '../../base/shape.js'
import type { Region } from '../../tensor/region.js'
import { ioError } from '../atomic.js'
import { type FileTensor, settleAll } from '../blocks.js'
import type { RemoteFile } from './remoteFile.js'

/** Bytes of a remote file. `path` is that of its TensorSource, an address. */
export interface ByteRange {
  readonly path: string
  readonly begin: number
  readonly end: number
}

/** Ranges that are here until they are released. */
export interface ByteLease {
  /** The same tensor in a file here. */
  local<T extends { readonly path: string }>(place: T): T
  release(): Promise<void>
}

/** A gap that is fetched along: less than a request costs. */
const joinedGap = 1 << 20
const requestBytes = 16 << 20
const mostRequests = 4

/** The bytes of one remote folder. */
export class RemoteBytes {
  #held = 0
  #count = 0
  readonly #waiting: (() => void)[] = []

  constructor(
    private readonly files: ReadonlyMap<string, RemoteFile>,
    private readonly folder: string,
    /** Most bytes of all leases together; a larger one waits until it is alone. */
    readonly limit: number,
  ) {}

  /** Brings ranges here. @throws ERR_NETWORK, ERR_HTTP, ERR_NO_SPACE, ERR_ABORTED; nothing is held then */
  async lease(ranges: readonly ByteRange[]): Promise<ByteLease> {
    const joined = joinRanges(ranges)
    const bytes = joined.reduce((sum, { begin, end }) => sum + end - begin, 0)
    while (this.#held > 0 && this.#held + bytes > this.limit) await new Promise<void>((go) => this.#waiting.push(go))
    return this.#bring(joined, bytes)
  }

  /** As lease, for a few bytes that stay: they do not count. */
  async keep(ranges: readonly ByteRange[]): Promise<ByteLease> {
    return this.#bring(joinRanges(ranges), 0)
  }

  async #bring(joined: readonly ByteRange[], counted: number): Promise<ByteLease> {
    this.#held += counted
    const name = join(this.folder, `lease-${this.#count++}`)
    const paths = new Map([...new Set(joined.map(({ path }) => path))].map((path, i) => [path, `${name}-${i}`]))
    let released = false
    const release = async () => {
      if (released) return
      released = true
      for (const path of paths.values()) await rm(path, { force: true })
      this.#held -= counted
      for (const go of this.#waiting.splice(0)) go()
    }
    try {
      await this.#fetch(joined, paths)
    } catch (error) {
      await release()
      throw error
    }
    return {
      release,
      local(place) {
        const path = paths.get(place.path)
        if (path === undefined)
          throw new ViaductError('ERR_ASSERT', 'http', `expected leased bytes of ${place.path}, got none`)
        return { ...place, path }
      },
    }
  }

  async #fetch(ranges: readonly ByteRange[], paths: ReadonlyMap<string, string>): Promise<void> {
    const queue = ranges.flatMap(({ path, begin, end }) =>
      Array.from({ length: Math.ceil((end - begin) / requestBytes) }, (_, i) => ({
        path,
        begin: begin + i * requestBytes,
        end: Math.min(end, begin + (i + 1) * requestBytes),
      })),
    )
    const outputs = new Map(
      await Promise.all(
        [...paths].map(async ([path, local]) => {
          const file = await open(local, 'wx').catch((cause: unknown) => {
            throw ioError(cause, `cannot write ${local}`)
          })
          return [path, file] as const
        }),
      ),
    )
    try {
      const workers = Array.from({ length: mostRequests }, async () => {
        for (let range = queue.shift(); range !== undefined; range = queue.shift()) {
          const { path, begin, end } = range
          const output = outputs.get(path)
          try {
            await this.files.get(path)?.read(begin, end, async (chunk, offset) => {
              for (let done = 0; done < chunk.length; )
                done += (await output?.write(chunk, done, chunk.length - done, offset + done))?.bytesWritten ?? 0
            })
          } catch (error) {
            queue.length = 0
            throw ioError(error, `cannot write bytes of ${path}`)
          }
        }
      })
      await settleAll(workers)
    } finally {
      for (const file of outputs.values()) await file.close()
    }
  }
}

function joinRanges(ranges: readonly ByteRange[]): ByteRange[] {
  const sorted = ranges
    .filter(({ begin, end }) => end > begin)
    .sort((a, b) => (a.path < b.path ? -1 : a.path > b.path ? 1 : a.begin - b.begin))
  const joined: { path: string; begin: number; end: number }[] = []
  for (const { path, begin, end } of sorted) {
    const last = joined.at(-1)
    if (last !== undefined && last.path === path && begin - last.end <= joinedGap) last.end = Math.max(last.end, end)
    else joined.push({ path, begin, end })
  }
  return joined
}

/** The bytes from the first to the last element that a region reads. */
export function rangeOf({ path, offset, dtype, shape }: FileTensor, { from, size }: Region): ByteRange {
  const strides = contiguousStrides(shape)
  const width = dtypes[dtype].bits / 8
  const first = from.reduce((sum, start, d) => sum + start * (strides[d] as number), 0)
  const last = from.reduce((sum, start, d) => sum + (start + (size[d] as number) - 1) * (strides[d] as number), 0)
  return { path, begin: offset + first * width, end: offset + (last + 1) * width }
}

/** Regions cut along their outer dimensions until each reads from at most `limit` bytes. */
export function cutRegions(place: FileTensor, regions: readonly Region[], limit: number): Region[] {
  return regions.flatMap((region) => {
    if (region.size.some((n) => n === 0)) return []
    const { begin, end } = rangeOf(place, region)
    const d = region.size.findIndex((n) => n > 1)
    if (end - begin <= limit || d < 0) return [region]
    const half = (region.size[d] as number) >> 1
    const part = (start: number, count: number): Region => ({
      from: region.from.map((n, i) => (i === d ? n + start : n)),
      to: region.to.map((n, i) => (i === d ? n + start : n)),
      size: region.size.map((n, i) => (i === d ? count : n)),
    })
    return cutRegions(place, [part(0, half), part(half, (region.size[d] as number) - half)], limit)
  })
}

/** A lease of bytes that may be here already (`remote` is null): then places stay as they are. */
export async function leaseHere(remote: RemoteBytes | null, ranges: readonly ByteRange[]): Promise<ByteLease> {
  return remote === null ? { local: (place) => place, release: async () => {} } : remote.lease(ranges)
}

/** Reads regions of a tensor that may lie on a server: `work` is called with a place here, a bounded batch of regions at a time. */
export async function readHere(
  remote: RemoteBytes | null,
  place: FileTensor,
  regions: readonly Region[],
  work: (place: FileTensor, region: Region) => Promise<void>,
): Promise<void> {
  if (remote === null) return settleAll(regions.map((region) => work(place, region)))
  // A batch is half of what may be held: one comes while another is read.
  const most = remote.limit / 2
  const batches: { ranges: ByteRange[]; regions: Region[] }[] = []
  let bytes = most
  for (const region of cutRegions(place, regions, most)) {
    const range = rangeOf(place, region)
    bytes += range.end - range.begin
    if (bytes > most) {
      batches.push({ ranges: [], regions: [] })
      bytes = range.end - range.begin
    }
    batches.at(-1)?.ranges.push(range)
    batches.at(-1)?.regions.push(region)
  }
  await settleAll(
    batches.map(async (batch) => {
      const lease = await remote.lease(batch.ranges)
      await settleAll(batch.regions.map((region) => work(lease.local(place), region))).finally(lease.release)
    }),
  )
}
