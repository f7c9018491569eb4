// A rank of firstCause.test.ts: sums without end; after a while rank 1 is lost in the way that the first argument says.
import { allReduce, barrier } from '../../lib/parallel/collectives.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { Ctx, Tensor } from '../../lib/tensor/index.js'

const [scenario = '', timeout = '30000'] = process.argv.slice(2)
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))

const world = await initDistributed({ timeoutMs: 60_000 })
await barrier(world.group)
world.group.setTimeout(Number(timeout))
const ctx = Ctx.create()
const n = 4_000_000
const t = Tensor.fromHost(ctx, new Float32Array(n), [n], 'float32')

async function sum(): Promise<void> {
  allReduce(ctx, t, world.group)
  await ctx.stream.sync()
}

for (let i = 0; i < 3; i++) await sum()
if (world.rank === 1) {
  console.log('rank 1 is lost now')
  // Standard output is a pipe: it is out before the next turn.
  await sleep(50)
  if (scenario === 'leave') process.exit(0)
  if (scenario === 'stop') process.kill(process.pid, 'SIGSTOP')
  for (; scenario === 'stuck'; );
  if (scenario === 'kill') {
    // Inside: the others have come, and 16 MB are on their way.
    void sum()
    await sleep(5)
    process.kill(process.pid, 'SIGKILL')
  }
}
for (;;) await sum()
