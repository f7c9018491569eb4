// Compiles the addon's files for aarch64 with a cross compiler (Debian: g++-aarch64-linux-gnu); nothing is linked or run. Headers
// are those of the set-up: they hold no machine code. `node deploy/arm64.mjs` after the set-up.
import { execFile } from 'node:child_process'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { gyp, nodeHeaders, sources } from './addon.mjs'
import { ROOT } from './libraries.mjs'

const flags = [
  ...['-std=c++17', '-O1', '-fPIC', '-fopenmp', '-ffp-contract=off', '-Wall', '-Wextra', '-Werror'],
  ...['-Wno-unused-parameter', '-Wno-cast-function-type', '-Wno-maybe-uninitialized'],
  ...['NAPI_VERSION=9', 'NAPI_CPP_EXCEPTIONS', ...gyp.defines()].map((define) => `-D${define}`),
  `-I${createRequire(join(ROOT, 'package.json'))('node-addon-api').include_dir.replaceAll('"', '')}`,
  ...[join(nodeHeaders(), 'include/node'), ...gyp.includes()].map((folder) => `-I${folder}`),
]
const compile = promisify(execFile)
const left = sources()
const failed = []
async function work() {
  for (let file = left.shift(); file !== undefined; file = left.shift()) {
    try {
      await compile('aarch64-linux-gnu-g++', [...flags, '-c', file, '-o', '/dev/null'], { cwd: ROOT })
    } catch (error) {
      failed.push(file)
      console.error(error.stderr || error.message)
    }
  }
}
const total = left.length
await Promise.all([work(), work()])
console.log(`${total - failed.length} of ${total} files compile for aarch64`)
process.exitCode = failed.length > 0 ? 1 : 0
