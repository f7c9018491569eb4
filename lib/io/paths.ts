// Names of files that come from outside, and where they may lead. A name may not leave its folder; a symlink may leave it only
// as the Hugging Face cache does: from snapshots/REVISION/ into blobs/ beside snapshots/.
import { realpath, stat } from 'node:fs/promises'
import { basename, dirname, join, sep } from 'node:path'
import { type ErrorCode, ViaductError } from '../base/errors.js'

function escape(name: string, folder: string, why: string): never {
  throw new ViaductError(
    'ERR_PATH_ESCAPE',
    'path',
    `expected a file inside of ${folder}, got ${JSON.stringify(name)}: ${why}`,
    { name, folder },
  )
}

/** Checks the spelling of a relative file name. @throws ERR_PATH_ESCAPE; nothing is opened. */
export function checkFileName(name: string, folder: string): void {
  if (name === '') escape(name, folder, 'it is empty')
  if (name.includes('\0')) escape(name, folder, 'it holds a zero byte')
  if (name.includes('\\')) escape(name, folder, 'it holds a backslash')
  if (name.startsWith('/') || /^[A-Za-z]:/.test(name)) escape(name, folder, 'it is absolute')
  if (name.split('/').some((part) => part === '..' || part === '.' || part === ''))
    escape(name, folder, 'it has empty, . or .. parts')
}

/**
 * The real path of a regular file of a folder.
 * @param missing - code to throw when it does not exist.
 * @throws ERR_PATH_ESCAPE when the name or a symlink leaves the folder, or when it is no regular file.
 */
export async function fileInside(
  folder: string,
  name: string,
  missing: ErrorCode = 'ERR_FILE_MISSING',
): Promise<string> {
  checkFileName(name, folder)
  const home = await realpath(folder)
  let real: string
  try {
    real = await realpath(join(folder, name))
  } catch (cause) {
    throw new ViaductError(
      missing,
      'path',
      `expected the file ${name} in ${folder}, found none: download or copy it again`,
      { file: name, folder },
      { cause },
    )
  }
  if (!real.startsWith(home + sep)) {
    const cache = basename(dirname(home)) === 'snapshots' ? join(dirname(dirname(home)), 'blobs') + sep : null
    if (cache === null || !real.startsWith(cache)) escape(name, folder, `it is a link to ${real}`)
  }
  if (!(await stat(real)).isFile()) escape(name, folder, 'it is no regular file')
  return real
}

/** True if the path is an existing folder. */
export async function isFolder(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory()
  } catch {
    return false
  }
}

/** True if something exists at the path (links are followed). */
export async function exists(path: string): Promise<boolean> {
  try {
    await stat(path)
    return true
  } catch {
    return false
  }
}
