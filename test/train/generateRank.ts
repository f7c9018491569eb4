// A rank that generates from the fixture's model in several layouts, as the JSON argument says: prints what every rank got, by layout,
// as JSON on rank 0.
import { native } from '../../lib/addon/load.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { generate, generateSteps } from '../../lib/inference/generate.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import { allGatherObject } from '../../lib/parallel/collectives.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { trainingFixture } from './fixtureRun.js'

/** What one rank got: new tokens of each prompt. */
export interface Generated {
  readonly greedy: readonly (readonly number[])[]
  readonly sampled: Generated['greedy']
  readonly uncached: Generated['greedy']
  /** With an end token. */
  readonly ended: Generated['greedy']
  /** Tensors that were left behind, also by a generation that was left early. */
  readonly left: number
}

interface Task {
  readonly layouts: Readonly<Record<string, Partial<ProviderInit>>>
  readonly prompts: readonly (readonly number[])[]
  readonly eosIds: readonly number[]
}

async function generateIn(layout: Partial<ProviderInit>, { prompts, eosIds }: Task): Promise<Generated[]> {
  const provider = (await AutoBridge.fromHfPretrained(trainingFixture)).toMegatronProvider()
  Object.assign(provider, layout)
  const model = await provider.provideDistributedModel()
  const greedy = await generate(model, prompts, { maxNewTokens: 40 })
  // The rotary tables are made by now.
  const live = native.liveSlots()
  const sampled = await generate(model, prompts, { maxNewTokens: 20, temperature: 1, topK: 50, topP: 0.95, seed: 3 })
  const uncached = await generate(model, prompts, { maxNewTokens: 40, useCache: false })
  const ended = await generate(model, prompts, { maxNewTokens: 40, eosIds })
  for await (const _ of generateSteps(model, prompts, { maxNewTokens: 10 })) break
  const left = native.liveSlots() - live
  const all = await allGatherObject({ greedy, sampled, uncached, ended, left }, model.mesh.get('world'))
  await model.dispose()
  return all
}

const argument = process.argv[2]
if (process.argv[1]?.endsWith('generateRank.ts') && argument !== undefined) {
  const task = JSON.parse(argument) as Task
  const world = await initDistributed()
  const results: Record<string, Generated[]> = {}
  for (const [name, layout] of Object.entries(task.layouts)) results[name] = await generateIn(layout, task)
  if (world.rank === 0) process.stdout.write(`RESULT ${JSON.stringify(results)}\n`)
  await world.dispose()
}
