// A forward and backward pass of a small model whose bytes are counted: what it leaves, what it needs, its loss and gradients.
import { createHash } from 'node:crypto'
import { expect } from 'vitest'
import { type TokenBatch, uploadBatch } from '../../../lib/models/batch.js'
import { GPTModel, type GPTOptions } from '../../../lib/models/gpt.js'
import { allocateParameter, initializeParameter } from '../../../lib/models/initialize.js'
import { GPTModelProvider } from '../../../lib/models/provider.js'
import { type TransformerConfig, transformerFields } from '../../../lib/models/transformerConfig.js'
import { Tape } from '../../../lib/ops/tape.js'
import { Ctx, soloGroups } from '../../../lib/tensor/ctx.js'
import { Device } from '../../../lib/tensor/device.js'
import { Scope } from '../../../lib/tensor/scope.js'
import { Tensor } from '../../../lib/tensor/tensor.js'

// Sizes whose tensors are whole multiples of the allocator's 512 bytes, statistics [T] included.
const [B, S, H, F, heads, groups, D] = [2, 128, 64, 96, 4, 2, 16]
const T = B * S
const [query, key] = [heads * D, groups * D]
export const base = transformerFields(
  new GPTModelProvider({
    numLayers: 6,
    hiddenSize: H,
    ffnHiddenSize: F,
    numAttentionHeads: heads,
    numQueryGroups: groups,
    vocabSize: 50,
    maxPositionEmbeddings: S,
  }),
)
export const root = Ctx.create({ device: 'cpu' })

const host: TokenBatch = {
  batchSize: B,
  seqLength: S,
  tokens: Int32Array.from({ length: T }, (_, i) => (i * 31 + 7) % base.vocabSize),
  labels: Int32Array.from({ length: T }, (_, i) => (i % 5 === 0 ? -100 : (i * 17) % base.vocabSize)),
}

/** How the model keeps activations. */
export type Keeping = Pick<GPTOptions, 'recompute' | 'offloadedLayers'>

export function build(config: TransformerConfig, keeping: Keeping): GPTModel {
  const model = new GPTModel(config, { groups: soloGroups, paddedVocabSize: 64, ...keeping })
  for (const [, p] of model.namedParameters()) {
    allocateParameter(root, p)
    initializeParameter(root, p, 5)
  }
  return model
}

export interface Measured {
  readonly loss: number
  /** Hashes by parameter. */
  readonly gradients: Readonly<Record<string, string>>
  /** Bytes that the forward pass leaves, and the most of the whole step beyond what was there before. */
  readonly kept: number
  readonly peak: number
  /** On the host beside the device, when the forward pass ended. */
  readonly host: number
}

/** A forward and backward pass of a fresh model. */
export async function measure(
  changes: Partial<TransformerConfig>,
  keeping: Keeping,
  weights: 'now' | 'defer' = 'now',
): Promise<Measured> {
  const config = { ...base, ...changes }
  const model = build(config, keeping)
  const slots = root.device.liveSlots()
  const [tape, scope] = [new Tape(), new Scope()]
  const bare = root.with({ scope, tape })
  const rngSlot = Tensor.fromHost(bare, [3n, 1n], [2], 'int64')
  const ctx = bare.with({ rng: { seed: 3, step: 1, rngSlot } })
  const one = Tensor.fromHost(ctx, [1], [1], 'float32')
  const batch = uploadBatch(ctx, host, config)
  for (const [, p] of model.namedParameters()) p.mainGrad = Tensor.zeros(ctx, p.shard.localShape, 'float32').keep()
  const before = root.device.memory().liveBytes
  const hostBefore = Device.host().memory().liveBytes
  root.device.resetPeak()
  const { lossSum } = await model.loss(ctx, batch)
  const kept = root.device.memory().liveBytes - before
  const onHost = Device.host().memory().liveBytes - hostBefore
  await tape.backward(ctx, [lossSum], [one], { weights })
  if (weights === 'defer') await tape.backwardWeight(ctx)
  const peak = root.device.memory().peakBytes - before
  const gradients: Record<string, string> = {}
  for (const [name, p] of model.namedParameters())
    gradients[name] = createHash('sha256')
      .update(await (p.mainGrad as Tensor).bytes())
      .digest('hex')
  const loss = await lossSum.item()
  tape.dispose()
  scope.close()
  for (const [, p] of model.namedParameters()) {
    p.mainGrad?.dispose()
    p.mainGrad = null
  }
  model.dispose()
  expect(root.device.liveSlots()).toBeLessThanOrEqual(slots)
  return { loss, gradients, kept, peak, host: onHost }
}

/** Bytes of one layer's saved tensors without recompute, by what saved them. */
export function layerBytes({ paramsDtype, normalization, gatedLinearUnit }: TransformerConfig) {
  const bytes = paramsDtype === 'bfloat16' ? 2 : 4
  const norm = {
    input: T * H * bytes,
    output: T * H * bytes,
    statistics: (normalization === 'LayerNorm' ? 2 : 1) * T * 4,
  }
  const attention = { qkv: T * (query + 2 * key) * bytes, output: T * query * bytes, lse: T * heads * 4 }
  const acted = T * F * bytes
  const mlp = (gatedLinearUnit ? 3 : 2) * acted
  const normed = norm.input + norm.output + norm.statistics
  return { norm, attention, mlp, acted, all: 2 * normed + attention.qkv + attention.output + attention.lse + mlp }
}
