// Generation from a tiny Llama: cached equals uncached, batches of unequal prompts equal single ones, sampling repeats, ends stop.
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { generate, generateSteps } from '../../lib/inference/generate.js'
import type { DistributedModel } from '../../lib/models/distributedModel.js'
import { trainingFixture } from './fixtureRun.js'
import { startScript } from './startRanks.js'

let model: DistributedModel
beforeAll(async () => {
  model = await (await AutoBridge.fromHfPretrained(trainingFixture)).toMegatronModel()
})
afterAll(() => model.dispose())

const prompts = [[5, 9, 13], [100], [7, 8, 9, 10, 11, 12, 13, 14]]

describe('greedy', () => {
  it('gives the same 40 tokens with and without a cache, in a batch and alone', async () => {
    const options = { maxNewTokens: 40 }
    const cached = await generate(model, prompts, options)
    expect(await generate(model, prompts, { ...options, useCache: false })).toEqual(cached)
    for (const [i, prompt] of prompts.entries()) expect(await generate(model, [prompt], options)).toEqual([cached[i]])
    expect(new Set(cached.flat()).size).toBeGreaterThan(3)
  })

  it('stops each sequence at its end token, and all when the last has ended', async () => {
    const [first, second] = (await generate(model, prompts.slice(0, 2), { maxNewTokens: 30 })) as [number[], number[]]
    const end = first[4] as number
    const [a, b] = (await generate(model, prompts.slice(0, 2), { maxNewTokens: 30, eosIds: [end] })) as [
      number[],
      number[],
    ]
    expect(a).toEqual(first.slice(0, first.indexOf(end) + 1))
    const place = second.indexOf(end)
    expect(b).toEqual(place < 0 ? second : second.slice(0, place + 1))
  })

  it('leaves no tensor behind, also when it is left early', async () => {
    const live = native.liveSlots()
    for await (const step of generateSteps(model, prompts, { maxNewTokens: 10 })) {
      expect(step).toHaveLength(3)
      break
    }
    expect(native.liveSlots()).toBe(live)
    await generate(model, prompts, { maxNewTokens: 3 })
    expect(native.liveSlots()).toBe(live)
  })
})

const options = { maxNewTokens: 20, temperature: 1, topK: 50, topP: 0.95 }

describe('sampling', () => {
  it('depends on seed, sequence and position alone', async () => {
    const first = await generate(model, prompts, { ...options, seed: 3 })
    expect(await generate(model, prompts, { ...options, seed: 3, useCache: false })).toEqual(first)
    expect(await generate(model, prompts, { ...options, seed: 4 })).not.toEqual(first)
    expect(await generate(model, [prompts[0] as number[]], { ...options, seed: 3 })).toEqual([first[0]])
  })
})

describe('tensor parallelism', () => {
  it('two ranks give the tokens of one, greedy and sampled', async () => {
    const started = startScript('generateRank.ts', [], 2)
    expect(await started.end, started.lines.join('\n')).toBe(0)
    const line = started.lines.find((text) => text.includes('RESULT '))
    const ranks = JSON.parse(line?.slice(line.indexOf('RESULT ') + 7) ?? '[]') as unknown[]
    const greedy = await generate(model, prompts, { maxNewTokens: 40 })
    const alone = {
      greedy,
      uncached: greedy,
      sampled: await generate(model, prompts, { ...options, seed: 3 }),
    }
    expect(ranks).toEqual([alone, alone])
  }, 60_000)
})

describe('bad input', () => {
  it.each([
    ['no prompt', [], 'ERR_USAGE'],
    ['an empty prompt', [[1], []], 'ERR_USAGE'],
    ['an id past the vocabulary', [[131]], 'ERR_TOKEN_ID'],
  ])('%s', async (_, bad, code) => {
    await expect(generate(model, bad, { maxNewTokens: 2 })).rejects.toMatchObject({ code })
  })
})
