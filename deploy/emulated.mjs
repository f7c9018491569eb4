// Builds the CUDA plug-in for tests: the sources of the kernels for the host's compiler, with an emulated GPU. Seconds, and
// nothing when nothing changed. `npm test` calls it; so do the tests that load the plug-in.
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { writeInterface } from './interface.mjs'
import { compiler, ROOT } from './libraries.mjs'
import { run, SetupError } from './shell.mjs'
import { withLock } from './stamp.mjs'

const OUT = 'build/emulated'
export const EMULATED = join(ROOT, OUT, 'libviaduct_cuda_emulated.so')

/** Builds what changed; a tree that deploy/gpuKit.mjs packed has it built, and perhaps no compiler. */
export async function buildEmulated() {
  if (existsSync(join(ROOT, 'packed.json')) && existsSync(EMULATED)) return
  await withLock(() => {
    writeInterface()
    const jobs = process.env.JOBS || '2'
    run('make', ['--silent', `-j${jobs}`, '-f', 'native/cuda/emulation/Makefile', `OUT=${OUT}`, `CXX=${compiler()}`], {
      cwd: ROOT,
      log: join(ROOT, '.viaduct/logs/emulated.log'),
      what: '[emulated] compiling',
    })
  })
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const begun = Date.now()
  buildEmulated().then(
    () =>
      console.log(`${OUT}/libviaduct_cuda_emulated.so is up to date (${((Date.now() - begun) / 1000).toFixed(1)} s)`),
    (error) => {
      console.error(error instanceof SetupError ? error.message : error)
      process.exitCode = 1
    },
  )
}
