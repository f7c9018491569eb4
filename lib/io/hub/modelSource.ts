// What the argument that names a model may be: a folder, a folder of the hub's cache, a hub id. It ends as a folder here.
import { ViaductError } from '../../base/errors.js'
import { isFolder } from '../paths.js'
import { snapshotOf } from './cacheLayout.js'
import type { OnDownload } from './snapshot.js'

/** How a model that is not here is fetched. */
export interface SourceOptions {
  /** Branch, tag or commit of a hub id or of a cache folder. Default `main`. Any other folder has none. */
  readonly revision?: string
  readonly signal?: AbortSignal
  /** Told bytes that are here and bytes in all while a model is fetched. */
  readonly onDownload?: OnDownload
}

/** True for `org/name`. A folder of that name goes first. */
export function isHubId(path: string): boolean {
  return /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*$/.test(path) && !path.includes('..') && !path.includes('--')
}

/**
 * The folder of a model; a hub id is fetched into the cache.
 * @throws ERR_FILE_MISSING for a path that is nothing; what snapshotDownload throws
 */
export async function modelFolder(path: string, options: SourceOptions = {}): Promise<string> {
  if (await isFolder(path)) return snapshotOf(path, options.revision)
  if (isHubId(path)) {
    const { snapshotDownload } = await import('./snapshot.js')
    return (await snapshotDownload(path, options)).folder
  }
  throw new ViaductError(
    'ERR_FILE_MISSING',
    'source',
    `expected a folder or a hub id like org/name, found nothing at ${path}`,
    { path },
  )
}
