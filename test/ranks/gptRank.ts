// One rank of gptLayouts.test.ts: node --import tsx gptRank.ts OUT_FOLDER FIXTURE ... Builds each fixture's model over all ranks of
// the launcher's variables, computes logits, loss and gradients, and writes what it holds.
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { uploadBatch } from '../../lib/models/batch.js'
import { GPTModelProvider } from '../../lib/models/provider.js'
import { Tape } from '../../lib/ops/tape.js'
import { sumSharedGradients } from '../../lib/parallel/gradientSums.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { pack, readFixture, runsOf } from '../parity/llamaLayout.js'

/** A block of a gradient, with its values. */
export interface WrittenBlock {
  readonly name: string
  readonly start: readonly number[]
  readonly size: readonly number[]
  readonly replica: number
  readonly values: readonly number[]
}

export interface Written {
  readonly logits: readonly number[]
  readonly loss: number
  readonly blocks: readonly WrittenBlock[]
  /** Bytes that the padding of the vocabulary would betray: largest |gradient| outside of all blocks. */
  readonly outside: number
}

/** Copies a box between row-major tensors of 1 or 2 dims. */
function copyBox(
  from: Float32Array,
  fromShape: readonly number[],
  start: readonly number[],
  to: Float32Array,
  toShape: readonly number[],
  at: readonly number[],
  size: readonly number[],
): void {
  const [rows, width] = size.length === 1 ? [1, size[0]!] : [size[0]!, size[1]!]
  const [fromRow, fromColumn, fromWidth] = size.length === 1 ? [0, start[0]!, 0] : [start[0]!, start[1]!, fromShape[1]!]
  const [toRow, toColumn, toWidth] = size.length === 1 ? [0, at[0]!, 0] : [at[0]!, at[1]!, toShape[1]!]
  for (let r = 0; r < rows; r++) {
    const begin = (fromRow + r) * fromWidth + fromColumn
    to.set(from.subarray(begin, begin + width), (toRow + r) * toWidth + toColumn)
  }
}

async function compute(name: string, tp: number): Promise<Written> {
  const fixture = readFixture(name)
  const provider = new GPTModelProvider({ ...fixture.config, tensorModelParallelSize: tp, makeVocabSizeDivisibleBy: 8 })
  provider.weightsLoader = async (model) => {
    const ctx = model.ctx()
    for (const [parameterName, parameter] of model.namedParameters()) {
      const whole = pack(runsOf(parameterName, fixture.config), fixture.weights)
      const { logicalShape, localShape, blocks } = parameter.shard
      const local = new Float32Array(localShape.reduce((a, b) => a * b, 1))
      for (const b of blocks) copyBox(whole, logicalShape, b.globalStart, local, localShape, b.localStart, b.size)
      parameter.data = Tensor.fromHost(ctx, local, localShape, 'float32').keep()
    }
    ctx.scope.close()
  }
  const model = await provider.provideDistributedModel()
  const [chunk] = model.chunks
  const ctx = model.ctx()
  const ints = (key: string) => (fixture.expected.has(key) ? Int32Array.from(fixture.expected.get(key)!.data) : null)
  const [batchSize, seqLength] = fixture.expected.get('input_ids')!.shape as [number, number]
  const raw = ints('labels')!
  const mask = ints('attention_mask')
  const batch = uploadBatch(
    ctx,
    {
      batchSize,
      seqLength,
      tokens: ints('input_ids')!,
      labels: raw.map((_, t) => (t % seqLength === seqLength - 1 ? -100 : raw[t + 1]!)),
      ...(mask ? { attentionMask: Uint8Array.from(mask) } : {}),
    },
    fixture.config,
  )
  const logits = await chunk!.gatherLogits(ctx, await chunk!.forward(ctx, batch))
  const tape = new Tape()
  const { lossSum } = await chunk!.loss(ctx.with({ tape }), batch)
  await tape.backward(ctx, [lossSum], [Tensor.fromHost(ctx, [1 / batch.numTokens], [1], 'float32')])
  await sumSharedGradients(
    ctx,
    [...model.namedParameters()].map(([, p]) => p),
  )
  const blocks: WrittenBlock[] = []
  let outside = 0
  for (const [parameterName, { shard, mainGrad }] of model.namedParameters()) {
    const values = await mainGrad!.toFloat32Array()
    for (const b of shard.blocks) {
      const part = new Float32Array(b.size.reduce((x, y) => x * y, 1))
      copyBox(
        values,
        shard.localShape,
        b.localStart,
        part,
        b.size,
        b.size.map(() => 0),
        b.size,
      )
      blocks.push({ name: parameterName, start: b.globalStart, size: b.size, replica: b.replica, values: [...part] })
      const zeros = new Float32Array(part.length)
      copyBox(
        zeros,
        b.size,
        b.size.map(() => 0),
        values,
        shard.localShape,
        b.localStart,
        b.size,
      )
    }
    outside = values.reduce((m, v) => Math.max(m, Math.abs(v)), outside)
  }
  const loss = (await lossSum.item()) / batch.numTokens
  tape.dispose()
  ctx.scope.close()
  await model.dispose()
  return { logits: [...logits], loss, blocks, outside }
}

const [folder, ...names] = process.argv.slice(2) as [string, ...string[]]
const world = await initDistributed()
for (const name of names)
  writeFileSync(join(folder, `${name}.${world.rank}.json`), JSON.stringify(await compute(name, world.size)))
await world.dispose()
