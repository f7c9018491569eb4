// `npm run setup`: checks the toolchain, brings libraries and packages, builds addon and TypeScript. Node built-ins only.
// Does only what changed since the last time (stamps in .viaduct/setup.json). Options: --force, --quiet, --install-system.
import { chmodSync, existsSync, readFileSync, rmSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { ADDON, addonHash, buildAddon } from './addon.mjs'
import { compiler, provideLibraries, ROOT, readFound } from './libraries.mjs'
import { capture, run, SetupError, Steps, which } from './shell.mjs'
import { filesBelow, hashOf, readStamps, withLock, writeStamp } from './stamp.mjs'

const FLOOR = [20, 19]

/** Throws with one line per missing tool and the command that brings it. Returns what was found. */
function checkToolchain() {
  const problems = []
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  if (major < FLOOR[0] || (major === FLOOR[0] && minor < FLOOR[1])) {
    problems.push(
      `Node: expected ${FLOOR.join('.')} or newer, got ${process.versions.node}: install one from https://nodejs.org`,
    )
  }
  const tools = [
    ['C++ compiler', compiler().split(' ').at(-1), 'g++', '--version'],
    ['make', 'make', 'make', '--version'],
    ['Python 3', 'python3', 'python3', '--version'],
  ]
  const versions = [`Node ${process.versions.node}`]
  for (const [title, program, debian, flag] of tools) {
    const asked = which(program) ? capture(program, [flag]) : undefined
    if (!asked?.ok)
      problems.push(
        `${title}: expected the command ${program}, got none: install it (Debian, Ubuntu: apt-get install ${debian}; Fedora: dnf install ${debian === 'g++' ? 'gcc-c++' : debian})`,
      )
    else
      versions.push(
        (asked.out || asked.err)
          .split('\n')[0]
          .trim()
          .replace(/ \(.*\)/, ''),
      )
  }
  if (problems.length > 0) throw new SetupError(`[set-up] the toolchain is not complete:\n  ${problems.join('\n  ')}`)
  return versions.join(', ')
}

function readJson(path) {
  try {
    return JSON.parse(readFileSync(join(ROOT, path), 'utf8'))
  } catch {
    return undefined
  }
}

/** Whether node_modules holds just what the lock file names: then a tree that somebody else installed is kept. */
function modulesMatchLock() {
  const wanted = readJson('package-lock.json')?.packages
  const have = readJson('node_modules/.package-lock.json')?.packages
  if (!wanted || !have) return false
  for (const [path, entry] of Object.entries(wanted)) {
    if (path === '') continue
    const there = have[path]
    if (!there ? !entry.optional && !entry.peer : there.version !== entry.version) return false
  }
  return Object.keys(have).every((path) => wanted[path])
}

function installModules() {
  if (modulesMatchLock()) return 'node_modules matches package-lock.json'
  const log = join(ROOT, '.viaduct/logs/npm.log')
  const options = { cwd: ROOT, log, what: '[set-up] npm ci' }
  // No package of ours needs its install script; npm's own `node-gyp rebuild` would build the addon without our flags.
  run('npm', ['ci', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error'], options)
  return 'installed from package-lock.json'
}

function modulesHash() {
  return existsSync(join(ROOT, 'node_modules/.package-lock.json'))
    ? hashOf(['package-lock.json', 'node_modules/.package-lock.json'])
    : undefined
}

const SCRIPT_FOLDERS = ['lib', 'recipes']

function scriptSources() {
  return SCRIPT_FOLDERS.flatMap((folder) => filesBelow(folder, (path) => path.endsWith('.ts')))
}

function scriptHash() {
  return hashOf([...scriptSources(), 'tsconfig.json', 'package.json', 'node_modules/typescript/package.json'])
}

// Emitted files whose source is gone would still be imported.
function dropOrphans() {
  let dropped = 0
  for (const folder of SCRIPT_FOLDERS) {
    for (const path of filesBelow(`dist/${folder}`)) {
      const source = path.slice('dist/'.length).replace(/(\.d\.ts|\.js)(\.map)?$/, '.ts')
      if (!existsSync(join(ROOT, source))) {
        rmSync(join(ROOT, path))
        dropped++
      }
    }
  }
  return dropped
}

const COMMAND = 'node_modules/.bin/viaduct'

// `npx viaduct` inside the repository runs what was built here, as it does where the package is installed.
function linkCommand() {
  const program = join(ROOT, 'dist/lib/cli/main.js')
  if (!existsSync(program)) return
  chmodSync(program, 0o755)
  rmSync(join(ROOT, COMMAND), { force: true })
  symlinkSync('../../dist/lib/cli/main.js', join(ROOT, COMMAND))
}

function buildScripts() {
  const count = scriptSources().length
  if (count === 0) return 'nothing to build yet: lib/ has no .ts file'
  const tsc = join(ROOT, 'node_modules/typescript/bin/tsc')
  run(process.execPath, [tsc, '-p', '.', '--pretty', 'false'], {
    cwd: ROOT,
    log: join(ROOT, '.viaduct/logs/tsc.log'),
    what: '[set-up] tsc',
  })
  const dropped = dropOrphans()
  linkCommand()
  return `${count} files into dist/${dropped > 0 ? `, ${dropped} old ones removed` : ''}`
}

/** The parts in order: when each is up to date, what it does. */
function parts(options) {
  const librariesHash = () =>
    hashOf(
      ['deploy/libraries.mjs', '.viaduct/libraries.json'],
      existsSync(join(ROOT, '.deps')),
      process.arch,
      compiler(),
    )
  return [
    {
      name: 'libraries',
      title: 'oneDNN, Gloo, Highway, xxHash',
      announce: 'looking for them on the machine and in .deps/',
      hash: librariesHash,
      there: () => readFound() !== undefined && !options.installSystem,
      work: () => provideLibraries(options).join('; '),
    },
    {
      name: 'modules',
      title: 'npm packages',
      announce: 'comparing node_modules with package-lock.json',
      hash: modulesHash,
      there: () => modulesHash() !== undefined,
      work: installModules,
    },
    {
      name: 'addon',
      title: 'addon',
      announce: 'compiling native/ (minutes the first time)',
      hash: addonHash,
      there: () => existsSync(ADDON),
      work: () => buildAddon({ log: join(ROOT, '.viaduct/logs/addon.log') }),
    },
    {
      name: 'scripts',
      title: 'TypeScript',
      announce: 'compiling lib/ and recipes/',
      hash: scriptHash,
      there: () => existsSync(join(ROOT, COMMAND)),
      work: buildScripts,
    },
  ]
}

function stalePart(part, options) {
  return options.force || !part.there() || readStamps()[part.name] !== part.hash()
}

async function main() {
  const flags = new Set(process.argv.slice(2))
  const known = ['--force', '--quiet', '--install-system', '--help']
  for (const flag of flags)
    if (!known.includes(flag)) throw new SetupError(`[set-up] expected one of ${known.join(' ')}, got ${flag}`)
  if (flags.has('--help')) return console.log(`node deploy/setup.mjs [${known.join('] [')}]`)
  const options = {
    force: flags.has('--force'),
    quiet: flags.has('--quiet'),
    installSystem: flags.has('--install-system'),
  }
  const begun = Date.now()
  if (!parts(options).some((part) => stalePart(part, options))) {
    if (!options.quiet) console.log(`set-up is up to date (${Date.now() - begun} ms)`)
    return
  }
  await withLock(async () => {
    const steps = new Steps(parts(options).length + 1, options.quiet)
    await steps.step('toolchain', checkToolchain)
    for (const part of parts(options)) {
      if (!stalePart(part, options)) {
        await steps.step(part.title, () => 'up to date')
        continue
      }
      writeStamp(part.name, undefined)
      const before = part.hash()
      await steps.step(part.title, part.work, part.announce)
      const after = part.hash()
      // A source edited during the build differs from what was built: no stamp, so that the next set-up builds again.
      const settled = ['libraries', 'modules'].includes(part.name) || before === after
      if (settled && part.there()) writeStamp(part.name, after)
    }
  })
  if (!options.quiet) console.log(`set-up done in ${((Date.now() - begun) / 1000).toFixed(1)} s`)
}

main().catch((error) => {
  console.error(error instanceof SetupError ? error.message : error)
  process.exitCode = 1
})
