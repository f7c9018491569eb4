// The launchers of a job, one a node: who is which, how many ranks each has, and how an attempt ends for all. Node 0 keeps the
// store on the master port; the ranks meet there too.
import { hostname, networkInterfaces } from 'node:os'
import { native } from '../addon/load.js'
import { ViaductError } from '../base/errors.js'
import type { LaunchPlan } from './options.js'

/** How an attempt ended, told by the first node that knows. */
export interface AttemptEnd {
  readonly kind: 'done' | 'failed' | 'signal'
  readonly node: number
  /** Of the launcher. */
  readonly exitCode: number
  /** One line, for the other nodes. */
  readonly summary: string
}

const encode = (value: unknown) => new TextEncoder().encode(JSON.stringify(value))
const decode = <T>(bytes: Uint8Array) => JSON.parse(new TextDecoder().decode(bytes)) as T

const long = 30 * 24 * 3600 * 1000
const attemptMs = 2000
const leaveMs = 5000

/** Whether an address is this machine's, as far as it can tell without asking. */
function isHere(address: string): boolean {
  if (address === 'localhost' || address === '::1' || /^127\./.test(address) || address === hostname()) return true
  return Object.values(networkInterfaces()).some((list) => list?.some((entry) => entry.address === address))
}

export class Nodes {
  private constructor(
    readonly rank: number,
    readonly count: number,
    /** Ranks of the nodes before this one. */
    readonly firstRank: number,
    readonly worldSize: number,
    readonly port: number,
    private readonly store: number,
    private readonly server: number | null,
  ) {}

  /** Meets the other launchers. @throws ERR_TIMEOUT naming the nodes that did not come, ERR_USAGE for a node rank given twice. */
  static async join(plan: LaunchPlan): Promise<Nodes> {
    const { masterAddr, masterPort, jobId } = plan
    const loopback = /^(localhost|::1|127\..*)$/.test(masterAddr)
    const host = () => native.storeServer(loopback ? masterAddr : '', masterPort, jobId)
    let server: { readonly id: number; readonly port: number } | null = null
    if (plan.nodeRank === 0) server = host()
    else if (plan.nodeRank === null && isHere(masterAddr)) {
      try {
        server = host()
      } catch {
        // Another launcher of this host was first.
      }
    }
    const port = server?.port ?? masterPort
    const deadline = Date.now() + plan.joinMs
    let store = 0
    try {
      store = await connect(masterAddr, port, jobId, deadline)
      const rank = plan.nodeRank ?? (server !== null ? 0 : await native.storeAdd(store, 'nodes/arrived', 1))
      if (rank >= plan.nodes || (await native.storeAdd(store, `nodes/${rank}/claims`, 1)) > 1) {
        throw new ViaductError(
          'ERR_USAGE',
          'run',
          `expected ${plan.nodes} launchers, one for each node rank, got another one of rank ${rank}`,
        )
      }
      await native.storeSet(store, `nodes/${rank}/ranks`, encode(plan.localSize))
      const sizes: number[] = []
      for (let node = 0; node < plan.nodes; node++) {
        try {
          sizes.push(decode(await native.storeGet(store, `nodes/${node}/ranks`, Math.max(1, deadline - Date.now()))))
        } catch (error) {
          if (!(error instanceof ViaductError) || error.code !== 'ERR_TIMEOUT') throw error
          throw new ViaductError(
            'ERR_TIMEOUT',
            'run',
            `expected ${plan.nodes} nodes within ${plan.joinMs / 1000} s, node ${node} did not come: start its launcher`,
          )
        }
      }
      const sum = (part: readonly number[]) => part.reduce((total, n) => total + n, 0)
      return new Nodes(rank, plan.nodes, sum(sizes.slice(0, rank)), sum(sizes), port, store, server?.id ?? null)
    } catch (error) {
      if (store !== 0) native.storeClose(store)
      if (server !== null) native.storeServerClose(server.id)
      throw error
    }
  }

  /** Tells how the attempt ended, unless another node did before. */
  async tell(attempt: number, end: AttemptEnd): Promise<void> {
    if ((await native.storeAdd(this.store, `attempt/${attempt}/told`, 1)) > 1) return
    await native.storeSet(this.store, `attempt/${attempt}/end`, encode(end))
  }

  /** This node's ranks are done; the last node to say so ends the attempt. */
  async done(attempt: number): Promise<void> {
    if ((await native.storeAdd(this.store, `attempt/${attempt}/done`, 1)) < this.count) return
    await this.tell(attempt, { kind: 'done', node: this.rank, exitCode: 0, summary: '' })
  }

  /** How the attempt ends; rejects when the store is lost. */
  async end(attempt: number): Promise<AttemptEnd> {
    return decode(await native.storeGet(this.store, `attempt/${attempt}/end`, long))
  }

  /** Waits until the ranks of all nodes are gone. */
  async stopped(attempt: number, timeoutMs: number): Promise<void> {
    if ((await native.storeAdd(this.store, `attempt/${attempt}/stopped`, 1)) === this.count) {
      await native.storeSet(this.store, `attempt/${attempt}/over`, encode(true))
    }
    await native.storeGet(this.store, `attempt/${attempt}/over`, timeoutMs)
  }

  /** Leaves; node 0 keeps the store until the others have left, for a while. */
  async leave(): Promise<void> {
    try {
      const left = await native.storeAdd(this.store, 'nodes/left', 1)
      if (left === this.count) await native.storeSet(this.store, 'nodes/empty', encode(true))
      else if (this.server !== null) await native.storeGet(this.store, 'nodes/empty', leaveMs)
    } catch {
      // The others are gone already.
    }
    native.storeClose(this.store)
    if (this.server !== null) native.storeServerClose(this.server)
  }
}

async function connect(host: string, port: number, jobId: string, deadline: number): Promise<number> {
  for (;;) {
    const rest = deadline - Date.now()
    try {
      return await native.storeClient('viaduct', host, port, jobId, Math.max(1, Math.min(attemptMs, rest)))
    } catch (error) {
      if (!(error instanceof ViaductError) || error.code !== 'ERR_TIMEOUT' || rest <= attemptMs) throw error
    }
  }
}
