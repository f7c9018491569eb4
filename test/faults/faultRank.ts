// One rank of communication.test.ts: joins the others, then does what the scenario asks and says as JSON how its operation ended.
import { native } from '../../lib/addon/load.js'
import type { ViaductError } from '../../lib/base/errors.js'
import { allReduce, barrier, broadcast } from '../../lib/parallel/collectives.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { Ctx, Tensor } from '../../lib/tensor/index.js'

const [scenario = '', timeout = '30000'] = process.argv.slice(2)
const report = (value: unknown) => console.log(`RESULT ${JSON.stringify(value)}`)
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

async function run(): Promise<void> {
  const world = await initDistributed({ timeoutMs: scenario === 'missing' ? Number(timeout) : 30_000 })
  const ctx = Ctx.create()
  await barrier(world.group)
  world.group.setTimeout(Number(timeout))
  const n = 500_000
  const t = Tensor.fromHost(ctx, new Float32Array(n).fill(world.rank), [n], 'float32')
  await ctx.stream.sync()
  const last = world.rank === world.size - 1
  const begin = Date.now()
  if (last && scenario === 'kill') {
    await sleep(300)
    process.kill(process.pid, 'SIGKILL')
  }
  if (last && scenario === 'stop') await sleep(Number(timeout) + 1500)
  if (last && scenario === 'abort') {
    await sleep(300)
    world.abort('the test says so')
  }
  if (last && scenario === 'poison') {
    await sleep(300)
    native.debugFail(ctx.stream.id, 'a kernel failed')
  }
  if (last && scenario === 'late') await sleep(300)
  try {
    if (last && scenario === 'mismatch') broadcast(ctx, t, world.rank, world.group)
    else allReduce(ctx, t, world.group)
    await ctx.stream.sync()
    if (scenario === 'mismatch') await barrier(world.group)
    report({ ok: true })
  } catch (error) {
    const { code, message } = error as ViaductError
    let later = ''
    try {
      ctx.stream.reset()
      allReduce(ctx, t, world.group)
    } catch (again) {
      later = (again as ViaductError).code
    }
    report({ code, message, ms: Date.now() - begin, later })
  }
  // The first to fail stays for a while, so that the others show what they noticed and not only that it left.
  await sleep(500)
}

run().catch((error: ViaductError) => report({ code: error.code, message: error.message }))
