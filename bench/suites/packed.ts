// Training steps on sequences of unequal lengths. Ours packs them into rows; the peer pads them, or has them behind each other in one
// row, kept apart by a mask.
import { alternate } from '../alternate.js'
import { peerKinds } from '../peers.js'
import type { Row } from '../results.js'
import { type BenchOptions, modelFolder, randomTokens, sizes } from './options.js'
import { rowOf, withSides } from './rows.js'
import { compareLosses, Trainer } from './train.js'

/** 2042 tokens, as nearly as many as the other training steps have. */
const lengths = [480, 32, 312, 150, 50, 410, 96, 354, 158]
const rowLength = 512
const rows = 4
const forms = ['padded', 'packed'] as const

export async function packedSuite(options: BenchOptions): Promise<Row[]> {
  const found: Row[] = []
  const size = 'a'
  const [all] = randomTokens(
    1,
    lengths.reduce((n, length) => n + length, 0),
    sizes[size].vocabulary,
    5,
  )
  let at = 0
  const tokens = lengths.map((length) => (all as number[]).slice(at, (at += length)))
  for (const dtype of options.dtypes) {
    const work = `training step (${size}) of ${lengths.length} packed sequences, ${dtype}`
    process.stderr.write(`${work} `)
    await withSides(options, peerKinds.slice(1), async ({ ours, peers }) => {
      const [peer] = peers as [(typeof peers)[number]]
      const folder = await modelFolder(options, size, peer.side)
      const mixed = dtype === 'bfloat16'
      await ours.call('load', { folder, mode: mixed ? 'mixed' : 'float32', train: true, batch: [rows, rowLength] })
      for (const form of forms) {
        await peer.side.call('load', { folder, mode: mixed ? 'autocast' : 'float32', compile: peer.kind.compile })
        // Ours has gone on from the last form: the losses of a fresh start are compared.
        if (form !== forms[0])
          await ours.call('load', { folder, mode: mixed ? 'mixed' : 'float32', train: true, batch: [rows, rowLength] })
        const own = new Trainer(ours, tokens, { row_length: rowLength })
        const other = new Trainer(peer.side, tokens, { form })
        for (const trainer of [own, other]) for (let i = 0; i < 2; i++) await trainer.run()
        const [pairs = []] = await alternate(own, [other], options.pairs, options.limitSeconds)
        const parity = compareLosses(own.losses, other.losses, dtype, work)
        const note = `lengths ${lengths.join(', ')}; the peer is PyTorch ${peer.kind.name}, compiled, ${form}${mixed ? ', autocast' : ''}`
        const about = { suite: 'packed', work, peer: `PyTorch ${peer.kind.name}, ${form}`, parity, note }
        found.push(await rowOf(options, about, pairs, peer.side))
      }
    })
  }
  return found
}
