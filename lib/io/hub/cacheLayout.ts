// The hub's cache on disk, as Python's huggingface_hub lays it out: models--ORG--NAME/{blobs,refs,snapshots}, and .locks beside
// them. A snapshot holds links into blobs; a ref holds the commit of a branch or tag. No network.
import { lstat, readdir, readFile, readlink, rename, rm, stat, symlink } from 'node:fs/promises'
import { basename, dirname, join, relative, resolve } from 'node:path'
import { ViaductError } from '../../base/errors.js'
import { ioError, makeFolder, temporaryName, writeFileAtomic } from '../atomic.js'
import { exists, isFolder } from '../paths.js'

/** A model of the hub at one commit. */
export interface HubOrigin {
  /** `org/name`. */
  readonly repo: string
  readonly commit: string
}

export const commitPattern = /^[0-9a-f]{40}$/

/** The folders of one model in a cache. */
export class CachedRepo {
  readonly folder: string
  constructor(
    private readonly cache: string,
    readonly repo: string,
  ) {
    this.folder = join(cache, folderName(repo))
  }

  blob(etag: string): string {
    return join(this.folder, 'blobs', etag)
  }

  lock(etag: string): string {
    return join(this.cache, '.locks', folderName(this.repo), `${etag}.lock`)
  }

  snapshot(commit: string): string {
    return join(this.folder, 'snapshots', commit)
  }

  /** The commit that a branch, tag or commit had when it was fetched, its snapshot being there; else null. */
  async commitOf(revision: string): Promise<string | null> {
    const known = await knownCommit(this.folder, revision)
    return known !== null && (await isFolder(this.snapshot(known))) ? known : null
  }

  /** Remembers the commit of a branch or tag. */
  async writeRef(revision: string, commit: string): Promise<void> {
    if (revision === commit) return
    const path = join(this.folder, 'refs', revision)
    if ((await readFile(path, 'utf8').catch(() => '')) === commit) return
    await makeCacheFolder(dirname(path))
    await writeFileAtomic(path, commit)
  }

  /** Gives a blob its name in a snapshot, in one step. */
  async link(commit: string, name: string, etag: string): Promise<void> {
    const path = join(this.snapshot(commit), name)
    const target = relative(dirname(path), this.blob(etag))
    if ((await readlink(path).catch(() => null)) === target) return
    await makeCacheFolder(dirname(path))
    const temporary = temporaryName(path)
    try {
      await symlink(target, temporary)
      await rename(temporary, path)
    } catch (cause) {
      await rm(temporary, { force: true })
      throw ioError(cause, `cannot link ${path}`)
    }
  }

  /** True if the snapshot's file is there with this size. */
  async holds(commit: string, name: string, size: number): Promise<boolean> {
    const found = await stat(join(this.snapshot(commit), name)).catch(() => null)
    return found?.isFile() === true && found.size === size
  }
}

function folderName(repo: string): string {
  return `models--${repo.replaceAll('/', '--')}`
}

async function knownCommit(folder: string, revision: string): Promise<string | null> {
  const text = await readFile(join(folder, 'refs', revision), 'utf8').catch(() => revision)
  return commitPattern.test(text.trim()) ? text.trim() : null
}

/** Makes a folder of the cache and its parents. */
export async function makeCacheFolder(path: string): Promise<void> {
  await makeFolder(path).catch((cause: unknown) => {
    throw ioError(cause, `cannot make ${path}`)
  })
}

/** Model and commit of a snapshot's folder, by its path; null for any other folder. */
export function originOf(folder: string): HubOrigin | null {
  const commit = basename(resolve(folder))
  const above = dirname(resolve(folder))
  const match = /^models--(.+)$/.exec(basename(dirname(above)))
  if (!commitPattern.test(commit) || basename(above) !== 'snapshots' || match === null) return null
  return { repo: (match[1] as string).replace('--', '/'), commit }
}

/**
 * The snapshot that a `models--ORG--NAME` folder means: its revision, or the only one there is. Any other folder is itself.
 * @throws ERR_HUB_NOT_FOUND
 */
export async function snapshotOf(folder: string, revision: string | undefined): Promise<string> {
  const snapshots = join(folder, 'snapshots')
  if (!/^models--/.test(basename(resolve(folder))) || !(await isFolder(snapshots))) return folder
  const commit = await knownCommit(folder, revision ?? 'main')
  if (commit !== null && (await exists(join(snapshots, commit)))) return join(snapshots, commit)
  const there = []
  for (const name of await readdir(snapshots)) if ((await lstat(join(snapshots, name))).isDirectory()) there.push(name)
  if (revision === undefined && there.length === 1) return join(snapshots, there[0] as string)
  throw new ViaductError(
    'ERR_HUB_NOT_FOUND',
    'hub',
    `expected revision ${revision ?? 'main'} in ${folder}, found ${there.join(', ') || 'none'}: name one with --revision`,
    { folder, revision: revision ?? 'main', commits: there },
  )
}
