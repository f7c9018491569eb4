// The plan of an online export: on every rank of every layout the planned pieces make up each whole Hugging Face tensor, stacks of
// experts too; tasks say what will come; a plan used again costs next to nothing.
import * as fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { AutoBridge } from '../../../lib/bridge/autoBridge.js'
import {
  bucketsOf,
  type ConversionTask,
  planTasks,
  type TaskPiece,
} from '../../../lib/bridge/online/conversionTasks.js'
import { attentionRules, denseRules, expertRules, outerRules } from '../../../lib/models/decoderRules.js'
import { rankShards } from '../../../lib/models/layoutShards.js'
import { bindRules, tensorShape } from '../../../lib/models/mapping.js'
import { parameterTable } from '../../../lib/models/parameterTable.js'
import type { TransformerConfig } from '../../../lib/models/transformerConfig.js'
import type { ParallelConfig } from '../../../lib/parallel/config.js'
import { type Region, volume } from '../../../lib/tensor/region.js'
import { loadRegions } from '../../../lib/tensor/shardSpec.js'
import { errorOf } from '../../hostile/temporary.js'
import { randomLayout } from '../models/randomLayouts.js'

/** Copies boxes between flat row-major arrays, one element after the other. */
function copyBoxes(
  source: Float64Array,
  sourceShape: readonly number[],
  target: Float64Array,
  targetShape: readonly number[],
  regions: readonly Region[],
  base = 0,
): void {
  const flat = (start: readonly number[], index: readonly number[], shape: readonly number[]) =>
    shape.reduce((at, n, d) => at * n + (start[d] as number) + (index[d] as number), 0)
  for (const { from, to, size } of regions) {
    for (let i = 0; i < volume(size); i++) {
      let rest = i
      const index = [...size].reverse().map((n) => {
        const at = rest % n
        rest = Math.floor(rest / n)
        return at
      })
      index.reverse()
      target[base + flat(to, index, targetShape)] = source[flat(from, index, sourceShape)] as number
    }
  }
}

/** Ranks that a task's axes span around one rank, counted by themselves. */
function groupAround(rank: number, task: ConversionTask, isExpert: boolean, parallel: ParallelConfig, world: number) {
  const { tensorModelParallelSize: tp, expertTensorParallelSize: etp, expertModelParallelSize: ep } = parallel
  const perStage = world / parallel.pipelineModelParallelSize
  const placeOf = (r: number): Record<string, number> => {
    const inStage = r % perStage
    const pp = Math.floor(r / perStage)
    return isExpert
      ? { etp: inStage % etp, ep: Math.floor(inStage / etp) % ep, copy: Math.floor(inStage / (etp * ep)), pp }
      : { tp: inStage % tp, copy: Math.floor(inStage / tp), pp }
  }
  const own = placeOf(rank)
  const axes: readonly string[] = task.axes
  return Array.from({ length: world }, (_, r) => r).filter((r) =>
    Object.entries(placeOf(r)).every(([axis, at]) => axes.includes(axis) || at === own[axis]),
  )
}

const rulesOf = (config: TransformerConfig) => [
  ...outerRules(config),
  ...attentionRules(),
  ...denseRules(),
  ...expertRules('mlp', { gate: 'gate_proj', up: 'up_proj', down: 'down_proj' }),
]

/** Names that choose the stacked spelling. */
const stackedNames = { has: (name: string) => /experts\.(gate_up_proj|down_proj)$/.test(name) }

describe('planTasks', () => {
  it.each([
    ['expert by expert', null],
    ['stacked', stackedNames],
  ])('makes every tensor whole on every rank of every layout, %s', (_, names) => {
    let stacks = 0
    fc.assert(
      fc.property(randomLayout, ({ config: drawn, parallel, worldSize }) => {
        const config: TransformerConfig = { ...drawn, gatedLinearUnit: true, normalization: 'RMSNorm' }
        fc.pre(config.numLayers > 0)
        const rows = new Map(parameterTable(config).map((row) => [row.name, row]))
        const mapping = bindRules(rulesOf(config), [...rows.values()], config, names)
        let next = 1
        const logical = new Map(
          [...rows.values()].map((row) => [row.name, Float64Array.from({ length: volume(row.shape) }, () => next++)]),
        )
        const held = Array.from({ length: worldSize }, (_, rank) => {
          const shards = rankShards(config, parallel, worldSize, rank)
          return new Map(
            shards.map(({ row, shard }) => {
              const local = new Float64Array(volume(shard.localShape))
              const whole = logical.get(row.name) as Float64Array
              copyBoxes(whole, row.shape, local, shard.localShape, loadRegions(shard))
              return [row.name, { local, shape: shard.localShape }] as const
            }),
          )
        })
        const copies = [...mapping.tied.keys()]
        const tasks = planTasks(mapping, { parallel, worldSize }, () => 'float32', copies)
        expect(tasks.map(({ name }) => name).sort()).toEqual([...mapping.byTheirs.keys(), ...copies].sort())
        for (const task of tasks) {
          const readers = mapping.byTheirs.get(mapping.tied.get(task.name) ?? task.name) ?? []
          if (readers.length > 1) stacks++
          const expected = new Float64Array(volume(task.shape))
          for (const { binding, part } of readers) {
            const back = part.regions.map(({ from, to, size }) => ({ from: to, to: from, size }))
            const base = (part.slice?.index ?? 0) * volume(part.shape)
            copyBoxes(logical.get(binding.ours) as Float64Array, binding.shape, expected, part.shape, back, base)
          }
          expect(task.shape).toEqual(tensorShape((readers[0] as (typeof readers)[0]).part))
          expect(task.bytes).toBe(4 * expected.length)
          const isExpert = rows.get(task.ours[0] as string)?.expert !== null
          for (let rank = 0; rank < worldSize; rank++) {
            const group = groupAround(rank, task, isExpert, parallel, worldSize)
            const whole = new Float64Array(volume(task.shape))
            for (const { at, ours, localShape, regions, shape, slice } of task.pieces as readonly TaskPiece[]) {
              const { local, shape: heldShape } = held[group[at] as number]?.get(ours) ?? expect.fail(`no ${ours}`)
              expect(localShape).toEqual(heldShape)
              copyBoxes(local, localShape, whole, shape, regions, slice * volume(shape))
            }
            expect(whole).toEqual(expected)
          }
        }
      }),
      { seed: 7, numRuns: 20 },
    )
    expect(stacks > 20).toBe(names !== null)
  })
})

