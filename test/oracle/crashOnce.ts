// A failed attempt for torchrun's restart: rank 1 ends with an error after the ranks have met; later attempts train.
import { initDistributed } from 'viaduct'

const attempt = process.env['TORCHELASTIC_RESTART_COUNT']
if (attempt === '0') {
  const world = await initDistributed()
  console.log(`first attempt, rank ${world.rank} of ${world.size}`)
  if (world.rank === 1) process.exit(3)
  // The other rank waits for what does not come; the launcher ends it.
  await new Promise((resolve) => setTimeout(resolve, 60_000))
}
const script = './pretrain.ts'
await import(script)
