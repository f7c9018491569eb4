// A process that saves one checkpoint after the other until it is killed; iteration n holds tensors full of n. It prints n when
// saveCheckpoint(n) has returned.
import { saveCheckpoint } from '../../../lib/checkpoint/saveCheckpoint.js'
import { Ctx } from '../../../lib/tensor/ctx.js'
import { splitDim } from '../../../lib/tensor/shardSpec.js'
import { Tensor } from '../../../lib/tensor/tensor.js'

const [dir, first, same] = process.argv.slice(2) as [string, string, string]
const ctx = Ctx.create({ device: 'cpu' })
for (let n = Number(first); ; n++) {
  const names = ['a', 'b', 'c']
  const tensors = names.map((name) => ({
    name,
    dtype: 'float32' as const,
    shard: splitDim([64, 256], 0, 0, 1),
    data: Tensor.full(ctx, [64, 256], 'float32', n),
  }))
  await ctx.stream.sync()
  // With `same`, one iteration is replaced again and again.
  await saveCheckpoint(dir, same === 'same' ? 7 : n, tensors, { files: { 'train_state.json': JSON.stringify({ n }) } })
  console.log(n)
}
