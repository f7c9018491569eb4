// The ranks of a run: who this process is, the store at which the ranks meet, and the communicator of all. Axes and sizes are
// the mesh's. Importing reads no variable and opens nothing; a world of one needs no network.
import { native } from '../addon/load.js'
import { envFlag, envInt, envText } from '../base/env.js'
import { writeErrorFileWhenUncaught } from '../base/errorFile.js'
import { assert, ViaductError } from '../base/errors.js'
import type { Device } from '../tensor/device.js'
import { CommGroup } from './group.js'
import { startHeartbeat } from './heartbeat.js'
import { hostAddress, isLoopback } from './hostAddress.js'
import { checkWorld, detectWorld, type WorldFacts } from './worldFacts.js'

/** What `initDistributed` takes; what is left out is the launcher's. */
export interface DistributedOptions {
  /** This rank. With it, `worldSize` is needed too. */
  readonly rank?: number
  readonly worldSize?: number
  /** Rank on this host. Default: `rank`. */
  readonly localRank?: number
  /** Ranks on this host. Default: `worldSize`. */
  readonly localWorldSize?: number
  /** Address of rank 0's host. Default: 127.0.0.1. */
  readonly masterAddr?: string
  /** Port on which rank 0 keeps the store. Default: 29500. */
  readonly masterPort?: number
  /** For host values and tensors of the CPU; tensors of a GPU go through NCCL. */
  readonly backend?: 'gloo'
  /** For meeting, and for each later operation, in ms. Default: 600000. */
  readonly timeoutMs?: number
}

const defaultTimeoutMs = 600_000
const attemptMs = 2000
const patienceMs = 5000

// Worlds that this process has opened: equal on all ranks, as all open and leave them together.
let opened = 0

/** The ranks that run together. */
export class World {
  readonly rank: number
  readonly size: number
  readonly localRank: number
  readonly localSize: number
  readonly launcher: WorldFacts['launcher']
  /** All ranks. */
  readonly group: CommGroup
  readonly #parts = new Map<string, Promise<CommGroup>>()
  readonly #closers: (() => void)[]
  #disposed = false

  /** Made by `initDistributed`. */
  constructor(facts: WorldFacts, group: CommGroup, closers: (() => void)[]) {
    this.rank = facts.rank
    this.size = facts.size
    this.localRank = facts.localRank
    this.localSize = facts.localSize
    this.launcher = facts.launcher
    this.group = group
    this.#closers = closers
  }

  /**
   * Connects the ranks for tensors of a device, too: NCCL on a GPU. Every rank calls it, before parts are made, which then are
   * split from it. Without it each group connects at its first operation on the device. Returns at once.
   */
  useDevice(device: Device): void {
    if (this.size > 1 && device.kind !== 'cpu') native.connectDevice(this.group.comm, device.index)
  }

  /**
   * The group of this rank where `groups` cut the world into parts: every rank calls it with the same list, in the same order
   * of calls. Equal lists give the same group again; parts of one rank need no communicator.
   * @param channel - groups of another channel have a communicator, and with it an order of operations, of their own.
   */
  part(name: string, groups: readonly (readonly number[])[], channel = ''): Promise<CommGroup> {
    const key = channel + JSON.stringify(groups)
    const known = this.#parts.get(key)
    if (known !== undefined) return known
    const made = this.#split(name, groups)
    this.#parts.set(key, made)
    return made
  }

  async #split(name: string, groups: readonly (readonly number[])[]): Promise<CommGroup> {
    assert(!this.#disposed, 'the world was disposed')
    const colour = groups.findIndex((ranks) => ranks.includes(this.rank))
    const ranks = groups[colour] ?? [this.rank]
    const place = ranks.indexOf(this.rank)
    if (groups.every((part) => part.length <= 1)) return new CommGroup(name, 0, 1, 0, ranks)
    const comm = await native.splitComm(this.group.comm, colour, Math.max(0, place), name)
    if (comm !== 0) this.#closers.push(() => native.closeComm(comm))
    return new CommGroup(name, Math.max(0, place), ranks.length, ranks.length > 1 ? comm : 0, ranks)
  }

