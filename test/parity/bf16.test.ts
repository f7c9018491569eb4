// bfloat16: our error against float32 (same rounded weights) must be no worse than Transformers' own bfloat16 error. Over ranks it is
// shown by `viaduct logits` in test/cli/compute.test.ts.
import { expect, test } from 'vitest'
import { uploadBatch } from '../../lib/models/batch.js'
import { GPTModel } from '../../lib/models/gpt.js'
import { Ctx, soloGroups } from '../../lib/tensor/ctx.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { bf16Expected, expectBf16Error } from './bf16Error.js'
import { pack, readFixture, runsOf } from './llamaLayout.js'

test('bfloat16 logits are as near to float32 as those of Transformers', async () => {
  const { config, weights } = readFixture('plain')
  const ctx = Ctx.create({ device: 'cpu' })
  const model = new GPTModel({ ...config, paramsDtype: 'bfloat16' }, { groups: soloGroups })
  for (const [name, p] of model.namedParameters()) {
    const values = pack(runsOf(name, config), weights)
    p.data = Tensor.fromHost(ctx, values, p.shard.localShape, 'bfloat16').keep()
  }
  const [batchSize, seqLength] = bf16Expected.get('input_ids')!.shape as [number, number]
  const tokens = Int32Array.from(bf16Expected.get('input_ids')!.data)
  const logits = await model.forward(ctx, uploadBatch(ctx, { batchSize, seqLength, tokens }, config))
  expect(logits.dtype).toBe('bfloat16')
  expectBf16Error(await model.gatherLogits(ctx, logits), config.vocabSize)
  model.dispose()
  ctx.scope.close()
})
