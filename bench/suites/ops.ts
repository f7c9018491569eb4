// What an op costs before its kernel runs.
import { join } from 'node:path'
import type { EnqueueCost } from '../enqueue.js'
import { quantile } from '../pairs.js'
import { peerKinds } from '../peers.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
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
    const work = 'JavaScript and binding an op of a training step'
    const figure = { value: quantile(cost.microseconds, 0.5), unit: 'µs' }
    const [all, elapsed] = [cost.allThreads, cost.elapsed].map((times) => quantile(times, 0.5).toFixed(2))
    const note = `${cost.ops} ops; processor time of the enqueuing thread; of all threads ${all} µs, by the clock ${elapsed} µs`
    const rows = [await rowOf(options, { suite: 'ops', work, peer: null, figure, note }, [])]
    return [...rows, await shareRow(options, ours, folder, (figure.value * cost.ops) / 1e6)]
  })
}

/** What enqueuing is of the step of (a): as many ops as the small batch has. */
async function shareRow(options: BenchOptions, ours: Side, folder: string, enqueued: number): Promise<Row> {
  const { batch, seqLength, vocabulary, text } = sizes.a
  await ours.call('load', { folder, mode: 'float32', train: true, batch: [batch, seqLength] })
  const tokens = randomTokens(batch, seqLength, vocabulary, 1)
  const warmups = 2
  const answer = await ours.call<{ seconds: number[] }>('train', { tokens, steps: warmups + options.pairs })
  const step = quantile(answer.seconds.slice(warmups), 0.5)
  const figure = { value: (100 * enqueued) / step, unit: '%' }
  const note = `${(enqueued * 1e3).toFixed(2)} ms of ${(step * 1e3).toFixed(0)} ms; ${text}`
  const work = 'JavaScript and binding, share of the training step (a), float32'
  return await rowOf(options, { suite: 'ops', work, peer: null, figure, note }, [])
}
