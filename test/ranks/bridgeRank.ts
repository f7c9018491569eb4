// One rank of bridge.test.ts: imports a folder, loads it, exports tensor by tensor and as a folder, through a checkpoint as well,
// and leaves an iteration early. Writes what it saw as JSON.
import { createHash } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import type { ViaductError } from '../../lib/base/errors.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { initDistributed } from '../../lib/parallel/world.js'

const [folder, out, tp, pp] = process.argv.slice(2) as [string, string, string, string]
const layout = { tensorModelParallelSize: Number(tp), pipelineModelParallelSize: Number(pp) }
const world = await initDistributed()
const imported = await AutoBridge.importCkpt(folder, join(out, 'imported'), layout)
await AutoBridge.exportCkpt(join(out, 'imported'), join(out, 'exported'))

const bridge = await AutoBridge.fromHfPretrained(folder)
const model = await bridge.toMegatronModel({ ...layout, wrapWithDdp: false })
const tensors: Record<string, string> = {}
for await (const [name, weight] of bridge.exportHfWeights(model)) {
  if (weight === null) throw new Error('expected a tensor on every rank')
  tensors[name] = `${weight.dtype} [${weight.shape}] ${createHash('sha256')
    .update(await weight.bytes())
    .digest('hex')}`
}
const some: (string | null)[] = []
for await (const [name, weight] of bridge.exportHfWeights(model, {
  to: 'rank0',
  filter: (n) => n.includes('layernorm'),
  weightDtype: 'float32',
})) {
  some.push(name, weight?.dtype ?? null)
}
await bridge.saveHfPretrained(model, join(out, 'saved'))
await bridge.saveMegatronModel(model, join(out, 'checkpoint'), { iteration: 5 })
const loaded = await bridge.loadMegatronModel(join(out, 'checkpoint'), layout)
await bridge.saveHfPretrained(loaded, join(out, 'resaved'))
const slots = model.device.liveSlots()

let early = 'finished'
try {
  let seen = 0
  for await (const _ of bridge.exportHfWeights(model)) if (++seen === 4 && world.rank === world.size - 1) break
} catch (error) {
  early = (error as ViaductError).code
}
const leaked = model.device.liveSlots() - slots
await loaded.dispose()
await model.dispose()
const left = model.device.liveSlots()
writeFileSync(
  join(out, `rank${world.rank}.json`),
  JSON.stringify({ tensors, some, early, leaked, left, imported: imported.tensors }),
)
await world.dispose()
