// Runs the built command line as a user does: a process of its own, in a folder of its own, without variables of a launcher.
// `npm test` builds dist/ first. The folders that commands work on are made here too.
import { type ChildProcess, spawn } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { encodeHeader } from '../../lib/io/safetensorsHeader.js'
import { type HostTensor, llamaFixtures, readSafetensorsFile } from '../fixtures/safetensorsFile.js'

export const root = join(dirname(fileURLToPath(import.meta.url)), '../..')

/** The built command. */
export const viaductFile = join(root, 'dist/lib/cli/main.js')

/** How a command ended. */
export interface Ended {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
}

/** This process's variables without those that a launcher or a user may have set. */
export function plainEnvironment(): NodeJS.ProcessEnv {
  const foreign =
    /^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_|GROUP_|ROLE_|PET_|TORCHELASTIC_|SLURM_|OMPI_|PMI_|VIADUCT_|VITEST|NODE_OPTIONS)/
  return Object.fromEntries(Object.entries(process.env).filter(([name]) => !foreign.test(name)))
}

/** Starts any program; `ended` never rejects. */
export function start(
  program: string,
  args: readonly string[],
  cwd: string,
): { child: ChildProcess; ended: Promise<Ended> } {
  const child = spawn(program, args, { cwd, env: plainEnvironment(), stdio: ['ignore', 'pipe', 'pipe'] })
  const text = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr'] as const)
    child[name]?.setEncoding('utf8').on('data', (chunk) => (text[name] += chunk))
  const ended = new Promise<Ended>((done) => {
    child.on('error', (error) => done({ code: null, signal: null, stdout: '', stderr: String(error) }))
    child.on('close', (code, signal) => done({ code, signal, ...text }))
  })
  return { child, ended }
}

/** Starts `viaduct args` in a folder. */
export function startViaduct(cwd: string, ...args: string[]): { child: ChildProcess; ended: Promise<Ended> } {
  if (!existsSync(viaductFile)) throw new Error(`expected ${viaductFile}, found none: run npm run setup`)
  return start(process.execPath, [viaductFile, ...args], cwd)
}

/** Runs `viaduct args` in a folder to its end. */
export function viaduct(cwd: string, ...args: string[]): Promise<Ended> {
  return startViaduct(cwd, ...args).ended
}

/** Runs `viaduct args --json` and reads what it prints; fails with its errors when it does not end with `code`. */
export async function viaductJson<T>(cwd: string, args: readonly string[], code = 0): Promise<T> {
  const ended = await viaduct(cwd, ...args, '--json')
  if (ended.code !== code)
    throw new Error(`viaduct ${args.join(' ')}: exit code ${ended.code}, expected ${code}\n${ended.stderr}`)
  return JSON.parse(ended.stdout) as T
}

/** Copies config and weights of a Llama fixture to a folder; its expected tensors come back. */
export function copyFixture(name: string, folder: string): Map<string, HostTensor> {
  mkdirSync(folder, { recursive: true })
  for (const file of ['config.json', 'model.safetensors'])
    copyFileSync(join(llamaFixtures, name, file), join(folder, file))
  return readSafetensorsFile(join(llamaFixtures, name, 'expected.safetensors'))
}

/** Writes int64 tensors, by name, as a safetensors file. */
export function writeInputs(path: string, tensors: ReadonlyMap<string, HostTensor>): void {
  const plans = [...tensors].map(([name, { shape }]) => ({ name, dtype: 'int64' as const, shape }))
  const header = encodeHeader(plans)
  const bytes = Buffer.alloc(header.fileBytes)
  bytes.set(header.bytes)
  for (const [name, { data }] of tensors) {
    const { begin } = header.entries.get(name) as { begin: number }
    const whole = BigInt64Array.from(data, (value) => BigInt(value))
    bytes.set(new Uint8Array(whole.buffer), header.bytes.length + begin)
  }
  writeFileSync(path, bytes)
}
