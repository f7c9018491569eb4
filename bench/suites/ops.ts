// What an op costs before its kernel runs.
import { join } from 'node:path'
import type { EnqueueCost } from '../enqueue.js'
import { quantile } from '../pairs.js'
import { peerKinds } from '../peers.js'
import type { Row } from '../results.js'
import { type BenchOptions, isMade, modelFolder, randomTokens, sizes } from './options.js'
import { rowOf, withSides } from './rows.js'

/** JavaScript and binding of each op enqueued. */
export async function opsSuite(options: BenchOptions): Promise<Row[]> {
  const kinds = isMade(join(options.work, 'a')) ? [] : peerKinds.slice(0, 1)
  return await withSides(options, kinds, async ({ ours, peers }) => {
    // A small batch: the kernels of 500 steps have to run, and are not what is measured.
    const [batch, seqLength] = [1, 16]
    const folder = await modelFolder(options, 'a', peers[0]?.side)
    await ours.call('load', { folder, mode: 'float32', train: true, batch: [batch, seqLength] })
    const tokens = randomTokens(batch, seqLength, sizes.a.vocabulary, 3)
    const cost = await ours.call<EnqueueCost & Record<string, unknown>>('enqueue', { tokens, rounds: 20 })
    const work = `JavaScript and binding an op, training step of ${cost.ops} ops`
    const figure = { value: quantile(cost.microseconds, 0.5), unit: 'µs' }
    const [all, elapsed] = [cost.allThreads, cost.elapsed].map((times) => quantile(times, 0.5).toFixed(2))
    const note = `processor time of the enqueuing thread; of all threads ${all} µs, by the clock ${elapsed} µs`
    return [await rowOf(options, { suite: 'ops', work, peer: null, figure, note }, [])]
  })
}
