// Greedy decoding, and whether both sides give the same tokens.
import { alternate, type Runner } from '../alternate.js'
import { peerKinds } from '../peers.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
import { type BenchOptions, modelFolder, randomTokens, sizes } from './options.js'
import { rowOf, withSides } from './rows.js'

const promptLength = 32
/** Sequences at once. */
const batches = [1, 8]

/** Greedy decoding of one sequence; the prompt's forward pass is in it. */
export async function decodeSuite(options: BenchOptions): Promise<Row[]> {
  const rows: Row[] = []
  for (const size of options.sizes) {
    for (const [batch, mode] of batches.flatMap((rows) => options.dtypes.map((dtype) => [rows, dtype] as const))) {
      const tokens = randomTokens(batch, promptLength, sizes[size].vocabulary, 2)
      const several = batch === 1 ? '' : `, ${batch} sequences`
      const work = `greedy decoding (${size}), ${mode}, ${options.newTokens} tokens after ${promptLength}${several}`
      process.stderr.write(`${work} `)
      await withSides(options, peerKinds, async ({ ours, peers }) => {
        const folder = await modelFolder(options, size, peers[0]?.side)
        const given = new Map<Side, string>()
        const runner = (side: Side): Runner => ({
          side,
          async run() {
            const answer = await side.call<{ seconds: number; tokens: number[] }>('generate', {
              tokens,
              new_tokens: options.newTokens,
            })
            given.set(side, answer.tokens.join())
            return answer.seconds
          },
        })
        await ours.call('load', { folder, mode, train: false })
        for (const { side } of peers) await side.call('load', { folder, mode, train: false })
        const own = runner(ours)
        const others = peers.map(({ side }) => runner(side))
        for (const each of [own, ...others]) await each.run()
        const pairs = await alternate(own, others, options.pairs, options.limitSeconds)
        for (const [i, { kind, side }] of peers.entries()) {
          const same = sharedStart(given.get(ours) ?? '', given.get(side) ?? '')
          if (mode === 'float32' && same < batch * options.newTokens)
            throw new Error(`${work}: expected equal tokens, got ${given.get(ours)} and ${given.get(side)}`)
          const parity = `first ${same} tokens equal`
          rows.push(
            await rowOf(options, { suite: 'decode', work, peer: `PyTorch ${kind.name}`, parity }, pairs[i] ?? [], side),
          )
        }
      })
    }
  }
  return rows
}

/** Tokens, joined by commas, that both have at the start. */
export function sharedStart(ours: string, theirs: string): number {
  const [a, b] = [ours.split(','), theirs.split(',')]
  const differs = a.findIndex((token, i) => token !== b[i])
  return differs < 0 ? a.length : differs
}
