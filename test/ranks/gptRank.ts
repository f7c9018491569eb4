// One rank of the layout tests: node --import tsx gptRank.ts OUT_FOLDER CASES. For each case it builds a fixture's model over all
// ranks of the launcher's variables, computes logits, loss and gradients, and writes what it holds.
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { native } from '../../lib/addon/load.js'
import { uploadBatch } from '../../lib/models/batch.js'
import { GPTModelProvider } from '../../lib/models/provider.js'
import { Tape } from '../../lib/ops/tape.js'
import { sumSharedGradients } from '../../lib/parallel/gradientSums.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { Ctx } from '../../lib/tensor/ctx.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { pack, readFixture, runsOf } from '../parity/llamaLayout.js'

/** What is computed: a fixture, and how. */
export interface Case {
  /** Of the file that each rank writes. */
  readonly name: string
  readonly fixture: string
  readonly sequenceParallel?: boolean
  readonly hiddenDropout?: number
  readonly dtype?: 'float32' | 'bfloat16'
  readonly recompute?: boolean
}

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
  /** Bytes that the pass with its backward and the sums of gradients put into operations of tp, by operation. */
  readonly traffic: Readonly<Record<string, number>>
  /** Tokens of the batch. */
  readonly tokens: number
  /** Tensors of this case that were left behind. */
  readonly leaked: number
  /** Most bytes alive in the pass with its backward, less those alive before. */
  readonly activations: number
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

async function compute(asked: Case, tp: number): Promise<Written> {
  const fixture = readFixture(asked.fixture)
  const { sequenceParallel = false, hiddenDropout = 0, dtype = 'float32', recompute = false } = asked
  const provider = new GPTModelProvider({
    ...fixture.config,
    hiddenDropout,
    paramsDtype: dtype,
    tensorModelParallelSize: tp,
    sequenceParallel,
    recomputeGranularity: recompute ? 'full' : null,
    makeVocabSizeDivisibleBy: 8,
  })
  provider.weightsLoader = async (model) => {
    const ctx = model.ctx()
    for (const [parameterName, parameter] of model.namedParameters()) {
      const whole = pack(runsOf(parameterName, fixture.config), fixture.weights)
      const { logicalShape, localShape, blocks } = parameter.shard
      const local = new Float32Array(localShape.reduce((a, b) => a * b, 1))
      for (const b of blocks) copyBox(whole, logicalShape, b.globalStart, local, localShape, b.localStart, b.size)
      parameter.data = Tensor.fromHost(ctx, [...local], localShape, dtype).keep()
    }
    ctx.scope.close()
  }
  const live = native.liveSlots()
  const model = await provider.provideDistributedModel()
  const [chunk] = model.chunks
  const slots = Ctx.create({ device: model.device })
  const rngSlot = Tensor.fromHost(slots, BigInt64Array.of(7n, 3n), [2], 'int64')
  const ctx = model.ctx({ rng: { seed: 7, step: 3, rngSlot } })
  const [batchSize, seqLength] = fixture.expected.get('input_ids')!.shape as [number, number]
  const ints = (key: string) => {
    const given = fixture.expected.get(key)
    return given === undefined ? null : Int32Array.from(given.data)
  }
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
  const group = model.mesh.get('tp')
  const before = group.info()?.payload ?? {}
  model.device.resetPeak()
  const { liveBytes } = model.device.memory()
  const { lossSum } = await chunk!.loss(ctx.with({ tape }), batch)
  await tape.backward(ctx, [lossSum], [Tensor.fromHost(ctx, [1 / batch.numTokens], [1], 'float32')])
  const activations = model.device.memory().peakBytes - liveBytes
  await sumSharedGradients(
    ctx,
    [...model.namedParameters()].map(([, p]) => p),
  )
  const after = Object.entries(group.info()?.payload ?? {})
  const traffic = Object.fromEntries(
    after.flatMap(([op, bytes]) => (bytes > (before[op] ?? 0) ? [[op, bytes - (before[op] ?? 0)]] : [])),
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
  slots.scope.close()
  await model.dispose()
  const leaked = native.liveSlots() - live
  return { logits: [...logits], loss, blocks, outside, traffic, tokens: batchSize * seqLength, leaked, activations }
}

const [folder, cases] = process.argv.slice(2) as [string, string]
const world = await initDistributed()
for (const asked of JSON.parse(cases) as Case[])
  writeFileSync(join(folder, `${asked.name}.${world.rank}.json`), JSON.stringify(await compute(asked, world.size)))
await world.dispose()
