// Where this package lies on disk, from its sources and from its built form alike.
import { existsSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { ViaductError } from './errors.js'

interface Manifest {
  readonly name: string
  readonly version: string
}

let found: { root: string; manifest: Manifest } | undefined

function find(): { root: string; manifest: Manifest } {
  let folder = dirname(fileURLToPath(import.meta.url))
  for (;;) {
    const file = join(folder, 'package.json')
    if (existsSync(file)) {
      const manifest = JSON.parse(readFileSync(file, 'utf8')) as Manifest
      if (manifest.name === 'viaduct') return { root: folder, manifest }
    }
    const parent = dirname(folder)
    if (parent === folder) break
    folder = parent
  }
  throw new ViaductError(
    'ERR_ADDON',
    'package',
    `expected the package's package.json above ${fileURLToPath(import.meta.url)}, found none: install the package again`,
  )
}

/** Absolute path of the package's folder. */
export function packageRoot(): string {
  found ??= find()
  return found.root
}

/** The package's version, e.g. `0.1.0`. */
export function packageVersion(): string {
  found ??= find()
  return found.manifest.version
}
