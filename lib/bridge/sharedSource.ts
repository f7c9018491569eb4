// A model that several ranks open together: the first one fetches it, the others take the same commit.
import { onFirst, type Ranks } from '../checkpoint/ranks.js'
import { originOf } from '../io/hub/cacheLayout.js'
import { isHubId, modelFolder, type SourceOptions } from '../io/hub/modelSource.js'
import { isFolder } from '../io/paths.js'

/** The argument again, or the folder of a hub id, at the same commit on every rank. Collective. */
export async function sharedSource(ranks: Ranks, path: string, options: SourceOptions): Promise<string> {
  if (!isHubId(path) || ranks.size === 1) return path
  const folder = await onFirst(ranks, () => modelFolder(path, options))
  if (await isFolder(folder)) return folder
  const revision = originOf(folder)?.commit ?? options.revision
  return modelFolder(path, { ...options, ...(revision === undefined ? {} : { revision }) })
}
