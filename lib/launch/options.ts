// What a launch is told: torchrun's flags as values, with the defaults of its PET_ variables. Text from a command line becomes
// values here; nothing is started.
import { randomUUID } from 'node:crypto'
import { readdirSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { type EnvName, envInt, envText } from '../base/env.js'
import { ViaductError } from '../base/errors.js'

/** Options of `launch`, named as torchrun's flags. Values may be text, as they come from a command line. */
export interface LaunchOptions {
  /** A .ts, .mts, .js, .mjs or .cjs file; with `noPython` any program. */
  readonly script: string
  readonly args?: readonly string[]
  /** Ranks on this node: a number, `auto` (GPUs, else cores), `gpu` or `cpu`. Default 1. */
  readonly nprocPerNode?: number | string
  /** Nodes. `N:N` is taken too; a range is refused. Default 1. */
  readonly nnodes?: number | string
  /** Default: 0 for one node; by order of arrival where an endpoint is given. */
  readonly nodeRank?: number | string
  readonly masterAddr?: string
  readonly masterPort?: number | string
  /** `host:port` of the store; the launcher on that host keeps it. Instead of masterAddr and masterPort. */
  readonly rdzvEndpoint?: string
  /** Name of the job; launchers and ranks of another one are refused. Default: a random one on one node, else `none`. */
  readonly rdzvId?: string
  /** `c10d` or `static`; both mean the same here. */
  readonly rdzvBackend?: string
  /** One node with a free port, whatever the variables say. */
  readonly standalone?: boolean
  /** How often all ranks are started again after a failure. Default 0. */
  readonly maxRestarts?: number | string
  /** Taken for torchrun's sake: a death is noticed at once. */
  readonly monitorInterval?: number | string
  /** Run the program as it is, without Node. */
  readonly noPython?: boolean
  /** torchrun's -m; refused. */
  readonly module?: boolean
  /** Folder for `<job>/attempt_<n>/<local rank>/{stdout,stderr}.log`. */
  readonly logDir?: string
  /** Streams that go to files only: 0 none, 1 stdout, 2 stderr, 3 both, or `0:1,1:3` by local rank. */
  readonly redirects?: string
  /** Streams that go to files as well. Default: 3 with logDir. */
  readonly tee?: string
  /** Local ranks whose output is shown, e.g. `0,1`. Default: all. */
  readonly localRanksFilter?: string
  /** Time for ranks to end after a signal before they are killed, in s; at most 3 after a rank's failure. Default 30. */
  readonly shutdownTimeout?: number | string
  /** Time without a heartbeat after which a rank has failed, or another node is lost, in s; 0: never. Default 60. */
  readonly heartbeatTimeout?: number | string
  /** Put `[rank0] ` before each line. Default true. */
  readonly prefix?: boolean
  /** Further variables for the ranks. */
  readonly env?: Readonly<Record<string, string>>
  /** Time for all nodes to come, and to come back before a restart, in s. Default 600. */
  readonly joinTimeout?: number | string
  /** torchrun's way to say it: `join_timeout=SECONDS`. */
  readonly rdzvConf?: string
}

/** Options with everything decided but what the other nodes say. */
export interface LaunchPlan {
  readonly script: string
  readonly args: readonly string[]
  readonly noPython: boolean
  readonly localSize: number
  readonly nodes: number
  readonly nodeRank: number | null
  readonly masterAddr: string
  /** 0: a free one. */
  readonly masterPort: number
  readonly jobId: string
  readonly maxRestarts: number
  readonly logDir: string | null
  readonly redirects: readonly number[]
  readonly tee: readonly number[]
  readonly shown: readonly boolean[]
  readonly graceMs: number
  readonly silenceMs: number
  readonly joinMs: number
  readonly prefix: boolean
  readonly env: Readonly<Record<string, string>>
}

const defaultPort = 29500

function usage(message: string): ViaductError {
  return new ViaductError('ERR_USAGE', 'run', message)
}

function whole(flag: string, value: number | string, least: number): number {
  const number = typeof value === 'number' ? value : /^\s*\d+\s*$/.test(value) ? Number(value) : Number.NaN
  if (Number.isSafeInteger(number) && number >= least) return number
  throw usage(`expected ${flag} to be a whole number of at least ${least}, got ${JSON.stringify(value)}`)
}

/** A TCP port; 0: a free one. */
function portOf(flag: string, value: number | string): number {
  const port = whole(flag, value, 0)
  if (port <= 65_535) return port
  throw usage(`expected the port of ${flag} to be at most 65535, got ${value}`)
}

function seconds(flag: string, value: number | string): number {
  const number = Number(value)
  if (Number.isFinite(number) && number >= 0) return number * 1000
  throw usage(`expected ${flag} to be seconds, got ${JSON.stringify(value)}`)
}

/** GPUs that this process may use. */
export function visibleGpus(): number {
  const chosen = envText('CUDA_VISIBLE_DEVICES')
  if (chosen !== undefined) return chosen.split(',').filter((id) => id.trim() !== '' && id.trim() !== '-1').length
  try {
    return readdirSync('/proc/driver/nvidia/gpus').length
  } catch {
    return 0
  }
}

function countProcesses(value: number | string): number {
  if (value === 'cpu') return availableParallelism()
  if (value === 'auto') return visibleGpus() || availableParallelism()
  if (value === 'gpu') {
    const gpus = visibleGpus()
    if (gpus === 0) throw usage('expected GPUs for --nproc-per-node gpu, found none: give a number, or auto')
    return gpus
  }
  return whole('--nproc-per-node', value, 1)
}

function countNodes(value: number | string): number {
  if (typeof value === 'number') return whole('--nnodes', value, 1)
  const [least, most] = value.split(':')
  const count = whole('--nnodes', least ?? '', 1)
  if (most !== undefined && whole('--nnodes', most, 1) !== count) {
    throw usage(`expected --nnodes to be one number, got ${value}: the number of nodes does not change during a run`)
  }
  return count
}

/** `3` or `0:1,1:3` for each local rank: bit 1 stdout, bit 2 stderr. */
export function parseStreams(flag: string, text: string, localSize: number): number[] {
  const level = (part: string) => {
    if (/^[0-3]$/.test(part)) return Number(part)
    throw usage(`expected ${flag} to be 0, 1, 2, 3 or RANK:N,RANK:N, got ${JSON.stringify(text)}`)
  }
  if (!text.includes(':')) return new Array<number>(localSize).fill(level(text))
  const levels = new Array<number>(localSize).fill(0)
  for (const part of text.split(',')) {
    const [rank = '', value = ''] = part.split(':')
    const index = whole(flag, rank, 0)
    if (index < localSize) levels[index] = level(value)
  }
  return levels
}

function endpointOf(text: string): readonly [string, number] {
  const match = /^(?:\[([^\]]+)\]|([^:]+))(?::(\d+))?$/.exec(text)
  if (match === null) throw usage(`expected --rdzv-endpoint to be HOST:PORT, got ${JSON.stringify(text)}`)
  return [(match[1] ?? match[2]) as string, match[3] === undefined ? defaultPort : portOf('--rdzv-endpoint', match[3])]
}

