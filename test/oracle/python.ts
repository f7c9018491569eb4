// The Python of the oracle tier: VIADUCT_ORACLE_PYTHON, else .viaduct/oracle/bin/python. Without one the tests are skipped and say so.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { root } from '../cli/commandLine.js'

const packages = ['torch', 'transformers', 'safetensors']
const candidates = [process.env['VIADUCT_ORACLE_PYTHON'], join(root, '.viaduct/oracle/bin/python')]

function find(): string | null {
  const file = candidates.find((candidate) => candidate !== undefined && existsSync(candidate))
  const how = `set VIADUCT_ORACLE_PYTHON, or make .viaduct/oracle: python3 -m venv .viaduct/oracle && .viaduct/oracle/bin/pip install ${packages.join(' ')}`
  if (file === undefined) {
    process.stdout.write(`oracle tests are skipped: no Python with ${packages.join(', ')}: ${how}\n`)
    return null
  }
  const missing = packages.filter(
    (name) =>
      spawnSync(file, ['-c', `import importlib.util as u, sys; sys.exit(u.find_spec('${name}') is None)`]).status !== 0,
  )
  if (missing.length === 0) return file
  process.stdout.write(`oracle tests are skipped: ${file} has no ${missing.join(', ')}: ${how}\n`)
  return null
}

/** The interpreter, or null. */
export const python = find()

/** torchrun beside the interpreter, or null. */
export const torchrun =
  python !== null && existsSync(join(dirname(python), 'torchrun')) ? join(dirname(python), 'torchrun') : null

/** Runs a Python script of this folder; its output. @throws with its errors. */
export function runPython(script: string, ...args: string[]): string {
  const { status, stdout, stderr } = spawnSync(python as string, [join(import.meta.dirname, script), ...args], {
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  })
  if (status !== 0) throw new Error(`${script} ${args.join(' ')}: ${status}\n${stdout}\n${stderr}`)
  return stdout
}
