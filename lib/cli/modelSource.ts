// The model that a command line names: fetched, where it has to be, with a bar of its own.
import { originOf } from '../io/hub/cacheLayout.js'
import { modelFolder } from '../io/hub/modelSource.js'
import { isAddress } from '../io/hub/remoteFolder.js'
import { isFirstRank } from './ranks.js'
import { byteProgress } from './terminal.js'

/** A model's folder, and the arguments by which the ranks that are started take the same commit. */
export interface FetchedModel {
  readonly folder: string
  readonly pin: readonly string[]
}

/** Brings a hub id here; a folder, or the address of one, is what it is. @throws what modelFolder throws */
export async function fetchModel(path: string, flags: { readonly revision?: string }): Promise<FetchedModel> {
  if (isAddress(path)) return { folder: path, pin: [] }
  const bar = byteProgress('downloading')
  const folder = await modelFolder(path, {
    ...(flags.revision === undefined ? {} : { revision: flags.revision }),
    ...(isFirstRank() ? { onDownload: bar.onProgress } : {}),
  }).finally(bar.stop)
  const origin = originOf(folder)
  return { folder, pin: origin === null || folder === path ? [] : ['--revision', origin.commit] }
}
