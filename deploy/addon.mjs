// Building the addon: the flags that binding.gyp asks for, the headers of Node, configure and make. `node deploy/addon.mjs
// --gyp KIND` prints flags; `node deploy/addon.mjs` (npm run build:native) builds what changed, under the set-up's lock.
import { existsSync, mkdirSync, readdirSync, realpathSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, relative } from 'node:path'
import { pathToFileURL } from 'node:url'
import { writeInterface } from './interface.mjs'
import { compiler, DEPS, libraryFolders, provideLibraries, ROOT, readFound } from './libraries.mjs'
import { run, SetupError, which } from './shell.mjs'
import { filesBelow, hashOf, readStamps, withLock, writeStamp } from './stamp.mjs'

export const ADDON = join(ROOT, 'build/Release/viaduct.node')

/** Every C++ file of the addon; the CUDA plug-in has its own build. */
export function sources() {
  const folders = ['native', 'native/checks', 'native/cpu', 'native/io', 'native/binding']
  return folders.flatMap((folder) => {
    const absolute = join(ROOT, folder)
    if (!existsSync(absolute)) return []
    return readdirSync(absolute)
      .filter((n) => n.endsWith('.cc'))
      .sort()
      .map((n) => `${folder}/${n}`)
  })
}

function found() {
  return readFound() ?? []
}

/** What binding.gyp asks for, one value per line. */
export const gyp = {
  sources,
  defines: () =>
    found()
      .filter((l) => l.from)
      .map((l) => l.define),
  includes() {
    writeInterface()
    return found().some((l) => l.from === '.deps') ? ['native', '.', '.deps/usr/include'] : ['native', '.']
  },
  libraries() {
    // gyp takes one level of quotes off, make one `$`, the shell the other quotes. An installed package has its libraries
    // in lib/ beside the addon. DT_RPATH, not RUNPATH: it also holds for what libgloo and libdnnl need in turn.
    const rpath = (folder) => `"-Wl,-rpath,'${folder}'"`
    const flags = process.platform === 'linux' ? ['-Wl,--disable-new-dtags', rpath('$$ORIGIN/lib')] : []
    if (found().some((l) => l.from === '.deps')) {
      for (const folder of libraryFolders(DEPS).filter((f) => existsSync(f))) {
        flags.push(`-L${folder}`, rpath(`$$ORIGIN/../../${relative(ROOT, folder)}`))
        flags.push(`-Wl,-rpath-link,${folder}`)
      }
    }
    return [
      ...flags,
      ...found()
        .filter((l) => l.from && l.link)
        .map((l) => `-l${l.link}`),
    ]
  },
}

/** The folder that node-gyp takes as --nodedir: headers beside the Node binary, else those of node-api-headers. */
export function nodeHeaders() {
  const beside = dirname(dirname(realpathSync(process.execPath)))
  for (const prefix of [process.env.npm_config_nodedir, beside]) {
    if (
      prefix &&
      existsSync(join(prefix, 'include/node/node_api.h')) &&
      existsSync(join(prefix, 'include/node/common.gypi'))
    )
      return prefix
  }
  // A Node binary alone (the npm package `node`, a copied file): N-API's headers are all that the addon includes.
  const made = join(ROOT, '.viaduct/node')
  const include = join(made, 'include/node')
  rmSync(made, { recursive: true, force: true })
  mkdirSync(include, { recursive: true })
  const from = createRequire(join(ROOT, 'package.json'))('node-api-headers').include_dir
  for (const name of readdirSync(from)) symlinkSync(join(from, name), join(include, name))
  writeFileSync(
    join(include, 'config.gypi'),
    JSON.stringify({ target_defaults: {}, variables: { ...process.config.variables } }),
  )
  const common = {
    target_defaults: {
      default_configuration: 'Release',
      configurations: { Release: { cflags: ['-O3'] }, Debug: {} },
      cflags: ['-fPIC'],
    },
  }
  writeFileSync(join(include, 'common.gypi'), JSON.stringify(common))
  return made
}

/** What the addon is made of: changes when it must be built again. */
export function addonHash() {
  const files = filesBelow('native', (path) => !path.startsWith('native/cuda/'))
  return hashOf(
    [...files, 'binding.gyp', 'deploy/addon.mjs', 'deploy/interface.mjs', '.viaduct/libraries.json'],
    process.platform,
    process.arch,
    compiler(),
  )
}

/** Builds what changed. Returns a line on what was done. Output goes to `log` when given, else to the terminal. */
export function buildAddon({ log } = {}) {
  const list = sources()
  const entry = 'native/binding/module.cc'
  if (!list.includes(entry)) return `nothing to build yet: there is no ${entry}`
  writeInterface()
  const ccache = which('ccache')
  const env = { ...process.env }
  if (ccache && !compiler().includes('ccache')) {
    env.CXX = `ccache ${compiler()}`
    env.CC = `ccache ${process.env.CC || 'gcc'}`
  }
  // npm's own settings (a user's npmrc) must not choose other headers than those found here.
  const headers = nodeHeaders()
  for (const name of Object.keys(env)) if (/^npm_(package_)?config_(node_gyp_)?nodedir$/i.test(name)) delete env[name]
  const nodeGyp = join(ROOT, 'node_modules/node-gyp/bin/node-gyp.js')
  if (!existsSync(nodeGyp))
    throw new SetupError('[addon] expected node_modules/node-gyp, got none: run npm ci, or npm run setup')
  const shape = hashOf(['binding.gyp', 'deploy/addon.mjs', '.viaduct/libraries.json'], list, headers, env.CXX ?? '')
  const options = { cwd: ROOT, env, log }
  if (readStamps().configure !== shape || !existsSync(join(ROOT, 'build/Makefile'))) {
    run(process.execPath, [nodeGyp, 'configure', `--nodedir=${headers}`, '--loglevel=error'], {
      ...options,
      what: '[addon] configuring',
    })
    writeStamp('configure', shape)
  }
  const jobs = process.env.JOBS || '2'
  run(process.execPath, [nodeGyp, 'build', `--jobs=${jobs}`, `--nodedir=${headers}`, '--loglevel=error'], {
    ...options,
    what: '[addon] building',
  })
  if (!existsSync(ADDON))
    throw new SetupError(`[addon] expected ${relative(ROOT, ADDON)} after the build, got none: see the build's output`)
  return `${list.length} files compiled or kept${ccache ? ', with ccache' : ''}`
}

async function main() {
  const kind = process.argv[process.argv.indexOf('--gyp') + 1]
  if (process.argv.includes('--gyp')) {
    for (const value of gyp[kind]()) console.log(value)
    return
  }
  await withLock(() => {
    if (!readFound()) for (const line of provideLibraries()) console.log(line)
    const hash = addonHash()
    console.log(buildAddon())
    // Edited while it was built: then the next set-up builds again.
    if (existsSync(ADDON) && addonHash() === hash) writeStamp('addon', hash)
  })
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  main().catch((error) => {
    console.error(error instanceof SetupError ? error.message : error)
    process.exitCode = 1
  })
}
