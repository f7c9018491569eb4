// Finds and loads the native addon; the only file that does. `native` loads it at the first use of one of its functions, so
// that importing the package costs nothing and works without an addon.
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { isErrorCode, ViaductError } from '../base/errors.js'
import { packageRoot } from '../base/packageRoot.js'
import type { Addon } from './functions.js'

let loaded: Addon | undefined

/** Where the addon may lie, best first: what the set-up built here, else the one that came with the package. */
export function addonCandidates(): readonly string[] {
  const root = packageRoot()
  const platform = `${process.platform}-${process.arch}`
  return [join(root, 'build', 'Release', 'viaduct.node'), join(root, 'prebuilds', platform, 'viaduct.node')]
}

/**
 * The addon, loaded once a thread.
 * @throws ERR_ADDON when there is none or it does not load.
 */
export function loadAddon(): Addon {
  if (loaded !== undefined) return loaded
  const file = addonCandidates().find((candidate) => existsSync(candidate))
  if (file === undefined) {
    throw new ViaductError(
      'ERR_ADDON',
      'addon',
      `expected build/Release/viaduct.node in ${packageRoot()}, found none: run \`node deploy/setup.mjs\` there`,
    )
  }
  let addon: Addon
  try {
    addon = createRequire(import.meta.url)(file) as Addon
  } catch (error) {
    throw new ViaductError(
      'ERR_ADDON',
      'addon',
      `expected ${file} to load, got "${(error as Error).message}": run \`node deploy/setup.mjs\` to build it for this machine`,
      { file },
      { cause: error },
    )
  }
  addon.setErrorFactory(
    (code: string, where: string, message: string) =>
      new ViaductError(isErrorCode(code) ? code : 'ERR_NATIVE', where, message),
  )
  loaded = addon
  return addon
}

const onFirstUse = new Proxy(Object.create(null) as object, {
  get(_target, name) {
    if (loaded !== undefined || typeof name !== 'string') return undefined
    const addon = loadAddon()
    Object.assign(native, addon)
    return addon[name as keyof Addon]
  },
})

/** The addon's functions. The first use loads it. @throws ERR_ADDON as loadAddon. */
export const native: Addon = Object.create(onFirstUse) as Addon
