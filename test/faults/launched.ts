// The launcher as a process of its own for the tests of this folder: its output, its end, and who is left of its ranks.
import { type ChildProcess, spawn } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import type { LaunchOptions } from '../../lib/launch/launcher.js'

const driver = join(import.meta.dirname, 'launchDriver.ts')

/** A launcher that runs. */
export interface Launched {
  readonly child: ChildProcess
  readonly text: () => string
  /** Waits until the output holds this. */
  until(pattern: RegExp): Promise<RegExpExecArray>
  readonly ended: Promise<{ code: number | null; out: string; err: string }>
}

/** Starts the launcher with these options. */
export function start(options: Partial<LaunchOptions>, env: Record<string, string> = {}): Launched {
  return startCommand(process.execPath, ['--import', 'tsx', driver, JSON.stringify(options)], {
    ...process.env,
    ...env,
  })
}

/** Starts any command line that launches ranks. */
export function startCommand(
  program: string,
  args: readonly string[],
  env: NodeJS.ProcessEnv,
  cwd = process.cwd(),
): Launched {
  const child = spawn(program, args, { env, cwd, stdio: ['ignore', 'pipe', 'pipe'] })
  let out = ''
  let err = ''
  child.stdout?.on('data', (chunk: Buffer) => {
    out += chunk.toString()
  })
  child.stderr?.on('data', (chunk: Buffer) => {
    err += chunk.toString()
  })
  const ended = new Promise<{ code: number | null; out: string; err: string }>((resolve) => {
    child.on('close', (code) => resolve({ code, out, err }))
  })
  const until = async (pattern: RegExp) => {
    for (const end = Date.now() + 60_000; Date.now() < end; ) {
      const match = pattern.exec(out + err)
      if (match !== null) return match
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    throw new Error(`never came: ${pattern} in\n${out}${err}`)
  }
  return { child, text: () => out + err, until, ended }
}

/** `code` as a program of every rank; it starts in no time. */
export const program = (code: string, more: Partial<LaunchOptions> = {}): Partial<LaunchOptions> => ({
  script: process.execPath,
  args: ['-e', code],
  noPython: true,
  ...more,
})

/** Whether a process is there. */
export function alive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch {
    return false
  }
}

/** Those of the processes that are still there after so long. */
export async function gone(pids: readonly number[], ms: number): Promise<number[]> {
  const end = Date.now() + ms
  while (pids.some(alive) && Date.now() < end) await new Promise((resolve) => setTimeout(resolve, 20))
  return pids.filter(alive)
}

export const pidsIn = (text: string) => [...text.matchAll(/pid=(\d+)/g)].map((match) => Number(match[1]))

const given = new Set<number>()

/** A port of 127.0.0.1 that nobody has, another one at each call. */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = await new Promise<number>((resolve) => {
      const server = createServer().listen(0, '127.0.0.1', () => {
        const { port } = server.address() as { port: number }
        server.close(() => resolve(port))
      })
    })
    if (given.has(port)) continue
    given.add(port)
    return port
  }
}

/** Processes that were started with this text in a variable of their environment. */
export function processesWith(variable: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .filter((pid) => {
      try {
        return readFileSync(`/proc/${pid}/environ`, 'utf8').split('\0').includes(variable)
      } catch {
        return false
      }
    })
    .map(Number)
}

/** Those that are left when their launcher has ended; the shell that watched it may be a moment behind. */
export async function leftWith(variable: string): Promise<number[]> {
  const end = Date.now() + 2000
  for (;;) {
    const left = processesWith(variable)
    if (left.length === 0 || Date.now() > end) return left
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}