const tinyConfig = (layers: number) => ({
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: 8,
  intermediate_size: 8,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  num_hidden_layers: layers,
  vocab_size: 16,
  max_position_embeddings: 16,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  hidden_act: 'silu',
  torch_dtype: 'float32',
  tie_word_embeddings: false,
})

async function modelOf(layers: number) {
  const bridge = AutoBridge.fromHfConfig(tinyConfig(layers))
  const provider = bridge.toMegatronProvider()
  provider.makeVocabSizeDivisibleBy = 1
  return { bridge, model: await provider.provideDistributedModel({ wrapWithDdp: false, device: 'cpu' }) }
}

describe('getConversionTasks', () => {
  it('says what an export yields, and exports what is chosen, in its order', async () => {
    const { bridge, model } = await modelOf(2)
    await using _ = model
    const tasks = bridge.getConversionTasks(model, { weightDtype: 'bfloat16' })
    expect(tasks[0]).toMatchObject({
      name: 'model.embed_tokens.weight',
      ours: ['embedding.word_embeddings.weight'],
      shape: [16, 8],
      dtype: 'bfloat16',
      bytes: 256,
      axes: [],
    })
    const seen: string[] = []
    for await (const [name, weight] of bridge.exportHfWeights(model, { tasks, bucketBytes: 300 }))
      seen.push(`${name} ${weight.dtype} ${weight.shape} ${weight.byteLength}`)
    expect(seen).toEqual(tasks.map((t) => `${t.name} ${t.dtype} ${t.shape} ${t.bytes}`))
    const some = tasks.filter(({ name }) => name.includes('q_proj')).reverse()
    const chosen: string[] = []
    for await (const [name] of bridge.exportHfWeights(model, { tasks: some, filter: (n) => n.includes('.1.') }))
      chosen.push(name)
    expect(chosen).toEqual(['model.layers.1.self_attn.q_proj.weight'])
    for await (const [name, weight] of bridge.exportHfWeights(model, { what: 'gradients' }))
      expect(`${name} ${(await weight.toFloat32Array()).every((g) => g === 0)}`).toBe(`${name} true`)
  })
  it('refuses tasks beside what they already say, and tasks of another model', async () => {
    const { bridge, model } = await modelOf(1)
    const { bridge: larger, model: two } = await modelOf(2)
    await using _ = model
    await using __ = two
    const tasks = larger.getConversionTasks(two)
    expect((await errorOf(() => bridge.exportHfWeights(model, { tasks, weightDtype: 'bfloat16' }))).code).toBe(
      'ERR_USAGE',
    )
    const error = await errorOf(async () => {
      for await (const _ of bridge.exportHfWeights(model, { tasks }));
    })
    expect(error.code).toBe('ERR_COVERAGE')
    expect(error.message).toContain('decoder.layers.1')
  })
  it('is at least ten times as cheap when used again', async () => {
    const { bridge, model } = await modelOf(300)
    await using _ = model
    const first = async (tasks?: readonly ConversionTask[]) => {
      const begin = performance.now()
      const iterator = bridge.exportHfWeights(model, { bucketBytes: 1, ...(tasks === undefined ? {} : { tasks }) })
      await iterator.next()
      const ms = performance.now() - begin
      await iterator.return(undefined)
      return ms
    }
    const tasks = bridge.getConversionTasks(model)
    expect(tasks.length).toBe(2703)
    await first()
    await first(tasks)
    // Milliseconds beside other work: the fastest of some of each, taken by turns.
    let [planning, reusing] = [Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY]
    for (let run = 0; run < 20 && !(planning / reusing > 10 && run >= 5); run++) {
      planning = Math.min(planning, await first())
      reusing = Math.min(reusing, await first(tasks))
    }
    expect(planning / reusing).toBeGreaterThan(10)
  })
})

describe('bucketsOf', () => {
  it('keeps the order, fills buckets to the limit, leaves larger tensors alone', () => {
    const tasks = [3, 3, 4, 20, 1, 9, 1].map((bytes) => ({ bytes }) as ConversionTask)
    const buckets = [...bucketsOf(tasks, 10)]
    expect(buckets.map((bucket) => bucket.map(({ bytes }) => bytes))).toEqual([[3, 3, 4], [20], [1, 9], [1]])
    expect([...bucketsOf([], 10)]).toEqual([])
  })
})
