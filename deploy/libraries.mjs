// The native libraries: found on the machine, else Debian's packages unpacked into .deps/ without root. Knows packages and
// compiler flags; does not build anything. One table, `LIBRARIES`, says what is wanted and how it is recognised.
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { capture, SetupError, which } from './shell.mjs'

export const ROOT = resolve(import.meta.dirname, '..')
export const DEPS = join(ROOT, '.deps')

/** `needed`: the addon cannot be built without. `without`: what is lost when an optional one is missing. */
export const LIBRARIES = [
  {
    name: 'oneDNN',
    package: 'libdnnl-dev',
    define: 'VIADUCT_HAVE_ONEDNN',
    link: 'dnnl',
    probe:
      '#include <oneapi/dnnl/dnnl.hpp>\nint main() { return dnnl::engine::get_count(dnnl::engine::kind::cpu) == 0; }',
    without: 'matmuls use the built-in kernel',
  },
  {
    name: 'Gloo',
    package: 'libgloo-dev',
    define: 'VIADUCT_HAVE_GLOO',
    link: 'gloo',
    probe:
      '#include <gloo/transport/tcp/device.h>\nint main() { return gloo::transport::tcp::CreateDevice("127.0.0.1") == nullptr; }',
    without: 'one rank only',
  },
  {
    name: 'Highway',
    package: 'libhwy-dev',
    define: 'VIADUCT_HAVE_HIGHWAY',
    link: 'hwy',
    probe: '#include <hwy/highway.h>\nint main() { return hwy::SupportedTargets() == 0; }',
    needed: true,
  },
  {
    name: 'xxHash',
    package: 'libxxhash-dev',
    define: 'VIADUCT_HAVE_XXHASH',
    probe: '#define XXH_INLINE_ALL\n#include <xxhash.h>\nint main() { return XXH3_64bits("", 0) == 0; }',
    needed: true,
  },
]

/** The C++ compiler's command, e.g. "g++". */
export function compiler() {
  return process.env.CXX || 'g++'
}

/** Debian's name of this architecture's library folder, e.g. x86_64-linux-gnu. */
export function triplet() {
  return capture(compiler().split(' ').at(-1), ['-dumpmachine']).out.trim() || 'x86_64-linux-gnu'
}

/** Library folders inside .deps, with the folder of this architecture first. */
export function libraryFolders(deps = DEPS) {
  return [join(deps, 'usr/lib', triplet()), join(deps, 'usr/lib')]
}

function probeFlags(deps) {
  if (!existsSync(deps)) return []
  const folders = libraryFolders(deps)
  return [
    `-I${join(deps, 'usr/include')}`,
    ...folders.flatMap((f) => [`-L${f}`, `-Wl,-rpath,${f}`, `-Wl,-rpath-link,${f}`]),
  ]
}

/** Compiles, links and runs the library's probe. Returns undefined when it works, else the compiler's message. */
function probe(library, deps, scratch) {
  const source = join(scratch, `${library.package}.cc`)
  const program = join(scratch, library.package)
  writeFileSync(source, `${library.probe}\n`)
  const link = library.link ? [`-l${library.link}`] : []
  const [driver, ...extra] = compiler().split(' ')
  const flags = ['-std=c++17', '-Wl,--disable-new-dtags', source, '-o', program, ...probeFlags(deps), ...link]
  const built = capture(driver, [...extra, ...flags])
  if (!built.ok) return built.err.trim() || 'the compiler could not be run'
  const ran = capture(program, [])
  return ran.ok ? undefined : ran.err.trim() || `the probe ended with ${ran.status}`
}

/** Which libraries work now: [{ library, from: 'system' | '.deps' | undefined, why }]. */
export function findLibraries(deps = DEPS) {
  const scratch = join(tmpdir(), `viaduct-probe-${process.pid}`)
  mkdirSync(scratch, { recursive: true })
  try {
    return LIBRARIES.map((library) => {
      const system = probe(library, '/nonexistent', scratch)
      if (system === undefined) return { library, from: 'system' }
      const why = existsSync(deps) ? probe(library, deps, scratch) : system
      return why === undefined ? { library, from: '.deps' } : { library, from: undefined, why }
    })
  } finally {
    rmSync(scratch, { recursive: true, force: true })
  }
}