/** The one setting of torchrun's --rdzv-conf that means something here. */
function joinTimeoutOf(conf: string): string | undefined {
  let found: string | undefined
  for (const part of conf.split(',').filter((text) => text.trim() !== '')) {
    const [name = '', value = ''] = part.split('=', 2).map((text) => text.trim())
    if (name !== 'join_timeout') throw usage(`expected --rdzv-conf join_timeout=SECONDS, got ${JSON.stringify(part)}`)
    found = value
  }
  return found
}

/**
 * Decides everything that this node can decide.
 * @throws ERR_USAGE for values that do not fit.
 */
export function planLaunch(options: LaunchOptions): LaunchPlan {
  if (options.module)
    throw usage('-m names a Python module, which Viaduct does not run: give a .ts or .js file, or --no-python PROGRAM')
  const text = (value: number | string | undefined, name: EnvName) => value ?? envText(name)
  const standalone = options.standalone === true
  const localSize = countProcesses(text(options.nprocPerNode, 'PET_NPROC_PER_NODE') ?? 1)
  const nodes = standalone ? 1 : countNodes(text(options.nnodes, 'PET_NNODES') ?? 1)
  const backend = options.rdzvBackend
  if (backend !== undefined && backend !== '' && !['c10d', 'static'].includes(backend)) {
    throw usage(`expected --rdzv-backend c10d or static, got ${backend}`)
  }
  const endpointText = standalone ? undefined : text(options.rdzvEndpoint, 'PET_RDZV_ENDPOINT')
  const endpoint = endpointText === undefined ? null : endpointOf(String(endpointText))
  const addr = standalone ? undefined : (options.masterAddr ?? envText('PET_MASTER_ADDR'))
  const port = standalone ? undefined : (options.masterPort ?? envInt('PET_MASTER_PORT'))
  const rank = standalone ? undefined : (options.nodeRank ?? envInt('PET_NODE_RANK'))
  let nodeRank = rank === undefined ? null : whole('--node-rank', rank, 0)
  if (nodeRank === null && (nodes === 1 || endpoint === null)) nodeRank = 0
  if (nodeRank !== null && nodeRank >= nodes) {
    throw usage(`expected --node-rank of 0 to ${nodes - 1}, got ${nodeRank}: see --nnodes`)
  }
  if (nodes > 1 && endpoint === null && addr === undefined) {
    throw usage(
      `expected --master-addr (or --rdzv-endpoint HOST:PORT) for ${nodes} nodes, got none: the address of node 0`,
    )
  }
  if (nodes > 1 && endpoint === null && rank === undefined) {
    throw usage(`expected --node-rank for ${nodes} nodes, got none: 0 on the first, 1 on the next`)
  }
  const everywhere = new Array<number>(localSize).fill(0)
  const levels = (flag: string, value: string | undefined) =>
    value === undefined ? everywhere : parseStreams(flag, value, localSize)
  const redirects = levels('--redirects', options.redirects)
  const teeText = options.tee ?? (options.logDir !== undefined && options.redirects === undefined ? '3' : undefined)
  const filter = options.localRanksFilter?.split(',').map((part) => whole('--local-ranks-filter', part, 0))
  return {
    script: options.script,
    args: options.args ?? [],
    noPython: options.noPython === true,
    localSize,
    nodes,
    nodeRank,
    masterAddr: endpoint?.[0] ?? addr ?? '127.0.0.1',
    masterPort: endpoint?.[1] ?? (port === undefined ? (nodes === 1 ? 0 : defaultPort) : portOf('--master-port', port)),
    jobId: options.rdzvId ?? (standalone ? undefined : envText('PET_RDZV_ID')) ?? (nodes === 1 ? randomUUID() : 'none'),
    maxRestarts: whole('--max-restarts', text(options.maxRestarts, 'PET_MAX_RESTARTS') ?? 0, 0),
    logDir: options.logDir ?? null,
    redirects,
    tee: levels('--tee', teeText),
    shown: everywhere.map((_, local) => filter === undefined || filter.includes(local)),
    graceMs: seconds('--shutdown-timeout', options.shutdownTimeout ?? 30),
    silenceMs: seconds('--heartbeat-timeout', options.heartbeatTimeout ?? 60),
    joinMs: seconds('--rdzv-conf join_timeout', joinTimeoutOf(options.rdzvConf ?? '') ?? options.joinTimeout ?? 600),
    prefix: options.prefix !== false,
    env: options.env ?? {},
  }
}
