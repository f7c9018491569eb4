// `npm run check`: types, lint and format of TypeScript and C++, the house tests. Seconds; changes nothing.
// With --format it formats the C++ files instead (`npm run format`); --without-tests leaves the house tests out.
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { ROOT } from './libraries.mjs'
import { filesBelow } from './stamp.mjs'

const bin = (name) => join(ROOT, 'node_modules/.bin', name)
const cpp = () => filesBelow('native', (path) => /\.(cc|h|cu|cuh)$/.test(path))

/** Each check is a name, a program and arguments; all run, also when one fails. */
function checks() {
  return [
    ['types of lib and recipes', bin('tsc'), ['-p', '.', '--noEmit', '--pretty', 'false']],
    ['types of tests and examples', bin('tsc'), ['-p', 'test', '--pretty', 'false']],
    ['lint and format of TypeScript', bin('biome'), ['check', '--max-diagnostics=60', '.']],
    ['format of C++', bin('clang-format'), ['--dry-run', '--Werror', ...cpp()], cpp().length === 0],
    ['house rules', bin('vitest'), ['run', '--reporter=dot', 'test/house'], process.argv.includes('--without-tests')],
  ]
}

function run(program, args) {
  return new Promise((done) => {
    const child = spawn(program, args, { cwd: ROOT, stdio: ['ignore', 'pipe', 'pipe'] })
    let text = ''
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => (text += chunk))
    child.on('error', (error) => done({ ok: false, text: error.message }))
    child.on('close', (status) => done({ ok: status === 0, text }))
  })
}

async function main() {
  if (!existsSync(bin('tsc'))) {
    console.error('[check] expected node_modules, got none: run npm run setup')
    process.exitCode = 1
    return
  }
  if (process.argv.includes('--format')) {
    const { ok, text } = await run(bin('clang-format'), ['-i', ...cpp()])
    if (text) console.log(text.trimEnd())
    process.exitCode = ok ? 0 : 1
    return
  }
  for (const [name, program, args, skip] of checks()) {
    if (skip) continue
    const begun = Date.now()
    const { ok, text } = await run(program, args)
    if (!ok) console.log(text.trimEnd())
    console.log(`${ok ? 'ok    ' : 'FAILED'} ${name} (${((Date.now() - begun) / 1000).toFixed(1)} s)`)
    if (!ok) process.exitCode = 1
  }
}

await main()
