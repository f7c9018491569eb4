// A rank of launcher.test.ts: sums its rank over the world; on its first attempt rank 1 fails when told to.
import { ViaductError } from '../../lib/base/errors.js'
import { allGatherObject } from '../../lib/parallel/collectives.js'
import { initDistributed } from '../../lib/parallel/world.js'

const restart = Number(process.env.TORCHELASTIC_RESTART_COUNT)
const world = await initDistributed({ timeoutMs: 30_000 })
if (process.argv[2] === 'failOnce' && world.rank === 1 && restart === 0) {
  throw new ViaductError('ERR_DATA', 'test', 'expected good data, got bad')
}
const ranks = await allGatherObject([world.rank, world.localRank], world.group)
console.log(`restart ${restart} ranks ${JSON.stringify(ranks)}`)
await world.dispose()
