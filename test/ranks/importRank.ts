// One rank of importBytes.test.ts: imports a folder in a layout and says how many bytes it has read and written.
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { ioCounters } from '../../lib/io/blocks.js'
import { initDistributed } from '../../lib/parallel/world.js'

const [folder, out, layout] = process.argv.slice(2) as [string, string, string]
const world = await initDistributed()
const before = ioCounters()
await AutoBridge.importCkpt(folder, join(out, 'ckpt'), JSON.parse(layout))
const after = ioCounters()
writeFileSync(join(out, `rank${world.rank}.json`), JSON.stringify({ read: after.bytesRead - before.bytesRead }))
await world.dispose()
