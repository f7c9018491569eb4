// Who this process is among the ranks, as launchers tell it: torchrun and `viaduct run`, then srun, then mpirun. Facts only;
// nothing is connected here. Reads the environment when it is called.
import { type EnvName, envInt, envText } from '../base/env.js'
import { ViaductError } from '../base/errors.js'

/** What a launcher says. */
export interface WorldFacts {
  readonly launcher: 'none' | 'torchrun' | 'slurm' | 'openmpi' | 'pmi' | 'explicit'
  readonly rank: number
  readonly size: number
  readonly localRank: number
  readonly localSize: number
  readonly masterAddr: string
  /** Where the store is or will be. */
  readonly masterPort: number
  /** Name of the job and of the attempt: ranks of another one are refused. */
  readonly jobId: string
  readonly restart: number
}

const defaultPort = 29500

/** First host of a Slurm list such as `n[01-03,7],m4`: `n01`. */
export function firstSlurmHost(list: string): string {
  const bracket = list.indexOf('[')
  const comma = list.indexOf(',')
  if (bracket < 0 || (comma >= 0 && comma < bracket)) return comma < 0 ? list : list.slice(0, comma)
  const end = list.indexOf(']', bracket)
  const first = (list.slice(bracket + 1, end < 0 ? undefined : end).split(/[,-]/)[0] ?? '').trim()
  const suffix = end < 0 ? '' : (list.slice(end + 1).split(',')[0] ?? '')
  return list.slice(0, bracket) + first + suffix
}

/** Ranks on a node of Slurm's list of counts: `8(x2),4` and node 2 give 4. */
export function slurmTasksOnNode(list: string, node: number): number | undefined {
  let at = 0
  for (const part of list.split(',')) {
    const match = /^\s*(\d+)(?:\(x(\d+)\))?\s*$/.exec(part)
    if (match === null) return undefined
    at += Number(match[2] ?? 1)
    if (node < at) return Number(match[1])
  }
  return undefined
}

function usage(message: string): ViaductError {
  return new ViaductError('ERR_USAGE', 'world', message)
}

/** Both or none of two variables. */
function pair(first: EnvName, second: EnvName): readonly [number, number] | null {
  const [a, b] = [envInt(first), envInt(second)]
  if (a === undefined && b === undefined) return null
  if (a === undefined || b === undefined) {
    const [set, missing] = a === undefined ? [second, first] : [first, second]
    throw usage(`expected ${first} and ${second}, got only ${set}: set ${missing} too, or unset ${set}`)
  }
  return [a, b]
}

function torchrun(): WorldFacts | null {
  const ranks = pair('RANK', 'WORLD_SIZE')
  if (ranks === null) return null
  const [rank, size] = ranks
  const restart = envInt('TORCHELASTIC_RESTART_COUNT') ?? 0
  return {
    launcher: 'torchrun',
    rank,
    size,
    localRank: envInt('LOCAL_RANK') ?? 0,
    localSize: envInt('LOCAL_WORLD_SIZE') ?? 1,
    masterAddr: envText('MASTER_ADDR') ?? '127.0.0.1',
    masterPort: envInt('MASTER_PORT') ?? defaultPort,
    jobId: envText('TORCHELASTIC_RUN_ID') ?? 'viaduct',
    restart,
  }
}

function slurm(): WorldFacts | null {
  // A batch script has SLURM_NTASKS as well; only what srun starts is a rank.
  if (envText('SLURM_STEP_ID') === undefined) return null
  const ranks = pair('SLURM_PROCID', 'SLURM_NTASKS')
  if (ranks === null) return null
  const [rank, size] = ranks
  const node = envInt('SLURM_NODEID') ?? 0
  const counts = envText('SLURM_TASKS_PER_NODE')
  const list = envText('SLURM_JOB_NODELIST')
  const job = envInt('SLURM_JOB_ID')
  return {
    launcher: 'slurm',
    rank,
    size,
    localRank: envInt('SLURM_LOCALID') ?? 0,
    localSize:
      (counts === undefined ? undefined : slurmTasksOnNode(counts, node)) ?? envInt('SLURM_NTASKS_PER_NODE') ?? 1,
    masterAddr: envText('MASTER_ADDR') ?? (list === undefined ? '127.0.0.1' : firstSlurmHost(list)),
    masterPort: envInt('MASTER_PORT') ?? (job === undefined ? defaultPort : 10000 + (job % 50000)),
    jobId: `slurm-${job ?? 0}.${envText('SLURM_STEP_ID')}`,
    restart: envInt('SLURM_RESTART_COUNT') ?? 0,
  }
}

function mpi(
  launcher: 'openmpi' | 'pmi',
  names: readonly [EnvName, EnvName],
  localRanks: readonly EnvName[],
  localSizes: readonly EnvName[],
): WorldFacts | null {
  const ranks = pair(...names)
  if (ranks === null) return null
  const [rank, size] = ranks
  const firstOf = (candidates: readonly EnvName[]) =>
    candidates.map((name) => envInt(name)).find((n) => n !== undefined)
  const localSize = firstOf(localSizes) ?? 1
  const address = envText('MASTER_ADDR')
  if (address === undefined && size > 1 && localSize < size) {
    throw usage(
      `expected MASTER_ADDR for ${size} ranks on several hosts, got none: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT, HOST where rank 0 runs`,
    )
  }
  return {
    launcher,
    rank,
    size,
    localRank: firstOf(localRanks) ?? 0,
    localSize,
    masterAddr: address ?? '127.0.0.1',
    masterPort: envInt('MASTER_PORT') ?? defaultPort,
    jobId: launcher,
    restart: 0,
  }
}

const alone: WorldFacts = {
  launcher: 'none',
  rank: 0,
  size: 1,
  localRank: 0,
  localSize: 1,
  masterAddr: '127.0.0.1',
  masterPort: defaultPort,
  jobId: 'viaduct',
  restart: 0,
}

/**
 * The facts of the launcher that started this process; one rank where there is none. Order: torchrun's variables, srun's,
 * Open MPI's, other PMI launchers'.
 * @throws ERR_USAGE when a launcher's variables contradict each other.
 */
export function detectWorld(): WorldFacts {
  const facts =
    torchrun() ??
    slurm() ??
    mpi(
      'openmpi',
      ['OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'],
      ['OMPI_COMM_WORLD_LOCAL_RANK'],
      ['OMPI_COMM_WORLD_LOCAL_SIZE'],
    ) ??
    mpi(
      'pmi',
      ['PMI_RANK', 'PMI_SIZE'],
      ['MPI_LOCALRANKID', 'MV2_COMM_WORLD_LOCAL_RANK'],
      ['MPI_LOCALNRANKS', 'MV2_COMM_WORLD_LOCAL_SIZE'],
    ) ??
    alone
  checkWorld(facts)
  return facts
}

/** @throws ERR_USAGE when rank and size do not fit together. */
export function checkWorld({ rank, size, localRank, localSize }: WorldFacts): void {
  if (!(Number.isInteger(size) && size >= 1)) throw usage(`expected a world size of at least 1, got ${size}`)
  if (!(Number.isInteger(rank) && rank >= 0 && rank < size)) {
    throw usage(`expected a rank of 0 to ${size - 1}, got ${rank}: see RANK and WORLD_SIZE`)
  }
  if (!(localRank >= 0 && localRank < localSize)) {
    throw usage(`expected a local rank of 0 to ${localSize - 1}, got ${localRank}: see LOCAL_RANK and LOCAL_WORLD_SIZE`)
  }
}
