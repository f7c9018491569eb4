// What a result has to say about where it was measured: machine, versions, commit. Nothing here measures.
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { availableParallelism, cpus, release, totalmem, type } from 'node:os'
import { join } from 'node:path'
import { packageRoot } from '../lib/base/packageRoot.js'

/** The machine of a result. */
export interface Machine {
  readonly cpu: string
  /** Vector instruction sets that matter here. */
  readonly instructions: readonly string[]
  readonly cores: number
  readonly memoryGb: number
  readonly kernel: string
}

/** The programs of a result. */
export interface Versions {
  readonly viaduct: string
  /** Files of the working tree differ from the commit. */
  readonly changed: boolean
  readonly node: string
  readonly python?: string
  readonly torch?: string
  readonly transformers?: string
}

/** Reads the machine's description from the system. */
export function describeMachine(): Machine {
  const interesting = ['avx2', 'fma', 'avx512f', 'avx512_bf16', 'amx_bf16', 'asimd', 'bf16']
  let flags: string[] = []
  try {
    const line = /^(?:flags|Features)\s*:\s*(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))
    flags = line?.[1]?.split(' ') ?? []
  } catch {
    // No such file on this system: the model's name has to do.
  }
  return {
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    instructions: interesting.filter((name) => flags.includes(name)),
    cores: availableParallelism(),
    memoryGb: Math.round(totalmem() / 2 ** 30),
    kernel: `${type()} ${release()}`,
  }
}

/** Commit and node; the peer adds its own. */
export function ownVersions(): Versions {
  const git = (...args: string[]) =>
    spawnSync('git', args, { cwd: packageRoot(), encoding: 'utf8' }).stdout?.trim() ?? ''
  const changed = git('status', '--porcelain', '--', 'lib', 'native', 'bench').length > 0
  const packed = packedFrom()
  if (packed !== null) return { ...packed, node: process.version }
  return { viaduct: git('rev-parse', '--short', 'HEAD') || 'no commit', changed, node: process.version }
}

/** In a tree that deploy/gpuKit.mjs packed: the commit that it was packed from. */
function packedFrom(): Pick<Versions, 'viaduct' | 'changed'> | null {
  const file = join(packageRoot(), 'packed.json')
  return existsSync(file) ? (JSON.parse(readFileSync(file, 'utf8')) as Pick<Versions, 'viaduct' | 'changed'>) : null
}
