// What the addon and a device plug-in must share to work together: a hash of the headers between them, and of the compiler.
// Written to .viaduct/interface.h, which native/plugin.cc and the plug-in's plugin.cc include.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { compiler, ROOT } from './libraries.mjs'
import { capture } from './shell.mjs'
import { hashOf } from './stamp.mjs'

const HEADERS = ['backend', 'comm', 'errors', 'plugin', 'stream', 'tensor'].map((name) => `native/${name}.h`)

/** Writes the header when its content changed. Returns the hash. */
export function writeInterface() {
  const version = capture(compiler().split(' ').at(-1), ['-dumpfullversion']).out.trim()
  const hash = hashOf(HEADERS, version)
  const text = `// Made by deploy/interface.mjs.\n#define VIADUCT_INTERFACE "${hash}"\n`
  const file = join(ROOT, '.viaduct/interface.h')
  if (!existsSync(file) || readFileSync(file, 'utf8') !== text) {
    mkdirSync(join(ROOT, '.viaduct'), { recursive: true })
    writeFileSync(file, text)
  }
  return hash
}