// Packages that a machine with g++ has; unpacking another libc beside the system's would break the loader.
const BASE = /^(libc6|libc-|libgcc|libstdc\+\+|libgomp|libcrypt|gcc-|linux-libc|debconf|dpkg)/

// apt's own lists when they know the packages, else a private state folder that needs no root.
class Apt {
  constructor(work) {
    this.work = work
    // As root apt would drop to the user _apt, who may not write into the work folder.
    this.options = ['-o', 'APT::Sandbox::User=root', '-o', 'Debug::NoLocking=1', '-o', 'Acquire::Retries=2']
  }

  privateState() {
    const state = join(this.work, 'apt')
    for (const folder of ['lists/partial', 'cache/archives/partial'])
      mkdirSync(join(state, folder), { recursive: true })
    this.options.push('-o', `Dir::State=${state}`, '-o', `Dir::State::lists=${join(state, 'lists')}`)
    this.options.push('-o', `Dir::Cache=${join(state, 'cache')}`)
    this.options.push('-o', 'Dir::State::status=/var/lib/dpkg/status')
    // A source that cannot be reached makes this fail while the others are there: what counts is whether packages are known.
    return capture('apt-get', [...this.options, 'update'])
  }

  knows(names) {
    const { out } = capture('apt-cache', [...this.options, 'policy', ...names], {
      env: { ...process.env, LC_ALL: 'C' },
    })
    const known = out.split(/^(?=\S)/m).filter((block) => /Candidate: (?!\(none\))\S/.test(block))
    return known.length === names.length
  }

  /** Direct dependencies, the first of alternatives, real packages only. */
  dependencies(names) {
    const env = { ...process.env, LC_ALL: 'C' }
    const { out } = capture('apt-cache', [...this.options, 'depends', '-i', ...names], { env })
    const found = new Set()
    let alternative = false
    for (const line of out.split('\n')) {
      const match = /^ ([ |])(?:Pre)?Depends: (\S+)/.exec(line)
      if (!match) continue
      if (!alternative && !match[2].startsWith('<')) found.add(match[2].replace(/:any$/, ''))
      alternative = match[1] === '|'
    }
    return [...found]
  }

  /** What is wanted and all that it needs, less what every machine with a compiler has: .deps can be copied to another. */
  closure(roots) {
    const all = new Set(roots)
    let level = roots
    while (level.length > 0) {
      level = this.dependencies(level).filter((name) => !all.has(name) && !BASE.test(name))
      for (const name of level) all.add(name)
    }
    return [...all]
  }

  download(names, folder) {
    return capture('apt-get', [...this.options, 'download', ...names], { cwd: folder })
  }
}

/**
 * Brings Debian's packages into .deps/ without root. Returns the files' names. `.deps` is replaced as a whole by a rename.
 * Throws SetupError with what to do when the packages cannot be had.
 */
