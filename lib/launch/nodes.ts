// The launchers of a job, one a node: who is which, how an attempt ends for all, whose launcher is lost. Node 0 keeps the store on
// the master port; the ranks meet there too. How launchers meet is in rendezvous.ts.
import { randomUUID } from 'node:crypto'
import { hostname, networkInterfaces } from 'node:os'
import { native } from '../addon/load.js'
import { heartbeatMs } from '../parallel/heartbeat.js'
import { JobStore } from './jobStore.js'
import type { LaunchPlan } from './options.js'
import { type Comer, describeNode, meet, type NodeFacts, type Round } from './rendezvous.js'

/** How an attempt ended, told by the first node that knows. */
export interface AttemptEnd {
  readonly kind: 'done' | 'failed' | 'signal'
  readonly node: number
  /** Of the launcher. */
  readonly exitCode: number
  /** One line, for the other nodes. */
  readonly summary: string
  /** Nodes whose launchers are gone or silent: nobody waits for them. */
  readonly lost: readonly number[]
}

const long = 30 * 24 * 3600 * 1000
/** For the others to leave, and for this node's own word. */
const leaveMs = 5000
const farewellMs = 1000
const lookMs = heartbeatMs / 2

/** Silence that explains a failure which has come already; a launcher that is gone had so long to connect again. */
const suspiciousMs = 4 * heartbeatMs

/** Launchers that fell silent within so long were lost together. */
const sameTimeMs = 2 * heartbeatMs

/** A pause of this launcher is worth a word for so long. */
const recentMs = 10_000

/** A fault at run time, as the command line's. */
const lostExitCode = 4

/** Whether an address is this machine's, as far as it can tell without asking. */
function isHere(address: string): boolean {
  if (address === 'localhost' || address === '::1' || /^127\./.test(address) || address === hostname()) return true
  return Object.values(networkInterfaces()).some((list) => list?.some((entry) => entry.address === address))
}

interface Server {
  readonly id: number
  readonly port: number
}

/** The store, on the node that keeps it. */
function hostStore({ masterAddr, masterPort, jobId, nodeRank }: LaunchPlan): Server | null {
  const loopback = /^(localhost|::1|127\..*)$/.test(masterAddr)
  const host = () => native.storeServer(loopback ? masterAddr : '', masterPort, jobId)
  if (nodeRank === 0) return host()
  if (nodeRank !== null || !isHere(masterAddr)) return null
  try {
    return host()
  } catch {
    return null // another launcher of this host was first
  }
}

export class Nodes {
  readonly #plan: LaunchPlan
  readonly #store: JobStore
  readonly #server: Server | null
  readonly #presence: number | null
  readonly #member = randomUUID()
  #round!: Round
  #attempt = 0
  /** When this round began: what a launcher missed before, it has made good by coming. */
  #begun = 0
  /** Nodes lost in the last attempt: nobody waits for them. */
  lost: readonly number[] = []
  /** For how long this launcher had no turn, and when. */
  #pause = { ms: 0, end: Number.NEGATIVE_INFINITY }

  private constructor(plan: LaunchPlan, server: Server | null) {
    const { masterAddr, masterPort, jobId, silenceMs } = plan
    this.#plan = plan
    this.#server = server
    const port = server?.port ?? masterPort
    this.#store = new JobStore(masterAddr, port, jobId)
    const least = silenceMs > 0 ? Math.min(suspiciousMs, silenceMs) : suspiciousMs
    this.#presence =
      plan.nodes === 1 ? null : native.startPresence(masterAddr, port, jobId, this.#member, heartbeatMs, least)
  }

  /** Meets the other launchers. @throws as `meet`, and ERR_COMM when the port is taken. */
  static async join(plan: LaunchPlan, stop: AbortSignal): Promise<Nodes> {
    const nodes = new Nodes(plan, hostStore(plan))
    try {
      await nodes.#meet(null, stop)
      return nodes
    } catch (error) {
      await nodes.#close(true)
      throw error
    }
  }

  /** Meets them again for another attempt; @throws as `meet`. */
  async again(stop: AbortSignal): Promise<void> {
    await this.#meet(this.#round, stop)
  }

  async #meet(last: Round | null, stop: AbortSignal): Promise<void> {
    const { nodes: count, nodeRank, localSize, maxRestarts, joinMs } = this.#plan
    const comer: Comer = {
      facts: {
        host: hostname(),
        address: '',
        localSize,
        attempts: last === null ? 0 : this.#attempt + 1,
        maxRestarts,
        member: this.#member,
      },
      count,
      rank: this.#server !== null ? 0 : (last?.rank ?? nodeRank),
      anyRank: nodeRank === null,
      last,
      lost: this.lost,
      joinMs,
    }
    this.#round = await meet(this.#store, comer, stop)
    this.#begun = performance.now()
    this.#attempt = Math.max(...this.#round.nodes.map(({ attempts }) => attempts))
    this.lost = []
  }

  get rank(): number {
    return this.#round.rank
  }

  get count(): number {
    return this.#round.nodes.length
  }

