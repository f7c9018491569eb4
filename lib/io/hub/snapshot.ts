// A model of the hub as a folder: the revision is pinned to a commit, the files that conversion and tokenizers need are fetched
// into the cache that Python shares, several at a time, and linked into a snapshot. config.json is linked last.
import { rm, stat, statfs } from 'node:fs/promises'
import { join } from 'node:path'
import { ViaductError } from '../../base/errors.js'
import { matchesPattern } from '../../models/mapping.js'
import { JsonDocument } from '../jsonDocument.js'
import { isWeightFile } from '../otherFiles.js'
import { exists } from '../paths.js'
import { indexFile, singleFile } from '../weightFolder.js'
import { downloadBlob } from './blobDownload.js'
import { CachedRepo, type HubOrigin, makeCacheFolder } from './cacheLayout.js'
import { withFileLock } from './fileLock.js'
import { HttpClient, type HttpOptions } from './httpClient.js'
import { HubRepo, type RepoFile } from './hubApi.js'
import { hubSettings, hubToken } from './hubSettings.js'

/** Bytes that are here, and bytes in all. */
export type OnDownload = (done: number, total: number) => void

export interface SnapshotOptions extends Pick<HttpOptions, 'attempts' | 'backoffMs' | 'stallMs'> {
  /** Branch, tag or commit. Default `main`. */
  readonly revision?: string
  readonly signal?: AbortSignal
  readonly onDownload?: OnDownload
  /** Only files of these patterns (`*`, `?`), instead of the choice that a conversion needs. */
  readonly allow?: readonly string[]
  /** Not files of these patterns. */
  readonly ignore?: readonly string[]
  /** Files fetched at a time. Default 4. */
  readonly parallel?: number
}

export interface Snapshot extends HubOrigin {
  readonly folder: string
}

const configFile = 'config.json'
const pickleFile = 'pytorch_model.bin'
const pickleIndex = 'pytorch_model.bin.index.json'

/**
 * Fetches what is missing of a model. With HF_HUB_OFFLINE, and when the hub cannot be reached, the cached snapshot is taken.
 * @throws ERR_OFFLINE, ERR_HUB_NOT_FOUND, ERR_HUB_ACCESS, ERR_DOWNLOAD_HASH, ERR_NETWORK, ERR_HTTP, ERR_NO_SPACE, ERR_ABORTED
 */
export async function snapshotDownload(repo: string, options: SnapshotOptions = {}): Promise<Snapshot> {
  const { endpoint, cache, offline } = hubSettings()
  const revision = options.revision ?? 'main'
  if (!/^[\w.-]+(\/[\w.-]+)*$/.test(revision) || revision.split('/').some((part) => /^\.+$/.test(part)))
    throw new ViaductError('ERR_USAGE', 'hub', `expected a branch, tag or commit, got ${JSON.stringify(revision)}`)
  const cached = new CachedRepo(cache, repo)
  if (offline) {
    const commit = await cached.commitOf(revision)
    if (commit !== null && (await exists(join(cached.snapshot(commit), configFile))))
      return { repo, commit, folder: cached.snapshot(commit) }
    throw new ViaductError(
      'ERR_OFFLINE',
      'hub',
      `expected hub id ${repo} at ${revision} in the cache ${cache}, found none, and HF_HUB_OFFLINE forbids to fetch it: unset it, or pass a folder`,
      { repo, revision, cache },
    )
  }
  const stop = new AbortController()
  const signal = options.signal ? AbortSignal.any([options.signal, stop.signal]) : stop.signal
  const { attempts, backoffMs, stallMs } = options
  const client = new HttpClient({
    signal,
    token: await hubToken(),
    origin: new URL(endpoint).origin,
    ...(attempts === undefined ? {} : { attempts }),
    ...(backoffMs === undefined ? {} : { backoffMs }),
    ...(stallMs === undefined ? {} : { stallMs }),
  })
  const hub = new HubRepo(client, endpoint, repo, revision)
  let commit: string
  let files: RepoFile[]
  try {
    commit = await hub.commit()
    files = await hub.files(commit)
  } catch (error) {
    const known = (error as ViaductError).code === 'ERR_NETWORK' ? await cached.commitOf(revision) : null
    if (known === null || !(await exists(join(cached.snapshot(known), configFile)))) throw error
    process.emitWarning(`${(error as Error).message}: the cached ${repo} at ${known} is taken`, 'ViaductNotice')
    return { repo, commit: known, folder: cached.snapshot(known) }
  }
  const fetcher = new Fetcher(hub, cached, commit, options.onDownload)
  const index = options.allow ? null : files.find(({ path }) => path === weightIndexOf(files))
  if (index) await fetcher.fetch(index)
  const named = index ? await namedFiles(join(cached.snapshot(commit), index.path), index.path) : new Set<string>()
  const chosen = chooseFiles(files, named, options)
  await fetcher.plan(chosen)
  const queue = chosen.filter(({ path }) => path !== configFile).sort((a, b) => a.size - b.size)
  const workers = Array.from({ length: options.parallel ?? 4 }, async () => {
    for (let file = queue.shift(); file !== undefined; file = queue.shift()) await fetcher.fetch(file)
  })
  // The first failure stops the others; what they have is kept for the next run.
  for (const worker of workers) worker.catch(() => stop.abort())
  const settled = await Promise.allSettled(workers)
  const errors = settled.flatMap((result) => (result.status === 'rejected' ? [result.reason as ViaductError] : []))
  const first = errors.find(({ code }) => code !== 'ERR_ABORTED') ?? errors[0]
  if (first) throw first
  const config = chosen.find(({ path }) => path === configFile)
  if (config) await fetcher.fetch(config)
  await makeCacheFolder(cached.snapshot(commit))
  await cached.writeRef(revision, commit)
  return { repo, commit, folder: cached.snapshot(commit) }
}

