// Logits, loss and gradients of a fixture's Llama, computed by the model of this library on a device.
import { uploadBatch } from '../../lib/models/batch.js'
import { GPTModel } from '../../lib/models/gpt.js'
import type { TransformerConfig } from '../../lib/models/transformerConfig.js'
import { Tape } from '../../lib/ops/tape.js'
import { Ctx, soloGroups } from '../../lib/tensor/ctx.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import type { Result } from './gate.js'
import { type Fixture, pack, runsOf } from './llamaLayout.js'

export interface Changes {
  /** Default: cpu. */
  readonly device?: 'cpu' | 'cuda'
  readonly config?: Partial<TransformerConfig>
  readonly weight?: (name: string, values: Float32Array, config: TransformerConfig) => Float32Array
  readonly labels?: (labels: Int32Array) => Int32Array
  readonly recompute?: boolean
  /** Rows of the vocabulary in memory. */
  readonly padded?: number
}

export async function compute(fixture: Fixture, changes: Changes = {}): Promise<Result> {
  const config = { ...fixture.config, ...changes.config }
  const ctx = Ctx.create({ device: changes.device ?? 'cpu' })
  const model = new GPTModel(config, {
    groups: soloGroups,
    recompute: { recomputeGranularity: changes.recompute ? 'full' : null },
    ...(changes.padded ? { paddedVocabSize: changes.padded } : {}),
  })
  for (const [name, parameter] of model.namedParameters()) {
    const values = pack(runsOf(name, config), fixture.weights)
    const filled = new Float32Array(parameter.shard.localShape.reduce((a, b) => a * b, 1))
    filled.set(changes.weight ? changes.weight(name, values, config) : values)
    parameter.data = Tensor.fromHost(ctx, filled, parameter.shard.localShape, 'float32').keep()
  }
  const ints = (name: string) => (fixture.expected.has(name) ? Int32Array.from(fixture.expected.get(name)!.data) : null)
  const [batchSize, seqLength] = fixture.expected.get('input_ids')!.shape as [number, number]
  const raw = ints('labels')!
  let labels: Int32Array = raw.map((_, t) => (t % seqLength === seqLength - 1 ? -100 : raw[t + 1]!))
  if (changes.labels) labels = changes.labels(labels)
  const positionIds = ints('position_ids')
  const mask = ints('attention_mask')
  const host = {
    batchSize,
    seqLength,
    tokens: ints('input_ids')!,
    labels,
    ...(positionIds ? { positionIds } : {}),
    ...(mask ? { attentionMask: Uint8Array.from(mask) } : {}),
  }
  const batch = uploadBatch(ctx, host, config)
  const logits = await model.gatherLogits(ctx, await model.forward(ctx, batch))
  const tape = new Tape()
  const { lossSum } = await model.loss(ctx.with({ tape }), batch)
  const factor = Tensor.fromHost(ctx, [1 / batch.numTokens], [1], 'float32')
  await tape.backward(ctx, [lossSum], [factor])
  const gradients = new Map<string, Float32Array>()
  for (const [name, parameter] of model.namedParameters()) {
    const length = pack(runsOf(name, fixture.config), fixture.weights).length
    gradients.set(name, (await parameter.mainGrad!.toFloat32Array()).subarray(0, length))
  }
  const loss = (await lossSum.item()) / batch.numTokens
  tape.dispose()
  model.dispose()
  ctx.scope.close()
  return { logits, loss, gradients }
}
