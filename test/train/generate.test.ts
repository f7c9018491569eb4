// Generation from a tiny Llama: cached equals uncached, batches of unequal prompts equal single ones, sampling repeats, ends stop.
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { generate, generateSteps } from '../../lib/inference/generate.js'
import type { DistributedModel } from '../../lib/models/distributedModel.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import { trainingFixture } from './fixtureRun.js'
import type { Generated } from './generateRank.js'
import { startScript } from './startRanks.js'

const full = process.env['VIADUCT_TEST_FULL'] === '1'

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

describe('every rank gives the tokens of one, greedy and sampled, with and without a cache, and ends where it does', () => {
  const tp2 = { tensorModelParallelSize: 2, sequenceParallel: true }
  const pp2 = { pipelineModelParallelSize: 2 }
  const quick: Readonly<Record<string, Partial<ProviderInit>>> = {
    'tp 2, pp 2': { ...tp2, ...pp2 },
    // A stage without a block, which has a cache of no layers.
    'pp 4': { pipelineModelParallelSize: 4, pipelineModelParallelLayout: 'Et||t|L' },
    'pp 2, vpp 2, dp 2': { ...pp2, pipelineModelParallelLayout: 'E|t|t|L' },
  }
  // Two key-value heads.
  const more = { 'tp 4': { tensorModelParallelSize: 4, sequenceParallel: true }, 'tp 2, dp 2': tp2, 'pp 2, dp 2': pp2 }
  const layouts: Readonly<Record<number, typeof quick>> = full
    ? { 2: { 'tp 2': tp2, 'pp 2': pp2 }, 4: { ...quick, ...more } }
    : { 4: quick }
  it.each(Object.keys(layouts).map(Number))(
    '%i ranks',
    async (size) => {
      const greedy = await generate(model, prompts, { maxNewTokens: 40 })
      const eosIds = [(greedy[0] as number[])[4] as number]
      const started = startScript(
        'generateRank.ts',
        [JSON.stringify({ layouts: layouts[size], prompts, eosIds })],
        size,
      )
      expect(await started.end, started.lines.join('\n')).toBe(0)
      const line = started.lines.find((text) => text.includes('RESULT '))
      const results = JSON.parse(line?.slice(line.indexOf('RESULT ') + 7) ?? '{}') as Record<string, unknown[]>
      const alone: Generated = {
        greedy,
        uncached: greedy,
        sampled: await generate(model, prompts, { ...options, seed: 3 }),
        ended: await generate(model, prompts, { maxNewTokens: 40, eosIds }),
        left: 0,
      }
      expect(alone.ended).not.toEqual(greedy)
      expect(Object.keys(results)).toEqual(Object.keys(layouts[size] as object))
      for (const [name, ranks] of Object.entries(results))
        expect([name, ranks]).toEqual([name, Array(size).fill(alone)])
    },
    60_000,
  )
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
