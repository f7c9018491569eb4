// `node deploy/gpuKit.mjs --out FOLDER`: all that a machine with a GPU needs where there is neither Node nor a network: Node itself, the
// tree with its packages, addon and emulated GPU, in parts that can be carried one by one. deploy/kit/run.sh is what runs there.
// Options: --part-mib N; --plugin: the compiled plug-in, too (node deploy/cuda.mjs --architectures 90a makes it); --nccl FILE:
// libnccl.so.2 of 2.30 or newer, for several ranks on one GPU.
import { createHash } from 'node:crypto'
import {
  closeSync,
  copyFileSync,
  cpSync,
  existsSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readSync,
  realpathSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { ADDON } from './addon.mjs'
import { PLUGIN } from './cuda.mjs'
import { buildEmulated, EMULATED } from './emulated.mjs'
import { ROOT } from './libraries.mjs'
import { EVERYWHERE, needs } from './prebuild.mjs'
import { capture, run, SetupError, which } from './shell.mjs'

const MIB = 2 ** 20

/** Packages that nothing runs on the GPU machine: lint, format, types. */
const UNUSED = ['@biomejs', '@typescript', '@types', 'typescript', 'clang-format', '.cache', '.vite']

/** Where the parts of an archive of so many bytes begin and how long they are, none longer than `most`, all about alike. */
export function partsOf(bytes, most) {
  const count = Math.max(1, Math.ceil(bytes / most))
  return Array.from({ length: count }, (_, i) => {
    const offset = Math.floor((i * bytes) / count)
    return { offset, bytes: Math.floor(((i + 1) * bytes) / count) - offset }
  })
}

/** Cuts a file into parts, each in a folder of its own below `out`. Returns its entry of the manifest. */
export function cutArchive(file, name, out, most) {
  const source = openSync(file, 'r')
  try {
    const parts = partsOf(statSync(file).size, most).map(({ offset, bytes }, i) => {
      const data = Buffer.alloc(bytes)
      if (readSync(source, data, 0, bytes, offset) !== bytes)
        throw new SetupError(`[kit] expected ${bytes} bytes of ${file}, got fewer`)
      const path = `${name}-${i}/${name}.tar.xz.${i}`
      mkdirSync(join(out, dirname(path)), { recursive: true })
      writeFileSync(join(out, path), data)
      return { path, bytes, sha256: createHash('sha256').update(data).digest('hex') }
    })
    return { name, parts }
  } finally {
    closeSync(source)
  }
}

/** Makes room for a kit where one was before, or where nothing is. */
export function clearFolder(out) {
  const names = existsSync(out) ? readdirSync(out) : []
  const isKit = existsSync(join(out, 'start/manifest.json')) || names.every((name) => name === 'stage')
  if (!isKit)
    throw new SetupError(
      `[kit] expected ${out} to be new, empty or an earlier kit, got a folder with ${names[0]}: name another`,
    )
  rmSync(out, { recursive: true, force: true })
}

/** Writes what runs on the GPU machine, and the manifest of the archives, into `out`/start. */
export function writeStart(out, archives) {
  const start = join(out, 'start')
  mkdirSync(start, { recursive: true })
  for (const name of ['unpack.sh', 'run.sh']) copyFileSync(join(ROOT, 'deploy/kit', name), join(start, name))
  writeFileSync(join(start, 'manifest.json'), `${JSON.stringify({ archives }, null, 1)}\n`)
}

/** Packs a folder's content. */
export function pack(folder, file) {
  for (const program of ['tar', 'xz'])
    if (!which(program)) throw new SetupError(`[kit] expected the command ${program}, got none: install it`)
  const tar = ['--sort=name', '--owner=0', '--group=0', '--numeric-owner', '--format=gnu', '-C', folder, '-c', '.']
  const quoted = [...tar, file].map((word) => `'${word}'`)
  run('/bin/sh', ['-c', `tar ${quoted.slice(0, -1).join(' ')} | xz -T0 -6 > ${quoted.at(-1)}`], {
    what: '[kit] packing',
  })
}

function copy(from, to) {
  mkdirSync(dirname(to), { recursive: true })
  cpSync(from, to, { recursive: true, preserveTimestamps: true, verbatimSymlinks: true })
}

/** The files of the repository, less what was measured before. */
function copySources(tree) {
  const listed = capture('git', ['ls-files', '-z', '--cached', '--others', '--exclude-standard'], { cwd: ROOT })
  if (!listed.ok) throw new SetupError(`[kit] expected a clone, got: ${listed.err.trim()}`)
  const git = (...args) => capture('git', args, { cwd: ROOT }).out.trim()
  for (const path of listed.out.split('\0').filter(Boolean))
    if (existsSync(join(ROOT, path)) && !path.startsWith('bench/results/')) copy(join(ROOT, path), join(tree, path))
  const changed = git('status', '--porcelain', '--', 'lib', 'native', 'bench').length > 0
  writeFileSync(
    join(tree, 'packed.json'),
    `${JSON.stringify({ viaduct: git('rev-parse', '--short', 'HEAD'), changed })}\n`,
  )
}

function copyModules(tree) {
  const here = `${process.platform}-${process.arch}-gnu`
  cpSync(join(ROOT, 'node_modules'), join(tree, 'node_modules'), {
    recursive: true,
    preserveTimestamps: true,
    verbatimSymlinks: true,
    filter(path) {
      const [first = '', ...rest] = path.slice(join(ROOT, 'node_modules/').length).split('/')
      if (UNUSED.includes(first)) return false
      // Commands are started by their files; links of those that are not packed would point nowhere.
      if (first === '.bin') return lstatSync(path).isDirectory() || existsSync(path)
      return !(first === 'tokenizers' && rest.join('/').endsWith('.node') && !rest.join('/').includes(here))
    },
  })
  rmSync(join(tree, 'node_modules/.bin'), { recursive: true, force: true })
}

/** Addon and plug-ins of other builds do not work together: better to know before they are carried away. */
function checkBuilt(plugins) {
  const addon = createRequire(import.meta.url)(ADDON)
  addon.setErrorFactory((_code, _where, message) => new SetupError(`[kit] ${message}; npm run setup builds the addon`))
  for (const plugin of plugins) addon.pluginDevices(plugin)
}

/** What is built, with the libraries that another machine lacks. */
function copyBuilt(tree, plugin) {
  const release = join(tree, 'build/Release')
  copy(ADDON, join(release, 'viaduct.node'))
  for (const { name, path } of needs(ADDON).filter(({ name }) => !EVERYWHERE.test(name)))
    copy(realpathSync(path), join(release, 'lib', name))
  const emulated = join(tree, 'build/emulated/libviaduct_cuda_emulated.so')
  copy(EMULATED, emulated)
  if (plugin) copy(PLUGIN, join(tree, 'build/cuda/libviaduct_cuda.so'))
  copy(realpathSync(process.execPath), join(tree, '.node/bin/node'))
  const built = [join(release, 'viaduct.node'), emulated, join(tree, '.node/bin/node')]
  if (which('strip')) for (const file of built) capture('strip', ['--strip-debug', file])
}

function optionsOf(args) {
  const options = { partMib: 50, plugin: false }
  for (let i = 0; i < args.length; i++) {
    const value = () => {
      if (args[i + 1] === undefined) throw new SetupError(`[kit] expected a value behind ${args[i]}`)
      return args[++i]
    }
    if (args[i] === '--out') options.out = resolve(value())
    else if (args[i] === '--nccl') options.nccl = resolve(value())
    else if (args[i] === '--part-mib') options.partMib = Number(value())
    else if (args[i] === '--plugin') options.plugin = true
    else throw new SetupError(`[kit] expected --out FOLDER, --part-mib N, --plugin or --nccl FILE, got ${args[i]}`)
  }
  if (options.out === undefined) throw new SetupError('[kit] expected --out FOLDER')
  if (!(options.partMib > 0)) throw new SetupError('[kit] expected --part-mib above 0')
  return options
}

async function main() {
  const { out, nccl, partMib, plugin } = optionsOf(process.argv.slice(2))
  if (!existsSync(ADDON)) throw new SetupError('[kit] expected the built addon, got none: npm run setup')
  if (plugin && !existsSync(PLUGIN)) throw new SetupError(`[kit] expected ${PLUGIN}, got none: npm run build:cuda`)
  if (nccl !== undefined && !existsSync(nccl)) throw new SetupError(`[kit] expected ${nccl}, got no such file`)
  await buildEmulated()
  checkBuilt(plugin ? [EMULATED, PLUGIN] : [EMULATED])
  clearFolder(out)
  const stage = join(out, 'stage')
  const tree = join(stage, 'viaduct')
  copySources(tree)
  copyModules(tree)
  copyBuilt(tree, plugin)
  const archives = []
  const add = (name, folder) => {
    const file = join(stage, `${name}.tar.xz`)
    pack(folder, file)
    archives.push(cutArchive(file, name, out, partMib * MIB))
    const { parts } = archives.at(-1)
    console.log(`${name}: ${(statSync(file).size / MIB).toFixed(1)} MiB in ${parts.length} parts`)
  }
  add('viaduct', tree)
  if (nccl !== undefined) {
    copy(realpathSync(nccl), join(stage, 'nccl/.deps/cuda/nvidia/nccl/lib/libnccl.so.2'))
    add('nccl', join(stage, 'nccl'))
  }
  writeStart(out, archives)
  rmSync(stage, { recursive: true, force: true })
  console.log(`carry each of ${out}/*-N, then ${out}/start, and there: sh start/run.sh (docs/cuda.md)`)
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  main().catch((error) => {
    console.error(error instanceof SetupError ? error.message : error)
    process.exitCode = 1
  })
}
