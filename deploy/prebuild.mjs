// What an installed package carries (`npm pack` runs this): the built addon in prebuilds/PLATFORM-ARCH/ and, in lib/ beside
// it, the shared libraries that a plain machine lacks; the addon's rpath begins with $ORIGIN/lib. Linux with glibc only.
import { copyFileSync, existsSync, mkdirSync, realpathSync, rmSync, statSync } from 'node:fs'
import { basename, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { ADDON } from './addon.mjs'
import { ROOT } from './libraries.mjs'
import { capture, SetupError, which } from './shell.mjs'

/** What every Linux that can run Node has. */
export const EVERYWHERE = /^(linux-vdso|ld-linux\S*|libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s)\.so/

/** Shared libraries that `file` needs, directly or not: [{ name, path }]. Throws when one is not found. */
export function needs(file) {
  const { out } = capture('ldd', [file], { env: { ...process.env, LC_ALL: 'C' } })
  const missing = [...out.matchAll(/^\s*(\S+) => not found/gm)].map((match) => match[1])
  if (missing.length > 0)
    throw new SetupError(`[prebuild] expected ${missing.join(', ')} to be found, got none: run npm run setup`)
  return [...out.matchAll(/^\s*(\S+) => (\/\S+)/gm)].map((match) => ({ name: match[1], path: match[2] }))
}

function main() {
  if (!existsSync(ADDON)) throw new SetupError('[prebuild] expected the built addon, got none: run npm run setup')
  const folder = join(ROOT, 'prebuilds', `${process.platform}-${process.arch}`)
  rmSync(folder, { recursive: true, force: true })
  mkdirSync(join(folder, 'lib'), { recursive: true })
  const target = join(folder, 'viaduct.node')
  copyFileSync(ADDON, target)
  const libraries = needs(ADDON).filter(({ name }) => !EVERYWHERE.test(name))
  for (const { name, path } of libraries) copyFileSync(realpathSync(path), join(folder, 'lib', name))
  const files = [target, ...libraries.map(({ name }) => join(folder, 'lib', name))]
  if (which('strip')) for (const file of files) capture('strip', ['--strip-unneeded', file])
  const megabytes = files.reduce((sum, file) => sum + statSync(file).size, 0) / 1e6
  console.log(`${basename(folder)}: viaduct.node and ${libraries.length} libraries, ${megabytes.toFixed(0)} MB`)
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  try {
    main()
  } catch (error) {
    console.error(error instanceof SetupError ? error.message : error)
    process.exitCode = 1
  }
}
