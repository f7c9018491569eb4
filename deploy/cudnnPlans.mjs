// Builds test/cuda/cudnn_plans.cc, which makes cuDNN's plans of attention for GPUs that are not here, and a driver library that
// stands in for NVIDIA's. For test/cuda/cudnnPlans.test.ts; needs the toolkit of `npm run build:cuda`, no GPU.
import { existsSync, mkdirSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { findToolkit } from './cuda.mjs'
import { compiler, DEPS, ROOT } from './libraries.mjs'
import { capture, run } from './shell.mjs'
import { withLock } from './stamp.mjs'

const OUT = join(ROOT, 'build/cudnnPlans')
const SOURCES = [
  'test/cuda/cudnn_plans.cc',
  'native/cuda/attention_cudnn.cc',
  'native/cuda/attention_cut.cc',
  'native/cuda/cudnn_library.cc',
  'native/cuda/libraries.cc',
  'native/tensor.cc',
]

/**
 * Builds both, and returns a function that gives the program's answers to lines of input; undefined where no toolkit is.
 */
export async function buildCudnnPlans() {
  const toolkit = findToolkit()
  if (toolkit === undefined) return undefined
  const [program, ...before] = compiler().split(' ')
  const flags = ['-std=c++17', '-O1', '-Wall', '-Wextra', '-Werror', '-Wno-unused-parameter', '-fvisibility=hidden']
  const includes = toolkit.includes.flatMap((folder) => ['-isystem', folder])
  const compile = (args, name) =>
    run(program ?? '', [...before, ...args], {
      cwd: ROOT,
      log: join(ROOT, `.viaduct/logs/cudnnPlans-${name}.log`),
      what: `[cudnnPlans] compiling ${name}`,
    })
  await withLock(() => {
    mkdirSync(OUT, { recursive: true })
    const objects = SOURCES.map((source) => {
      const object = join(OUT, `${source.replaceAll('/', '-')}.o`)
      compile([...flags, '-I.', '-Inative', ...includes, '-c', source, '-o', object], source.replaceAll('/', '-'))
      return object
    })
    const libraries = [join(toolkit.lib, 'libcudart_static.a'), '-ldl', '-lpthread', '-lrt']
    compile([...objects, ...libraries, '-o', join(OUT, 'cudnn_plans')], 'cudnn_plans')
    const standIn = ['-fPIC', '-shared', '-Wl,-soname,libcuda.so.1', 'test/cuda/driver_stand_in.cc']
    compile([...standIn, '-o', join(OUT, 'libcuda.so.1')], 'libcuda.so.1')
  })
  const wheels = join(DEPS, 'cuda/nvidia')
  const brought = existsSync(wheels) ? readdirSync(wheels).map((name) => join(wheels, name, 'lib')) : []
  const folders = [...brought, toolkit.lib].filter((folder) => existsSync(folder))
  return (lines) => {
    const paths = [OUT, ...folders, process.env.LD_LIBRARY_PATH ?? ''].filter((path) => path !== '')
    const result = capture(join(OUT, 'cudnn_plans'), folders, {
      input: `${lines.join('\n')}\n`,
      env: { ...process.env, LD_LIBRARY_PATH: paths.join(':') },
    })
    if (!result.ok) throw new Error(`cudnn_plans ended with ${result.status}: ${result.err}`)
    return result.out.trimEnd().split('\n')
  }
}
