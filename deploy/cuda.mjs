// `npm run build:cuda`: the CUDA plug-in, build/cuda/libviaduct_cuda.so, with cmake-js. The toolkit is the machine's (nvcc of
// 12.8 or newer on the PATH or below CUDA_HOME), else NVIDIA's Python wheels, unpacked into .deps/cuda/ without root. No GPU is
// needed. Does nothing when nothing changed. Options: --architectures 90a (a list, for a quicker build), --wheels, --force.
import { existsSync, mkdirSync, readdirSync, realpathSync, renameSync, rmSync, symlinkSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { writeInterface } from './interface.mjs'
import { compiler, DEPS, ROOT } from './libraries.mjs'
import { capture, run, SetupError, which } from './shell.mjs'
import { filesBelow, hashOf, readStamps, withLock, writeStamp } from './stamp.mjs'

const OUT = 'build/cuda'
export const PLUGIN = join(ROOT, OUT, 'libviaduct_cuda.so')
const WHEELS = join(DEPS, 'cuda')

/** Ampere, Hopper, Blackwell. */
const ARCHITECTURES = ['80', '90a', '100']

// One minor version of the toolkit: drivers from 580 on run what it makes.
const PACKAGES = [
  'nvidia-cuda-nvcc==13.0.88',
  'nvidia-nvvm==13.0.88',
  'nvidia-cuda-crt==13.0.88',
  'nvidia-cuda-cccl==13.0.85',
  'nvidia-cuda-runtime==13.0.96',
  'nvidia-cuda-nvrtc==13.0.88',
  'nvidia-cublas==13.1.0.3',
  'nvidia-cudnn-cu13==9.19.0.56',
  'nvidia-cudnn-frontend==1.32.0',
  'nvidia-nccl-cu13==2.28.9',
]

// Headers that the sources include, and folders below the wheels where they lie.
const HEADERS = ['cublasLt.h', 'cudnn.h', 'cudnn_frontend.h', 'nccl.h', 'nvrtc.h']
const WHEEL_INCLUDES = ['nvidia/cu13/include', 'nvidia/cudnn/include', 'nvidia/nccl/include', 'include']

/** The toolkit of the machine: { nvcc, lib, includes }, or undefined when it is not there, too old, or lacks a header. */
function machineToolkit() {
  const candidates = [process.env.CUDA_HOME, process.env.CUDA_PATH]
    .filter(Boolean)
    .map((home) => join(home, 'bin/nvcc'))
    .concat(which('nvcc') ?? [], '/usr/local/cuda/bin/nvcc')
  for (const candidate of candidates) {
    if (!existsSync(candidate)) continue
    const version = /release (\d+)\.(\d+)/.exec(capture(candidate, ['--version']).out)
    if (!version || Number(version[1]) * 100 + Number(version[2]) < 1208) continue
    const nvcc = realpathSync(candidate)
    const home = dirname(dirname(nvcc))
    const lib = ['lib64', 'lib', 'targets/x86_64-linux/lib']
      .map((name) => join(home, name))
      .find((folder) => existsSync(join(folder, 'libcudart_static.a')))
    const folders = [join(home, 'include'), '/usr/include', ...WHEEL_INCLUDES.map((name) => join(WHEELS, name))]
    const includes = HEADERS.map((header) => folders.find((folder) => existsSync(join(folder, header))))
    if (!lib || includes.includes(undefined)) continue
    return { nvcc, lib, includes: [...new Set(includes)].filter((folder) => folder !== '/usr/include') }
  }
  return undefined
}

function wheelToolkit() {
  const home = join(WHEELS, 'nvidia/cu13')
  const nvcc = join(home, 'bin/nvcc')
  const includes = WHEEL_INCLUDES.map((name) => join(WHEELS, name))
  const whole = existsSync(nvcc) && HEADERS.every((header) => includes.some((f) => existsSync(join(f, header))))
  return whole ? { nvcc, lib: join(home, 'lib'), includes } : undefined
}

/** The toolkit that is here, undefined when there is none. */
export function findToolkit() {
  return machineToolkit() ?? wheelToolkit()
}

/** Brings the wheels into .deps/cuda/, replaced as a whole. */
function bringWheels() {
  const work = join(ROOT, '.viaduct/cuda')
  rmSync(work, { recursive: true, force: true })
  mkdirSync(work, { recursive: true })
  const log = join(ROOT, '.viaduct/logs/pip.log')
  const pip = [
    '-m',
    'pip',
    'install',
    '--no-deps',
    '--no-compile',
    '--only-binary=:all:',
    '--disable-pip-version-check',
  ]
  run('python3', [...pip, '--quiet', '--target', join(work, 'tree'), ...PACKAGES], {
    log,
    what: "[cuda] bringing NVIDIA's wheels with pip (a machine without network: copy .deps/cuda/ from another)",
  })
  rmSync(join(work, 'tree/cudnn'), { recursive: true, force: true }) // cudnn-frontend's Python part
  symlinkSync('lib', join(work, 'tree/nvidia/cu13/lib64')) // where nvcc looks
  mkdirSync(DEPS, { recursive: true })
  rmSync(WHEELS, { recursive: true, force: true })
  renameSync(join(work, 'tree'), WHEELS)
  rmSync(work, { recursive: true, force: true })
}

/** The program cmake, from the machine or a wheel. */
function cmake() {
  const found = which('cmake')
  if (found) return found
  const target = join(WHEELS, 'cmake')
  if (!existsSync(join(target, 'bin/cmake'))) {
    run('python3', ['-m', 'pip', 'install', '--quiet', '--no-deps', '--target', target, 'cmake==4.4.4'], {
      log: join(ROOT, '.viaduct/logs/pip.log'),
      what: '[cuda] bringing cmake with pip',
    })
  }
  return join(target, 'cmake/data/bin/cmake')
}

/** What the plug-in is made of. */
function pluginHash(architectures) {
  const files = filesBelow('native', (path) => !/^native\/(cpu|binding|io|cuda\/emulation)\//.test(path))
  return hashOf([...files, 'deploy/cuda.mjs'], architectures, process.arch, compiler())
}

function build(toolkit, architectures, force) {
  const bin = join(ROOT, 'node_modules/cmake-js/bin/cmake-js')
  if (!existsSync(bin)) throw new SetupError('[cuda] expected node_modules/cmake-js, got none: run npm run setup')
  writeInterface()
  const values = {
    CMAKE_CUDA_COMPILER: toolkit.nvcc,
    CMAKE_CUDA_HOST_COMPILER: which(compiler().split(' ').at(-1)) ?? 'g++',
    VIADUCT_ROOT: ROOT,
    VIADUCT_CUDA_LIB: toolkit.lib,
    VIADUCT_CUDA_INCLUDES: toolkit.includes.join(';'),
    VIADUCT_CUDA_ARCHITECTURES: architectures.join(';'),
    CMAKE_LIBRARY_OUTPUT_DIRECTORY: join(ROOT, OUT),
  }
  if (which('ccache'))
    Object.assign(values, { CMAKE_CUDA_COMPILER_LAUNCHER: 'ccache', CMAKE_CXX_COMPILER_LAUNCHER: 'ccache' })
  const jobs = process.env.JOBS || String(availableParallelism())
  const shape = hashOf(['native/cuda/CMakeLists.txt', 'deploy/cuda.mjs'], values)
  const common = ['-d', join(ROOT, 'native/cuda'), '-O', join(ROOT, OUT), '-c', cmake(), '-p', jobs, '-l', 'error']
  const step = (what, command, more = []) =>
    run(process.execPath, [bin, command, ...common, ...more], {
      cwd: ROOT,
      log: join(ROOT, `.viaduct/logs/cuda-${command}.log`),
      what,
    })
  const options = Object.entries(values).map(([name, value]) => `--CD${name}=${value}`)
  if (force) rmSync(join(ROOT, OUT), { recursive: true, force: true })
  if (readStamps().cudaConfigure !== shape || !existsSync(join(ROOT, OUT, 'Makefile'))) {
    rmSync(join(ROOT, OUT, 'CMakeCache.txt'), { force: true })
    step('[cuda] configuring', 'configure', options)
    writeStamp('cudaConfigure', shape)
  }
  step('[cuda] compiling', 'build', options)
  if (!existsSync(PLUGIN)) throw new SetupError(`[cuda] expected ${PLUGIN} after the build, got none`)
}

async function main() {
  const args = process.argv.slice(2)
  const at = args.indexOf('--architectures')
  const architectures = at < 0 ? ARCHITECTURES : (args[at + 1] ?? '').split(',').filter(Boolean)
  const force = args.includes('--force')
  if (process.platform !== 'linux') throw new SetupError(`[cuda] expected Linux, got ${process.platform}`)
  if (architectures.length === 0) throw new SetupError('[cuda] expected --architectures 80,90a,100 or fewer of them')
  const hash = pluginHash(architectures)
  if (!force && readStamps().cuda === hash && existsSync(PLUGIN)) return console.log('CUDA plug-in is up to date')
  await withLock(() => {
    const begun = Date.now()
    const seconds = () => `${((Date.now() - begun) / 1000).toFixed(1)} s`
    let toolkit = (args.includes('--wheels') ? undefined : machineToolkit()) ?? wheelToolkit()
    if (!toolkit) {
      console.log("no nvcc of 12.8 or newer with cuBLAS, cuDNN and NCCL is here: bringing NVIDIA's wheels (1.2 GB) …")
      bringWheels()
      toolkit = wheelToolkit()
      if (!toolkit) throw new SetupError(`[cuda] expected nvcc in ${WHEELS}, got ${readdirSync(WHEELS).join(', ')}`)
      console.log(`wheels are in .deps/cuda (${seconds()})`)
    }
    console.log(`compiling native/cuda with ${toolkit.nvcc} for ${architectures.join(', ')} …`)
    writeStamp('cuda', undefined)
    build(toolkit, architectures, force)
    if (pluginHash(architectures) === hash) writeStamp('cuda', hash)
    console.log(`${OUT}/libviaduct_cuda.so is built (${seconds()})`)
  })
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  main().catch((error) => {
    console.error(error instanceof SetupError ? error.message : error)
    process.exitCode = 1
  })
}
