// bfloat16: our error against float32 (same rounded weights) must be no worse than Transformers' own bfloat16 error, pooled over
// 8 sequences.
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { uploadBatch } from '../../lib/models/batch.js'
import { GPTModel } from '../../lib/models/gpt.js'
import { Ctx, soloGroups } from '../../lib/tensor/ctx.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { readSafetensorsFile } from '../fixtures/safetensorsFile.js'
import { pack, readFixture, runsOf } from './llamaLayout.js'

const file = join(dirname(fileURLToPath(import.meta.url)), '../fixtures/llama_bf16.safetensors')

/** KL divergence of each position's distribution from the exact one, averaged. */
function divergence(exact: Float32Array, got: Float32Array, V: number): number {
  const rows = exact.length / V
  const logProbabilities = (x: Float32Array, r: number) => {
    const row = Array.from(x.subarray(r * V, (r + 1) * V))
    const top = Math.max(...row)
    const total = Math.log(row.reduce((s, v) => s + Math.exp(v - top), 0)) + top
    return row.map((v) => v - total)
  }
  let sum = 0
  for (let r = 0; r < rows; r++) {
    const p = logProbabilities(exact, r)
    const q = logProbabilities(got, r)
    sum += p.reduce((s, v, i) => s + Math.exp(v) * (v - q[i]!), 0)
  }
  return sum / rows
}

test('bfloat16 logits are as near to float32 as those of Transformers', async () => {
  const { config, weights } = readFixture('plain')
  const expected = readSafetensorsFile(file)
  const [exact, theirs] = [expected.get('float32')!.data, expected.get('bfloat16')!.data]
  const ctx = Ctx.create({ device: 'cpu' })
  const model = new GPTModel({ ...config, paramsDtype: 'bfloat16' }, { groups: soloGroups })
  for (const [name, p] of model.namedParameters()) {
    const values = pack(runsOf(name, config), weights)
    p.data = Tensor.fromHost(ctx, values, p.shard.localShape, 'bfloat16').keep()
  }
  const [batchSize, seqLength] = expected.get('input_ids')!.shape as [number, number]
  const tokens = Int32Array.from(expected.get('input_ids')!.data)
  const logits = await model.forward(ctx, uploadBatch(ctx, { batchSize, seqLength, tokens }, config))
  expect(logits.dtype).toBe('bfloat16')
  const ours = await model.gatherLogits(ctx, logits)
  const errors = (x: Float32Array) => x.map((v, i) => Math.abs(v - exact[i]!)).sort()
  const [a, b] = [errors(ours), errors(theirs)]
  const mean = (x: Float32Array) => x.reduce((s, v) => s + v, 0) / x.length
  const high = (x: Float32Array) => x[Math.floor(0.999 * x.length)]!
  const ratios = { mean: mean(a) / mean(b), high: high(a) / high(b) }
  const kl = divergence(exact, ours, config.vocabSize) / divergence(exact, theirs, config.vocabSize)
  // The spread between two honest bfloat16 implementations, measured on Transformers' attention variants.
  expect(ratios.mean).toBeLessThanOrEqual(1.25)
  expect(ratios.high).toBeLessThanOrEqual(1.5)
  expect(kl).toBeLessThanOrEqual(1.6)
  // And an error there is: this is not float32 under another name.
  expect(ratios.mean).toBeGreaterThan(0.3)
  process.stdout.write(
    `bfloat16 error over Transformers': mean ${ratios.mean.toFixed(3)}, 99.9% ${ratios.high.toFixed(3)}, KL ${kl.toFixed(3)}\n`,
  )
  model.dispose()
  ctx.scope.close()
})