  /** Operations of this rank and, as soon as they notice, of its peers fail with ERR_COMM naming the reason. */
  abort(reason: string): void {
    if (this.#disposed || this.size === 1) return
    native.abortComm(this.group.comm, reason)
    for (const part of this.#parts.values()) {
      void part.then(
        (group) => {
          if (group.comm !== 0) native.abortComm(group.comm, reason)
        },
        () => {},
      )
    }
  }

  /** Leaves the ranks: closes groups, store and connections. Idempotent. Meshes of this world end with it. */
  async dispose(): Promise<void> {
    if (this.#disposed) return
    this.#disposed = true
    await Promise.allSettled(this.#parts.values())
    this.#parts.clear()
    for (const close of this.#closers.reverse()) close()
    if (current?.world === this) current = undefined
  }
}

interface OpenWorld {
  readonly key: string
  readonly opening: Promise<World>
  world: World | null
}

let current: OpenWorld | undefined

/**
 * Joins the ranks, once for the process: later calls give the same world. Without `rank` the launcher's variables count
 * (torchrun, srun, mpirun); without a launcher there is one rank and no network.
 * @throws ERR_USAGE for variables or options that contradict each other, ERR_TIMEOUT naming the ranks that did not come,
 *   ERR_UNSUPPORTED for more than one rank where the addon was built without Gloo.
 */
export function initDistributed(options: DistributedOptions = {}): Promise<World> {
  const { rank, worldSize, localRank, localWorldSize, masterAddr, masterPort } = options
  const identity = { rank, worldSize, localRank, localWorldSize, masterAddr, masterPort }
  const key = JSON.stringify(identity)
  if (current !== undefined) {
    if (rank === undefined || current.key === key) return current.opening
    return Promise.reject(
      new ViaductError(
        'ERR_USAGE',
        'world',
        `expected the options of the world that is open, got rank ${rank} of ${worldSize}: dispose it first`,
      ),
    )
  }
  const opening = open(options)
  const entry: OpenWorld = { key, opening, world: null }
  current = entry
  opening.then(
    (world) => {
      entry.world = world
    },
    () => {
      if (current === entry) current = undefined
    },
  )
  return opening
}

function factsOf(options: DistributedOptions): WorldFacts {
  if (options.backend !== undefined && options.backend !== 'gloo') {
    throw new ViaductError('ERR_UNSUPPORTED', 'world', `expected the backend gloo, got ${String(options.backend)}`)
  }
  if ((options.rank === undefined) !== (options.worldSize === undefined)) {
    throw new ViaductError('ERR_USAGE', 'world', 'expected rank and worldSize together, got one of them')
  }
  if (options.rank === undefined || options.worldSize === undefined) return detectWorld()
  const facts: WorldFacts = {
    launcher: 'explicit',
    rank: options.rank,
    size: options.worldSize,
    localRank: options.localRank ?? options.rank,
    localSize: options.localWorldSize ?? options.worldSize,
    masterAddr: options.masterAddr ?? '127.0.0.1',
    masterPort: options.masterPort ?? 29500,
    jobId: 'viaduct',
    restart: 0,
  }
  checkWorld(facts)
  return facts
}

/** Connects to a store, trying again until the time is up; each try ends soon, so that leaving the process never waits long. */
async function connectStore(
  kind: 'viaduct' | 'torch',
  host: string,
  port: number,
  jobId: string,
  deadline: number,
): Promise<number> {
  const begin = Date.now()
  for (;;) {
    const rest = deadline - Date.now()
    try {
      return await native.storeClient(kind, host, port, jobId, Math.max(1, Math.min(attemptMs, rest)))
    } catch (error) {
      const code = error instanceof ViaductError ? error.code : ''
      // The store of an earlier attempt, or of this process's last world, may still be closing.
      const soon = code === 'ERR_COMM' && Date.now() - begin < patienceMs
      if ((code !== 'ERR_TIMEOUT' && !soon) || rest <= attemptMs) throw error
      if (soon) await new Promise((resolve) => setTimeout(resolve, 50))
    }
  }
}

/** The store of the run; closers are added to `closers`. */
async function openStore(
  facts: WorldFacts,
  attempt: string,
  deadline: number,
  closers: (() => void)[],
): Promise<number> {
  const { masterAddr, masterPort, jobId } = facts
  const job = `${jobId}#${attempt}`
  const join = async (port: number, id: string) => {
    const store = await connectStore('viaduct', masterAddr, port, id, deadline)
    closers.push(() => native.storeClose(store))
    return store
  }
  const launched = facts.launcher === 'torchrun'
  if (launched && envFlag('VIADUCT_AGENT_STORE')) return await join(masterPort, jobId)

  const host = (port: number) => {
    const server = native.storeServer(isLoopback(masterAddr) ? masterAddr : '', port, job)
    closers.push(() => native.storeServerClose(server.id))
    return server.port
  }
  const portTaken = launched && envFlag('TORCHELASTIC_USE_AGENT_STORE')
  if (!portTaken) {
    if (facts.rank === 0) host(masterPort)
    return await join(masterPort, job)
  }
  const given = envInt('VIADUCT_MASTER_PORT')
  if (given !== undefined) {
    if (facts.rank === 0) host(given)
    return await join(given, job)
  }
  // torchrun's agent keeps the port: rank 0 takes a free one and tells the others through the agent's store.
  const agent = await connectStore('torch', masterAddr, masterPort, '', deadline)
  try {
    const key = `viaduct/${job}/port`
    if (facts.rank === 0) {
      const port = host(0)
      await native.storeSet(agent, key, new TextEncoder().encode(String(port)))
      return await join(port, job)
    }
    const port = Number(new TextDecoder().decode(await native.storeGet(agent, key, Math.max(1, deadline - Date.now()))))
    return await join(port, job)
  } finally {
    native.storeClose(agent)
  }
}

async function open(options: DistributedOptions): Promise<World> {
  const facts = factsOf(options)
  const timeoutMs = options.timeoutMs ?? defaultTimeoutMs
  const ranks = Array.from({ length: facts.size }, (_, i) => i)
  if (facts.size === 1) return new World(facts, new CommGroup('world', 0, 1, 0, ranks), [])
  writeErrorFileWhenUncaught()
  startHeartbeat()
  const attempt = `${facts.restart}.${opened++}`
  const closers: (() => void)[] = []
  try {
    const store = await openStore(facts, attempt, Date.now() + timeoutMs, closers)
    const address = hostAddress(facts, await native.storeAddress(store))
    const shared = envText('VIADUCT_TRANSPORT') !== 'gloo'
    const name = `world#${attempt}`
    const comm = await native.connectGloo(store, name, facts.rank, facts.size, address, timeoutMs, shared)
    closers.push(() => native.closeComm(comm))
    return new World(facts, new CommGroup('world', facts.rank, facts.size, comm, ranks), closers)
  } catch (error) {
    for (const close of closers.reverse()) close()
    throw error
  }
}