  get #self(): NodeFacts {
    return this.#round.nodes[this.rank] as NodeFacts
  }

  /** Ranks of the nodes before this one. */
  get firstRank(): number {
    return this.#round.nodes.slice(0, this.rank).reduce((sum, { localSize }) => sum + localSize, 0)
  }

  get worldSize(): number {
    return this.#round.nodes.reduce((sum, { localSize }) => sum + localSize, 0)
  }

  get port(): number {
    return this.#store.port
  }

  /** Which attempt this is, from 0. */
  get attempt(): number {
    return this.#attempt
  }

  /** Node 0's word counts. */
  get maxRestarts(): number {
    return (this.#round.nodes[0] ?? this.#self).maxRestarts
  }

  describe(node: number): string {
    return describeNode(this.#round.nodes, node)
  }

  /** Tells how the attempt ended, unless another node did before. @throws when the store does not answer. */
  async tell(end: AttemptEnd): Promise<void> {
    const { id } = this.#round
    if ((await this.#store.add(`${id}/told`, 1)) > 1) return
    await this.#store.set(`${id}/end`, end)
  }

  /** This node's ranks are done; the last node to say so ends the attempt. @throws when the store does not answer. */
  async done(): Promise<void> {
    if ((await this.#store.add(`${this.#round.id}/done`, 1)) < this.count) return
    await this.tell({ kind: 'done', node: this.rank, exitCode: 0, summary: '', lost: [] })
  }

  /** How the attempt ends for all: what is told, else that launchers are lost. `stop` ends the watch. */
  watch(): { readonly end: Promise<AttemptEnd>; stop(): void } {
    let looking: NodeJS.Timeout | undefined
    const told = this.#store.get<AttemptEnd>(`${this.#round.id}/end`, long).catch((error: Error): AttemptEnd => {
      const pause = this.#pauseText()
      return this.#lostEnd([0], `its launcher is gone${pause === '' ? ` (${error.message})` : pause}`)
    })
    const lost = new Promise<AttemptEnd>((resolve) => {
      if (this.#presence === null) return
      let last = performance.now()
      looking = setInterval(() => {
        const now = performance.now()
        if (now - last > suspiciousMs) this.#pause = { ms: now - last, end: now }
        last = now
        const found = this.#look(this.#plan.silenceMs, suspiciousMs)
        if (found !== null) resolve(found)
      }, lookMs)
    })
    const end = Promise.race([told, lost])
    return { end, stop: () => clearInterval(looking) }
  }

  /** Launchers whose silence explains a failure that has come already; null: none. */
  suspect(): AttemptEnd | null {
    return this.#look(suspiciousMs, 0)
  }

  /** Launchers that were silent or gone for so long; 0 for silence: never. */
  #look(silenceMs: number, goneMs: number): AttemptEnd | null {
    if (this.#presence === null) return null
    const presence = native.presence(this.#presence)
    const inRound = (ms: number) => Math.min(ms, performance.now() - this.#begun)
    const unansweredMs = inRound(presence.unansweredMs)
    if (this.rank !== 0 && silenceMs > 0 && unansweredMs >= silenceMs)
      return this.#lostEnd(
        [0],
        `its launcher has not answered for ${seconds(unansweredMs)}, that host is frozen or out of reach`,
      )
    const others = this.#round.nodes.flatMap(({ member }, node) => {
      const found = node === this.rank ? undefined : presence.silent.find((one) => one.member === member)
      return found === undefined ? [] : [{ node, gone: found.gone, ms: inRound(found.ms) }]
    })
    const isLost = ({ ms, gone }: { ms: number; gone: boolean }) =>
      gone ? ms >= Math.min(goneMs, silenceMs || goneMs) : silenceMs > 0 && ms >= silenceMs
    const [first] = others.filter(isLost).sort((a, b) => b.ms - a.ms || a.node - b.node)
    if (first === undefined) return null
    // What cuts off one host often cuts off others at the same time.
    const alike = others.filter((one) => one.node !== first.node && (isLost(one) || one.ms >= first.ms - sameTimeMs))
    const why = first.gone
      ? `its launcher is gone`
      : `its launcher gave no sign of life for ${seconds(first.ms)}, that host is frozen or out of reach`
    return this.#lostEnd([first.node, ...alike.map(({ node }) => node)], `${why}${this.#pauseText()}`)
  }

  #pauseText(): string {
    const { ms, end } = this.#pause
    return performance.now() - end > recentMs ? '' : `, this host itself stood still for ${seconds(ms)} before`
  }

  #lostEnd(lost: readonly number[], why: string): AttemptEnd {
    const [first = 0, ...more] = lost
    const also = more.length === 0 ? '' : `; lost as well: ${more.map((node) => this.describe(node)).join(', ')}`
    return {
      kind: 'failed',
      node: this.rank,
      exitCode: lostExitCode,
      summary: `${this.describe(first)} failed first: ${why}${also}`,
      lost,
    }
  }

  /** Leaves; node 0 keeps the store until the others have left, for a while. */
  async leave(): Promise<void> {
    const { id } = this.#round
    const others = this.#round.nodes
      .map((_, node) => node)
      .filter((node) => node !== this.rank && !this.lost.includes(node))
    try {
      if (!this.lost.includes(0)) await this.#store.set(`${id}/left/${this.rank}`, true, farewellMs)
      const deadline = Date.now() + leaveMs
      if (this.#server !== null)
        for (const node of others) await this.#store.poll(`${id}/left/${node}`, deadline, new AbortController().signal)
    } catch {
      // The others are gone already.
    }
    await this.#close(!this.lost.includes(0))
  }

  async #close(politely: boolean): Promise<void> {
    if (this.#presence !== null) await native.stopPresence(this.#presence, politely)
    this.#store.close()
    if (this.#server !== null) native.storeServerClose(this.#server.id)
  }
}

const seconds = (ms: number) => `${(ms / 1000).toFixed(1)} s`
