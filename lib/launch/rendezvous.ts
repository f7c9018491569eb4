// How the launchers of a job meet at node 0's store, at first and again after a failure. Each meeting is a round with keys of its
// own, which node 0 opens. A launcher that lost the store connects anew; one that was started in a lost node's place may come.
import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { ViaductError } from '../base/errors.js'
import { isStoreLost, type JobStore } from './jobStore.js'

/** What the others know of a node. */
export interface NodeFacts {
  readonly host: string
  /** As the store's host sees it. */
  readonly address: string
  readonly localSize: number
  /** Attempts before this round's, as far as this launcher has seen them. */
  readonly attempts: number
  readonly maxRestarts: number
  /** Its launcher's name among those that show that they live. */
  readonly member: string
}

/** One meeting: who is there. */
export interface Round {
  readonly id: string
  /** Of this node. */
  readonly rank: number
  /** By node rank. */
  readonly nodes: readonly NodeFacts[]
}

/** A launcher on its way to a round. */
export interface Comer {
  readonly facts: NodeFacts
  readonly count: number
  /** Its node rank; null: one that is free. */
  readonly rank: number | null
  /** Ranks go by arrival: another one will do. */
  readonly anyRank: boolean
  /** The round that it was in. */
  readonly last: Round | null
  /** Node ranks that were lost in it. */
  readonly lost: readonly number[]
  readonly joinMs: number
}

/** What node 0 says of the open round. */
interface Opening {
  readonly id: string
  /** Node ranks that newcomers may have; null: all. */
  readonly vacant: readonly number[] | null
}

const key = 'rendezvous'
const retryMs = 200

/** Rounds in which this launcher has asked for a rank, with the rank: asked again after a lost connection it is its own. */
type Claims = Map<string, number>

/** `node 1 (host-b at 10.0.0.2, ranks 2 to 3)`. */
export function describeNode(nodes: readonly NodeFacts[], rank: number): string {
  const node = nodes[rank]
  if (node === undefined) return `node ${rank}`
  const first = nodes.slice(0, rank).reduce((sum, { localSize }) => sum + localSize, 0)
  const ranks = node.localSize === 1 ? `rank ${first}` : `ranks ${first} to ${first + node.localSize - 1}`
  return `node ${rank} (${node.host} at ${node.address}, ${ranks})`
}

/**
 * Meets the others. Connects to the store where it has to.
 * @throws ERR_TIMEOUT naming the nodes that did not come, ERR_USAGE for a node rank that somebody else has, ERR_ABORTED.
 */
export async function meet(store: JobStore, comer: Comer, stop: AbortSignal): Promise<Round> {
  const deadline = Date.now() + comer.joinMs
  const claims: Claims = new Map()
  for (let connected = comer.last !== null; ; connected = false) {
    try {
      if (!connected) await store.connect(deadline, stop)
      return await meetOnce(store, comer, claims, deadline, stop)
    } catch (error) {
      if (comer.last === null || !isStoreLost(error)) throw error
      if (Date.now() < deadline) {
        await sleep(retryMs)
        continue
      }
      const who = describeNode(comer.last.nodes, 0)
      throw notBack(comer, `${who} did not: ${(error as Error).message}`)
    }
  }
}

function notBack({ count, joinMs }: Comer, what: string): ViaductError {
  return new ViaductError(
    'ERR_TIMEOUT',
    'run',
    `expected all ${count} nodes back within ${joinMs / 1000} s to start again, ${what}: start the launcher there again, or wait longer with --rdzv-conf join_timeout=SECONDS`,
  )
}

async function meetOnce(
  store: JobStore,
  comer: Comer,
  claims: Claims,
  deadline: number,
  stop: AbortSignal,
): Promise<Round> {
  const { count, last } = comer
  if (comer.rank === 0) {
    const vacant = last === null ? null : comer.lost
    await store.set(key, { id: randomUUID(), vacant } satisfies Opening)
  }
  const opening = await openRound(store, comer, deadline, stop)
  const { id } = opening
  const rank = await claimRank(store, comer, claims, opening)
  await store.set(`${id}/nodes/${rank}`, { ...comer.facts, address: await store.address() } satisfies NodeFacts)
  const nodes: NodeFacts[] = []
  const missing: number[] = []
  for (let node = 0; node < count; node++) {
    const facts = await store.poll<NodeFacts>(`${id}/nodes/${node}`, deadline, stop)
    if (facts === undefined) missing.push(node)
    else nodes.push(facts)
  }
  if (missing.length === 0) return { id, rank, nodes }
  if (last !== null)
    throw notBack(comer, `${missing.map((node) => describeNode(last.nodes, node)).join(', ')} did not come`)
  throw new ViaductError(
    'ERR_TIMEOUT',
    'run',
    `expected ${count} nodes within ${comer.joinMs / 1000} s, node ${missing.join(', ')} did not come: start its launcher`,
  )
}

/** The round that is open, once it is another one than the last. */
async function openRound(store: JobStore, comer: Comer, deadline: number, stop: AbortSignal): Promise<Opening> {
  for (;;) {
    const opening = await store.poll<Opening>(key, deadline, stop)
    if (opening !== undefined && opening.id !== comer.last?.id) return opening
    if (Date.now() < deadline) {
      await sleep(retryMs)
      continue
    }
    if (comer.last !== null) throw notBack(comer, `${describeNode(comer.last.nodes, 0)} did not start again`)
    throw new ViaductError('ERR_TIMEOUT', 'run', `expected node 0 within ${comer.joinMs / 1000} s, it did not come`)
  }
}

async function claimRank(store: JobStore, comer: Comer, claims: Claims, { id, vacant }: Opening): Promise<number> {
  const { count, rank } = comer
  const others = vacant ?? Array.from({ length: count - 1 }, (_, i) => i + 1)
  const wanted = rank === null ? others : comer.anyRank && vacant === null && rank !== 0 ? [rank, ...others] : [rank]
  for (const one of wanted) {
    const before = claims.get(id) === one ? 1 : 0
    claims.set(id, one)
    if (one < count && (await store.add(`${id}/claims/${one}`, 1)) <= 1 + before) return one
  }
  const which = rank === null ? 'one more' : `another one of rank ${rank}`
  const lost = comer.last === null ? '' : ': it was started in the place of this one, which was lost'
  throw new ViaductError('ERR_USAGE', 'run', `expected ${count} launchers, one for each node rank, got ${which}${lost}`)
}
