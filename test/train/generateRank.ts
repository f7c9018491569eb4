// A rank that generates from the fixture's model: prints what every rank of its group got, as JSON on rank 0.
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { generate } from '../../lib/inference/generate.js'
import { allGatherObject } from '../../lib/parallel/collectives.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { trainingFixture } from './fixtureRun.js'

const world = await initDistributed()
const provider = (await AutoBridge.fromHfPretrained(trainingFixture)).toMegatronProvider()
provider.tensorModelParallelSize = world.size
provider.sequenceParallel = true
const model = await provider.provideDistributedModel()
const prompts = [[5, 9, 13], [100], [7, 8, 9, 10, 11, 12, 13, 14]]
const greedy = await generate(model, prompts, { maxNewTokens: 40 })
const sampled = await generate(model, prompts, { maxNewTokens: 20, temperature: 1, topK: 50, topP: 0.95, seed: 3 })
// Passes without a cache have sequence parallelism where the tokens can be shared out, and go without where not.
const uncached = await generate(model, prompts, { maxNewTokens: 40, useCache: false })
const all = await allGatherObject({ greedy, sampled, uncached }, model.mesh.get('world'))
if (world.rank === 0) process.stdout.write(`RESULT ${JSON.stringify(all)}\n`)
await model.dispose()
await world.dispose()
