// One rank of online.test.ts: loads a folder and a checkpoint and counts what it read; exports in buckets of several sizes, to some
// ranks, in another dtype; does what must fail on all ranks. Writes what it saw as JSON.
import { createHash } from 'node:crypto'
import { truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { native } from '../../lib/addon/load.js'
import type { ViaductError } from '../../lib/base/errors.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import type { ExportWeightsOptions } from '../../lib/bridge/online/exportWeights.js'
import { loadCheckpoint } from '../../lib/checkpoint/loadCheckpoint.js'
import { ioCounters } from '../../lib/io/blocks.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { withScope } from '../../lib/tensor/scope.js'

const [folder, spoilt, whole, damaged, out, tp] = process.argv.slice(2) as [
  string,
  string,
  string,
  string,
  string,
  string,
]
const world = await initDistributed()

async function readBy(work: () => Promise<unknown>): Promise<number> {
  const before = ioCounters().bytesRead
  await work()
  return ioCounters().bytesRead - before
}

async function codeOf(work: () => Promise<unknown>): Promise<string> {
  try {
    await work()
    return 'none'
  } catch (error) {
    return (error as ViaductError).code
  }
}

const bridge = await AutoBridge.fromHfPretrained(folder)
const provider = bridge.toMegatronProvider()
provider.tensorModelParallelSize = Number(tp)
const model = await provider.provideDistributedModel({ wrapWithDdp: false, loadWeights: false })
const hf = await readBy(() => bridge.loadHfWeights(model))

const group = model.mesh.get('tp')
const traffic = () => group.info() ?? { sequence: 0, payloadBytes: 0 }
async function exported(options: ExportWeightsOptions) {
  const before = traffic()
  const tensors: [string, string | null][] = []
  for await (const [name, weight] of bridge.exportHfWeights(model, options)) {
    const digest =
      weight &&
      createHash('sha256')
        .update(await weight.bytes())
        .digest('hex')
    tensors.push([name, weight && `${weight.dtype} [${weight.shape}] ${digest}`])
  }
  const after = traffic()
  return { tensors, operations: after.sequence - before.sequence, bytes: after.payloadBytes - before.payloadBytes }
}
const tasks = bridge.getConversionTasks(model)
const bucketBytes = 30_000
model.device.resetPeak()
const live = model.device.memory().liveBytes
for await (const _ of bridge.exportHfWeights(model, { tasks, bucketBytes }));
const buckets = (model.device.memory().peakBytes - live) / bucketBytes
const exports = {
  whole: await exported({ tasks }),
  single: await exported({ bucketBytes: 1 }),
  some: await exported({ tasks, bucketBytes: 3000 }),
  cast: await exported({ weightDtype: 'bfloat16' }),
  toOne: await exported({ tasks, to: [1] }),
}

const dir = join(out, 'checkpoint')
await bridge.saveMegatronModel(model, dir)
async function reloadFrom(checkpoint: string): Promise<number> {
  const saved = await AutoBridge.fromCheckpoint(checkpoint)
  await withScope(model.ctx(), (ctx) => {
    for (const [, { data }] of model.namedParameters()) native.fill(ctx.stream.id, data.handle, 0)
  })
  return readBy(() => saved.loadHfWeights(model))
}
const uncut = await reloadFrom(whole)
const joined = await exported({ tasks })
const unsound = await codeOf(() => reloadFrom(damaged))
const checkpoint = await reloadFrom(dir)
const unchecked = await readBy(() =>
  loadCheckpoint(
    dir,
    [...model.namedParameters()].map(([name, { data, shard }]) => ({ name, tensor: data, shard })),
    { model, verify: false },
  ),
)
const reloaded = await exported({ tasks })

let seen = 0
const left = await codeOf(async () => {
  for await (const _ of bridge.exportHfWeights(model, { tasks, bucketBytes: 1 })) {
    if (++seen === 4 && world.rank === 1) return
  }
})
const unlike = await codeOf(async () => {
  const filter = (name: string) => world.rank === 0 || name.includes('mlp')
  for await (const _ of bridge.exportHfWeights(model, { filter }));
})
const other = await AutoBridge.fromHfPretrained(world.rank === 1 ? spoilt : folder)
if (world.rank === 1) truncateSync(join(spoilt, 'model.safetensors'), 3000)
const failed = await codeOf(() => other.loadHfWeights(model))
const again = await codeOf(() => bridge.loadHfWeights(model))
await model.dispose()
writeFileSync(
  join(out, `rank${world.rank}.json`),
  JSON.stringify({
    read: { hf, uncut, checkpoint, unchecked },
    tasks,
    exports,
    joined,
    unsound,
    reloaded,
    left,
    seen,
    buckets,
    unlike,
    failed,
    again,
  }),
)
await world.dispose()