export function bringPackages(packages, deps = DEPS) {
  for (const program of ['apt-get', 'apt-cache', 'dpkg-deb']) {
    if (!which(program)) throw new SetupError(`${program} is not here, so Debian's packages cannot be unpacked`)
  }
  // Within the root, so that the rename at the end stays on one file system. Only the holder of the set-up's lock is here.
  const work = join(ROOT, '.viaduct/deps')
  rmSync(work, { recursive: true, force: true })
  const archives = join(work, 'archives')
  const tree = join(work, 'tree')
  mkdirSync(archives, { recursive: true })
  mkdirSync(tree)
  try {
    let apt = new Apt(work)
    let got
    let updated
    if (apt.knows(packages)) got = apt.download(apt.closure(packages), archives)
    if (!got?.ok) {
      apt = new Apt(work)
      updated = apt.privateState()
      if (!apt.knows(packages)) {
        const why = updated.err.trim().split('\n').slice(-3).join('\n')
        throw new SetupError(`apt does not know ${packages.join(', ')}${why ? `:\n${why}` : ''}`)
      }
      got = apt.download(apt.closure(packages), archives)
    }
    if (!got.ok) throw new SetupError(`apt-get download failed:\n${got.err.trim()}`)
    const files = readdirSync(archives)
      .filter((name) => name.endsWith('.deb'))
      .sort()
    for (const file of files) {
      const unpacked = capture('dpkg-deb', ['-x', join(archives, file), tree])
      if (!unpacked.ok) throw new SetupError(`dpkg-deb -x ${file} failed: ${unpacked.err.trim()}`)
    }
    joinLibraryFolders(tree)
    const listing = files.map((name) => decodeURIComponent(name))
    writeFileSync(join(tree, 'packages.json'), `${JSON.stringify(listing, null, 2)}\n`)
    if (existsSync(join(deps, 'cuda'))) renameSync(join(deps, 'cuda'), join(tree, 'cuda')) // deploy/cuda.mjs brought it
    rmSync(deps, { recursive: true, force: true })
    renameSync(tree, deps)
    return listing
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
}

// Debian 12 still ships some libraries under /lib: one folder is enough for one rpath.
function joinLibraryFolders(tree) {
  const from = join(tree, 'lib', triplet())
  if (!existsSync(from)) return
  const to = join(tree, 'usr/lib', triplet())
  mkdirSync(to, { recursive: true })
  for (const name of readdirSync(from)) renameSync(join(from, name), join(to, name))
  rmSync(join(tree, 'lib'), { recursive: true, force: true })
}

/** Shared libraries that the loader does not find for a library in .deps: the names of the missing ones. */
export function unresolved(deps = DEPS) {
  const missing = new Set()
  const folders = libraryFolders(deps).filter((f) => existsSync(f))
  const env = { ...process.env, LC_ALL: 'C', LD_LIBRARY_PATH: folders.join(':') }
  for (const folder of folders) {
    for (const name of readdirSync(folder).filter((n) => /^lib(dnnl|gloo|hwy)\.so/.test(n))) {
      for (const match of capture('ldd', [join(folder, name)], { env }).out.matchAll(/^\s*(\S+) => not found/gm))
        missing.add(match[1])
    }
  }
  return [...missing]
}

/** What set-up found, as binding.gyp needs it; undefined before the first set-up. */
export function readFound() {
  const file = join(ROOT, '.viaduct/libraries.json')
  return existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')) : undefined
}

/** Finds the libraries, bringing what is missing, and writes .viaduct/libraries.json. Returns the lines to show. */
export function provideLibraries({ installSystem = false } = {}) {
  let found = findLibraries()
  const lacking = () => found.filter((f) => f.from === undefined)
  let problem
  if (lacking().length > 0) {
    // .deps is replaced as a whole, so what it already provides is fetched again with the rest.
    const packages = found.filter((f) => f.from !== 'system').map((f) => f.library.package)
    try {
      if (installSystem) installWithApt(packages)
      else bringPackages(packages)
    } catch (error) {
      if (!(error instanceof SetupError)) throw error
      problem = error.message
    }
    found = findLibraries()
  }
  const missing = lacking()
  const needed = missing.filter((f) => f.library.needed)
  if (needed.length > 0) {
    const names = needed.map((f) => f.library.name).join(' and ')
    const packages = missing.map((f) => f.library.package).join(' ')
    throw new SetupError(
      `[set-up] expected ${names} on the machine or in .deps/, got neither: install the packages ${packages} (apt, as root) ` +
        `or copy a .deps/ folder from another machine with the same system\n${problem ?? needed[0].why}`,
    )
  }
  const summary = found.map(({ library, from }) => ({
    name: library.name,
    define: library.define,
    link: library.link,
    from: from ?? null,
  }))
  mkdirSync(join(ROOT, '.viaduct'), { recursive: true })
  const text = `${JSON.stringify(summary, null, 2)}\n`
  const file = join(ROOT, '.viaduct/libraries.json')
  if (!existsSync(file) || readFileSync(file, 'utf8') !== text) writeFileSync(file, text)
  const lines = found.map(
    ({ library, from }) =>
      `${library.name}: ${from ?? `missing, so ${library.without} (npm run setup -- --force looks again)`}`,
  )
  if (problem) lines.push(`(${problem.split('\n')[0]})`)
  const open = unresolved()
  if (open.length > 0) lines.push(`unresolved: ${open.join(', ')}`)
  return lines
}

function installWithApt(packages) {
  const sudo = process.getuid?.() === 0 ? [] : ['sudo']
  const [program, ...args] = [...sudo, 'apt-get', 'install', '-y', '--no-install-recommends', ...packages]
  const result = capture(program, args, { stdio: ['inherit', 'inherit', 'pipe'] })
  if (!result.ok) throw new SetupError(`apt-get install failed: ${result.err.trim()}`)
}