/** The index whose weights are taken: of safetensors where there are any, else of pickles. */
function weightIndexOf(files: readonly RepoFile[]): string | null {
  const names = new Set(files.map(({ path }) => path))
  if (names.has(indexFile)) return indexFile
  return names.has(singleFile) || names.has(pickleFile) || !names.has(pickleIndex) ? null : pickleIndex
}

/** The files that an index names. @throws ERR_INDEX */
async function namedFiles(path: string, name: string): Promise<Set<string>> {
  const { value } = await JsonDocument.read(path, 'ERR_INDEX')
  const map = (value as { readonly weight_map?: unknown } | null)?.weight_map
  const names = typeof map === 'object' && map !== null ? Object.values(map) : []
  return new Set([name, ...names.filter((file): file is string => typeof file === 'string')])
}

/** Weights in one format, and every file that is no weight. */
export function chooseFiles(
  files: readonly RepoFile[],
  named: ReadonlySet<string>,
  { allow, ignore }: Pick<SnapshotOptions, 'allow' | 'ignore'> = {},
): RepoFile[] {
  const single = files.some(({ path }) => path === singleFile) ? singleFile : pickleFile
  const wanted = (path: string) => {
    if (allow) return allow.some((pattern) => matchesPattern(path, pattern))
    return isWeightFile(path) ? (named.size > 0 ? named.has(path) : path === single) : true
  }
  return files.filter(({ path }) => wanted(path) && !(ignore ?? []).some((pattern) => matchesPattern(path, pattern)))
}

/** Fetches single files and keeps the count. */
class Fetcher {
  #done = 0
  #total = 0
  readonly #fetched = new Set<string>()

  constructor(
    private readonly hub: HubRepo,
    private readonly cached: CachedRepo,
    private readonly commit: string,
    private readonly onDownload: OnDownload | undefined,
  ) {}

  /** What is to come: bytes in all are known from here on. @throws ERR_NO_SPACE before a byte is fetched */
  async plan(files: readonly RepoFile[]): Promise<void> {
    let missing = 0
    const seen = new Set<string>()
    for (const { path, size, etag } of files) {
      this.#total += size
      if (this.#fetched.has(path) || seen.has(etag)) continue
      seen.add(etag)
      if (await this.cached.holds(this.commit, path, size)) continue
      const blob = this.cached.blob(etag)
      const have = await stat(blob).catch(() => stat(`${blob}.incomplete`).catch(() => null))
      missing += Math.max(0, size - (have?.size ?? 0))
    }
    await makeCacheFolder(this.cached.folder)
    const disk = await statfs(this.cached.folder)
    if (missing > disk.bavail * disk.bsize)
      throw new ViaductError(
        'ERR_NO_SPACE',
        'hub',
        `expected ${missing} bytes of free space for ${this.hub.repo} in ${this.cached.folder}, got ${disk.bavail * disk.bsize}: free some, or set HF_HUB_CACHE`,
        { bytes: missing },
      )
  }

  async fetch(file: RepoFile): Promise<void> {
    const { path, size, etag } = file
    if (this.#fetched.has(path)) return
    this.#fetched.add(path)
    if (await this.cached.holds(this.commit, path, size)) return this.#count(size)
    const blob = this.cached.blob(etag)
    await withFileLock(this.cached.lock(etag), this.hub.client.signal, async () => {
      const there = await stat(blob).catch(() => null)
      if (there?.size === size) return this.#count(size)
      if (there) await rm(blob)
      await makeCacheFolder(join(this.cached.folder, 'blobs'))
      await downloadBlob({
        client: this.hub.client,
        address: this.hub.address(this.commit, path),
        file,
        path: blob,
        check: (answer) => answer.status === 416 || this.hub.check(answer),
        onBytes: (bytes) => this.#count(bytes),
      })
    })
    await this.cached.link(this.commit, path, etag)
  }

  #count(bytes: number): void {
    this.#done += bytes
    if (this.#total > 0) this.onDownload?.(this.#done, this.#total)
  }
}
