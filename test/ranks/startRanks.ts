// Ranks as real processes for tests: a store in the test's process stands for the launcher, so that no port is guessed.
import { type ChildProcess, spawn } from 'node:child_process'
import { native } from '../../lib/addon/load.js'

/** How a rank ended and what it said. */
export interface RankResult {
  readonly rank: number
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly out: string
  /** Milliseconds from the start of all to its end. */
  readonly ms: number
}

export interface Ranks {
  readonly children: readonly ChildProcess[]
  readonly results: Promise<RankResult[]>
}

let job = 0

/** Starts `script args` on ranks 0 to size - 1; `only` leaves some of them out. */
export function startRanks(
  size: number,
  script: string,
  args: readonly string[],
  options: { readonly env?: Record<string, string>; readonly only?: readonly number[] } = {},
): Ranks {
  const jobId = `test-${process.pid}-${job++}`
  const server = native.storeServer('127.0.0.1', 0, jobId)
  const begin = Date.now()
  const ranks = options.only ?? Array.from({ length: size }, (_, rank) => rank)
  const children = ranks.map((rank) =>
    spawn(process.execPath, ['--import', 'tsx', script, ...args], {
      env: {
        ...process.env,
        ...options.env,
        RANK: String(rank),
        WORLD_SIZE: String(size),
        LOCAL_RANK: String(rank),
        LOCAL_WORLD_SIZE: String(size),
        MASTER_ADDR: '127.0.0.1',
        MASTER_PORT: String(server.port),
        TORCHELASTIC_RUN_ID: jobId,
        VIADUCT_AGENT_STORE: '1',
        OMP_NUM_THREADS: '1',
      },
      stdio: ['ignore', 'pipe', 'pipe'],
    }),
  )
  const results = Promise.all(
    children.map(
      (child, index) =>
        new Promise<RankResult>((resolve) => {
          let out = ''
          const take = (chunk: Buffer) => {
            out += chunk.toString()
          }
          child.stdout?.on('data', take)
          child.stderr?.on('data', take)
          child.on('close', (code, signal) => {
            resolve({ rank: ranks[index] as number, code, signal, out, ms: Date.now() - begin })
          })
        }),
    ),
  ).finally(() => native.storeServerClose(server.id))
  return { children, results }
}

/** Runs `script args` on all ranks. @throws what a rank said when it did not end well. */
export async function runRanks(size: number, script: string, args: readonly string[]): Promise<void> {
  const results = await startRanks(size, script, args).results
  for (const { rank, code, signal, out } of results) {
    if (code !== 0) throw new Error(`rank ${rank} left with ${signal ?? code}: ${out}`)
  }
}
