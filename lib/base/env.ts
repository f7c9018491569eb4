// Every environment variable that Viaduct reads, one row each, and the only place that reads them. Nothing is read when a
// module is imported: a getter reads at its call. Add a row to read another one.
import { ViaductError } from './errors.js'

interface EnvRow {
  readonly meaning: string
  /** What holds when the variable is not set, in words. */
  readonly unset: string
}

const rows = {
  VIADUCT_DEBUG_HANDLES: {
    meaning: '1: remember where tensors are made and freed; report leaks and say where a stale one was freed',
    unset: 'off',
  },
  VIADUCT_NUM_THREADS: { meaning: 'threads of the CPU kernels of one rank', unset: 'cores / local ranks' },
  VIADUCT_MEMORY_LIMIT: { meaning: 'most bytes of tensors on a device', unset: 'no limit' },
  OMP_NUM_THREADS: { meaning: 'threads of the CPU kernels, where VIADUCT_NUM_THREADS is not set', unset: 'see there' },
  RANK: { meaning: 'rank of this process, as torchrun sets it', unset: 'no launcher: one rank' },
  LOCAL_RANK: { meaning: 'rank on this node', unset: '0' },
  WORLD_SIZE: { meaning: 'number of ranks', unset: '1' },
  LOCAL_WORLD_SIZE: { meaning: 'number of ranks on this node', unset: '1' },
  MASTER_ADDR: { meaning: 'address of rank 0', unset: '127.0.0.1' },
  MASTER_PORT: { meaning: 'port of the rendezvous store', unset: 'chosen by the launcher' },
} as const satisfies Record<string, EnvRow>

/** Name of a declared variable. */
export type EnvName = keyof typeof rows

/** The table of all variables, for documentation and `doctor`. */
export const environment: Readonly<Record<EnvName, EnvRow>> = rows

/** The variable's text; undefined when it is not set or empty. */
export function envText(name: EnvName): string | undefined {
  const value = process.env[name]
  return value === undefined || value === '' ? undefined : value
}

/** True for 1, true, yes, on. */
export function envFlag(name: EnvName): boolean {
  return /^(1|true|yes|on)$/i.test(envText(name) ?? '')
}

/**
 * The variable as a whole number of 0 or more.
 * @throws ERR_USAGE when it is set to something else.
 */
export function envInt(name: EnvName): number | undefined {
  const text = envText(name)
  if (text === undefined) return undefined
  const value = Number(text)
  if (Number.isSafeInteger(value) && value >= 0 && /^\s*\d+\s*$/.test(text)) return value
  throw new ViaductError(
    'ERR_USAGE',
    'env',
    `expected ${name} to be a whole number, got ${JSON.stringify(text)}: correct or unset it`,
  )
}
