// Starting the sides of a row and making the row: pairs, ratio, machine, versions. What is run between is the suites'.
import { describeMachine, ownVersions } from '../machine.js'
import { type Pair, ratioOf } from '../pairs.js'
import { type PeerKind, startOurs, startPeer } from '../peers.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
import type { BenchOptions } from './options.js'

interface Sides {
  readonly ours: Side
  readonly peers: readonly { readonly kind: PeerKind; readonly side: Side }[]
}

export async function withSides<T>(
  options: BenchOptions,
  kinds: readonly PeerKind[],
  work: (sides: Sides) => Promise<T>,
  processes = 1,
): Promise<T> {
  const peers = kinds.map((kind) => ({ kind, side: startPeer(kind, options.python, options.threads) }))
  const ours = startOurs(options.threads, processes)
  try {
    await Promise.all(peers.map(({ side }) => side.call('versions'))) // started: importing PyTorch takes both cores for seconds
    return await work({ ours, peers })
  } finally {
    for (const side of [ours, ...peers.map(({ side }) => side)]) side.end()
  }
}

type About = Pick<Row, 'suite' | 'work' | 'peer'> & Partial<Pick<Row, 'figure' | 'parity' | 'note'>>

export async function rowOf(options: BenchOptions, about: About, pairs: readonly Pair[], peer?: Side): Promise<Row> {
  const versions = {
    ...ownVersions(),
    ...(peer === undefined ? {} : await peer.call<Record<string, string>>('versions')),
  }
  const ratio = pairs.length > 0 ? ratioOf(pairs) : null
  return {
    ...about,
    pairs,
    ratio,
    threads: options.threads,
    at: new Date().toISOString(),
    versions,
    machine: describeMachine(),
  }
}
