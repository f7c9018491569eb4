// Files and folders that appear whole or not at all: written beside the target under a hidden name, flushed to disk, renamed.
// A full disk is ERR_NO_SPACE. What a killed process left behind is removed by the next writer of the same target.
import { randomBytes } from 'node:crypto'
import { mkdir, open, readdir, rename, rm, rmdir } from 'node:fs/promises'
import { hostname } from 'node:os'
import { basename, dirname, join } from 'node:path'
import { native } from '../addon/load.js'
import { ViaductError } from '../base/errors.js'
import { exists } from './paths.js'

/** Turns a system error into ours. */
export function ioError(cause: unknown, what: string): ViaductError {
  if (cause instanceof ViaductError) return cause
  const { code, message } = cause as NodeJS.ErrnoException
  const full = code === 'ENOSPC' || code === 'EDQUOT' || code === 'EFBIG'
  const kind = full ? 'ERR_NO_SPACE' : code === 'ENOENT' ? 'ERR_FILE_MISSING' : 'ERR_IO'
  return new ViaductError(
    kind,
    'file',
    `${what}: ${message}${full ? ': free space there, or choose another target' : ''}`,
    {},
    { cause },
  )
}

/**
 * Makes a folder and its parents; returns the topmost that was not there, or null. Node's own recursive mkdir never ends where the
 * system answers ENOENT for a folder whose parent exists (/proc).
 */
export async function makeFolder(path: string): Promise<string | null> {
  const make = () =>
    mkdir(path).then(
      () => path,
      (cause: NodeJS.ErrnoException) => {
        if (cause.code === 'EEXIST') return null
        throw cause
      },
    )
  try {
    return await make()
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code !== 'ENOENT') throw cause
  }
  const above = await makeFolder(dirname(path))
  const own = await make()
  return above ?? own
}

/** Takes a folder that `makeFolder` made away again, and those that it made above, as far as they are empty. */
export async function removeMade(path: string, topmost: string): Promise<void> {
  for (let at = path; ; at = dirname(at)) {
    const gone = await rmdir(at).then(
      () => true,
      () => false,
    )
    if (!gone || at === topmost) return
  }
}

/** Flushes a file or folder to disk. */
export async function flush(path: string): Promise<void> {
  try {
    const handle = await open(path, 'r')
    await handle.sync().finally(() => handle.close())
  } catch (cause) {
    throw ioError(cause, `cannot flush ${path}`)
  }
}

/** Writes a new file and flushes it. */
export async function writeFlushed(path: string, data: string | Uint8Array): Promise<void> {
  try {
    const handle = await open(path, 'wx')
    try {
      await handle.writeFile(data)
      await handle.sync()
    } finally {
      await handle.close()
    }
  } catch (cause) {
    throw ioError(cause, `cannot write ${path}`)
  }
}

const host = hostname().replace(/[^A-Za-z0-9]/g, '_')

/** A hidden name beside `path`, of this process: `.NAME.tmp-HOST-PID-RANDOM`. */
export function temporaryName(path: string): string {
  return join(dirname(path), `.${basename(path)}.tmp-${host}-${process.pid}-${randomBytes(4).toString('hex')}`)
}

/** The hidden folder beside `path` in which it grows, the same for every process: `.NAME.unfinished`. */
export function unfinishedName(path: string): string {
  return join(dirname(path), `.${basename(path)}.unfinished`)
}

/** Removes temporary entries of `folder` whose writers on this machine are gone. */
export async function removeStale(folder: string): Promise<void> {
  for (const name of await readdir(folder).catch(() => [])) {
    const match = /^\..+\.tmp-(\w+)-(\d+)-[0-9a-f]{8}$/.exec(name)
    if (match === null || match[1] !== host || isAlive(Number(match[2]))) continue
    await rm(join(folder, name), { recursive: true, force: true })
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
}

/** Replaces a file in one step; at any instant the old or the new content is there. */
export async function writeFileAtomic(path: string, data: string | Uint8Array): Promise<void> {
  const temporary = temporaryName(path)
  try {
    await writeFlushed(temporary, data)
    await rename(temporary, path)
    await flush(dirname(path))
  } catch (cause) {
    await rm(temporary, { force: true })
    throw ioError(cause, `cannot write ${path}`)
  }
}

/**
 * Gives a finished folder its name in one step and flushes the parent. The folder's files were flushed by their writers.
 * An existing target is exchanged and then removed: at any instant a complete folder has the name.
 */
export async function commitFolder(temporary: string, target: string): Promise<void> {
  try {
    await flush(temporary)
    if (await exists(target)) {
      let old = temporary
      if (!native.exchangePaths(temporary, target)) {
        // No exchange on this file system: the old folder steps aside under a name that readers know, see `asideOf`.
        old = join(dirname(target), `.${basename(target)}.old-${randomBytes(4).toString('hex')}`)
        await rename(target, old)
        await rename(temporary, target)
      }
      await flush(dirname(target))
      await rm(old, { recursive: true, force: true })
    } else {
      await rename(temporary, target)
      await flush(dirname(target))
    }
  } catch (cause) {
    throw ioError(cause, `cannot commit ${target}`)
  }
}

/** The complete old folder of a commit that was killed between two renames, or null. */
export async function asideOf(target: string): Promise<string | null> {
  const names = await readdir(dirname(target)).catch(() => [])
  const name = names.find((n) => n.startsWith(`.${basename(target)}.old-`))
  return name === undefined ? null : join(dirname(target), name)
}

/**
 * A target folder for output: absent, empty, or to be replaced on purpose.
 * @throws ERR_TARGET_EXISTS when it holds something and `overwrite` is false.
 */
export async function checkTarget(target: string, overwrite: boolean): Promise<void> {
  const entries = await readdir(target).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return []
    throw new ViaductError('ERR_TARGET_EXISTS', 'target', `expected a folder or nothing at ${target}, got a file`, {
      target,
    })
  })
  if (entries.some((name) => !/^\..+\.unfinished$/.test(name)) && !overwrite) {
    throw new ViaductError(
      'ERR_TARGET_EXISTS',
      'target',
      `expected an empty or new folder, got ${target} with ${entries.length} entries: pass --overwrite to replace it`,
      { target },
    )
  }
}
