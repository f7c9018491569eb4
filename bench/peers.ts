// The programs that we are compared with, and how each is started: PyTorch as it comes, and tuned so that memory is kept and laid on
// huge pages. Which commands a peer runs stands in peer.py.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { native } from '../lib/addon/load.js'
import { packageRoot } from '../lib/base/packageRoot.js'
import { ProcessSide, RankSides, type Side } from './side.js'

/** A peer: its name in tables and what it is given. */
export interface PeerKind {
  readonly name: 'as it comes' | 'tuned'
  /** Training goes through torch.compile. */
  readonly compile: boolean
  readonly env: Readonly<Record<string, string>>
}

const kept = String(16 * 2 ** 30)

/** As a user gets it, and as an expert would set it up. */
export const peerKinds: readonly PeerKind[] = [
  { name: 'as it comes', compile: false, env: {} },
  {
    name: 'tuned',
    compile: true,
    env: {
      MALLOC_MMAP_THRESHOLD_: kept,
      MALLOC_TRIM_THRESHOLD_: kept,
      MALLOC_TOP_PAD_: String(256 * 2 ** 20),
      THP_MEM_ALLOC_ENABLE: '1',
    },
  },
]

/**
 * The interpreter that has PyTorch and Transformers.
 * @param given - from the command line; else VIADUCT_BENCH_PYTHON, else the environment that the message tells how to make.
 */
export function findPython(given: string | undefined): string {
  const own = join(packageRoot(), '.viaduct/bench/bin/python')
  const python = given ?? process.env['VIADUCT_BENCH_PYTHON'] ?? own
  const wanted = 'import torch, transformers, safetensors'
  const found = python.includes('/') ? existsSync(python) : true
  const result = found ? spawnSync(python, ['-c', wanted], { encoding: 'utf8' }) : null
  if (result?.status === 0) return python
  const why =
    result === null ? 'there is no such file' : (result.stderr?.trim().split('\n').at(-1) ?? result.error?.message)
  throw new Error(
    `expected a Python with torch, transformers and safetensors at ${python}, got: ${why}. Make one, once:\n` +
      `  python3 -m venv .viaduct/bench\n  .viaduct/bench/bin/pip install torch transformers safetensors\n` +
      'or name another with --python PATH or VIADUCT_BENCH_PYTHON.',
  )
}

/** Starts a peer with that many threads. */
export function startPeer(kind: PeerKind, python: string, threads: number): Side {
  const env = { ...kind.env, PEER_THREADS: String(threads), OMP_NUM_THREADS: String(threads) }
  return new ProcessSide(`PyTorch ${kind.name}`, python, [join(packageRoot(), 'bench/peer.py')], env)
}

function startScript(env: Readonly<Record<string, string>>): Side {
  return new ProcessSide('Viaduct', process.execPath, ['--import', 'tsx', join(packageRoot(), 'bench/ours.ts')], env)
}

/**
 * Starts our side with that many threads, in one process or as the ranks of a world, which share the threads.
 * @param env - more variables.
 */
export function startOurs(threads: number, processes = 1, env: Readonly<Record<string, string>> = {}): Side {
  if (processes === 1) return startScript({ ...env, VIADUCT_NUM_THREADS: String(threads) })
  const jobId = `bench-${process.pid}`
  const store = native.storeServer('127.0.0.1', 0, jobId)
  const ranks = Array.from({ length: processes }, (_, rank) =>
    startScript({
      ...env,
      VIADUCT_NUM_THREADS: String(Math.max(1, Math.floor(threads / processes))),
      RANK: String(rank),
      WORLD_SIZE: String(processes),
      LOCAL_RANK: String(rank),
      LOCAL_WORLD_SIZE: String(processes),
      MASTER_ADDR: '127.0.0.1',
      MASTER_PORT: String(store.port),
      TORCHELASTIC_RUN_ID: jobId,
      VIADUCT_AGENT_STORE: '1',
    }),
  )
  return new RankSides('Viaduct', ranks, () => native.storeServerClose(store.id))
}
