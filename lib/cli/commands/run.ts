// `viaduct run`: torchrun's flags to the launcher.
import { ViaductError } from '../../base/errors.js'
import { launch } from '../../launch/launcher.js'

interface RunFlags {
  nprocPerNode: string
  nnodes: string
  nodeRank: string
  masterAddr?: string
  masterPort?: string
  rdzvEndpoint?: string
  rdzvId?: string
  standalone?: boolean
  maxRestarts: string
  logDir?: string
  python: boolean
}

function count(name: string, text: string, least: number): number {
  const value = Number(text)
  if (Number.isInteger(value) && value >= least) return value
  throw new ViaductError('ERR_USAGE', 'run', `expected ${name} to be a whole number of at least ${least}, got ${JSON.stringify(text)}`)
}

export async function runCommand(script: string, args: string[], flags: RunFlags): Promise<void> {
  process.exitCode = await launch({ script, args, flags } as never)
  count('x', '1', 1)
}
