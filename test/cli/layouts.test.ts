// Layouts that cannot be: refused by every command before a process starts, a file is written or a folder for ranks is made, with
// all problems together and what works instead: each way out that is named is taken. F35 of the fault list is among them.
import { cpSync, existsSync, mkdirSync, readdirSync, watch } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { beforeAll, describe, expect, test } from 'vitest'
import { defaultParallel, type ParallelConfig } from '../../lib/parallel/config.js'
import { pipelineProblems } from '../../lib/parallel/pipelineStages.js'
import { startCommand } from '../faults/launched.js'
import { llamaFixtures } from '../fixtures/safetensorsFile.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { copyFixture, plainEnvironment, viaductFile } from './commandLine.js'
import { changed, problemsOf, waysOut } from './waysOut.js'

const folder = temporaryFolder()
const inside = (...names: string[]) => join(folder, ...names)

beforeAll(() => {
  // 2 blocks, 4 heads, 2 query groups, width 48; 5 heads; 3 blocks, 6 experts of width 12.
  for (const name of ['plain', 'one_kv']) copyFixture(name, inside(name))
  cpSync(join(llamaFixtures, '../moe/olmoe'), inside('olmoe'), { recursive: true })
})

/** 3 blocks, 4 heads, 2 query groups, width 384; 8 samples a step and a micro-batch. */
const train = (...args: string[]) => ['train', 'llama_tiny_cpu_pretrain_config', ...args]
const logits = (...args: string[]) => ['logits', 'plain', '--input', 'in', '--output', 'out', ...args]
const generate = (...args: string[]) => ['generate', 'plain', '--prompt', 'a', ...args]
const verify = (...args: string[]) => ['verify', 'plain', ...args]
const imports = (model: string, ...args: string[]) => ['import', model, 'out', ...args]

const heads = (tp: number) => `tensorModelParallelSize must divide numAttentionHeads=4, got ${tp}: use 1, 2, 4`
const noExperts = (key: string) => `${key}=2: the model has no experts, use 1`
const needsStages = (what: string) => `${what} needs pipelineModelParallelSize of at least 2, got 1: use no `

type Row = readonly [what: string, args: readonly string[], problems: readonly string[]]

const rows: Row[] = [
  [
    'heads, groups, width',
    train('--tp', '3'),
    [heads(3), 'must divide numQueryGroups=2 or be a multiple of it, got 3'],
  ],
  ['more tp than heads', train('--tp', '8'), [heads(8)]],
  [
    'a batch of no share',
    train('--dp', '3'),
    ['the data-parallel size 3 (3 ranks / tp·pp·cp = 1): use train.globalBatchSize=24'],
  ],
  [
    'a micro-batch that does not go up',
    train('--dp', '2', 'train.micro_batch_size=3'),
    ['use train.globalBatchSize=6 or 12, or train.microBatchSize=1, 2'],
  ],
  [
    'ranks that tp does not divide',
    train('--tp', '2', '--nproc-per-node', '3'),
    ['the 3 ranks must be a multiple of tp·pp·cp = 2: use 2 ranks'],
  ],
  [
    'a world too small',
    train('--tp', '4', '--nproc-per-node', '2'),
    ['tp·pp·cp = 4 but 2 ranks run: viaduct run --nproc-per-node 4 SCRIPT; of another command --nproc-per-node 4'],
  ],
  [
    'a --dp that conflicts',
    train('--dp', '3', '--nproc-per-node', '4'),
    ['--dp 3 times tp·pp·cp = 1 conflicts with 4 ranks: leave it out, or give --dp 4'],
  ],
  [
    'a --dp that conflicts beside tp',
    train('--tp', '2', '--dp', '1', '--nproc-per-node', '4', 'train.micro_batch_size=4'),
    ['--dp 1 times tp·pp·cp = 2 conflicts with 4 ranks: leave it out, or give --dp 2'],
  ],
  [
    'sequence parallelism without tp',
    train('model.sequence_parallel=true'),
    ['model.sequenceParallel=true needs tensorModelParallelSize of at least 2, got 1', 'use false'],
  ],
  [
    'blocks over stages',
    train('--pp', '2'),
    [
      'numLayers=3 cannot be spread evenly over 2 stages: use pipelineModelParallelSize=1, 3, or pipelineModelParallelLayout=Et*2|tL',
    ],
  ],
  ['virtual stages of one', train('--vpp', '2'), [needsStages('virtualPipelineModelParallelSize=2')]],
  ['ep without experts', train('--ep', '2'), [noExperts('expertModelParallelSize')]],
  ['etp without experts', train('--etp', '2'), [noExperts('expertTensorParallelSize')]],
  [
    'fully sharded stages',
    train('--pp', '3', 'ddp.use_megatron_fsdp=true'),
    [
      'ddp.useMegatronFsdp=true needs model.pipelineModelParallelSize=1, got 3: use model.pipelineModelParallelSize=1, or ddp',
    ],
  ],
  [
    'fully sharded without a sharded optimizer',
    train('ddp.use_megatron_fsdp=true', 'ddp.use_distributed_optimizer=false', 'ddp.overlap_param_gather=false'),
    [
      'ddp.useMegatronFsdp=true needs ddp.useDistributedOptimizer=true: use ddp.useDistributedOptimizer=true, or ddp.useMegatronFsdp=false',
    ],
  ],
  [
    'fully sharded, but not all of it',
    train('ddp.use_megatron_fsdp=true', 'ddp.data_parallel_sharding_strategy=optim'),
    ['ddp.dataParallelShardingStrategy=optim is not what ddp.useMegatronFsdp=true does: use optim_grads_params, or'],
  ],
  ['no size', train('model.tensor_model_parallel_size=0'), ['must be a whole number of at least 1, got 0']],
  [
    'everything at once',
    train('--tp', '3', '--ep', '2', '--vpp', '2', '--dp', '2', 'train.global_batch_size=7', 'optimizer.min_lr=1'),
    [
      heads(3),
      noExperts('expertModelParallelSize'),
      needsStages('virtualPipelineModelParallelSize=2'),
      'train.globalBatchSize=7 must be divisible',
      'optimizer.minLr=1 is larger than',
    ],
  ],
  ['heads', logits('--tp', '3'), [heads(3), 'numQueryGroups=2']],
  ['heads and experts', logits('--tp', '3', '--ep', '2'), [heads(3), noExperts('expertModelParallelSize')]],
  [
    'more stages than blocks',
    logits('--pp', '3'),
    ['numLayers=2 cannot be spread evenly over 3 stages: use pipelineModelParallelSize=1, 2, or pipeline'],
  ],
  [
    'a first stage of one',
    logits('--num-layers-in-first-pipeline-stage', '1'),
    [
      'numLayersInFirstPipelineStage=1 needs pipelineModelParallelSize of at least 2, got 1: use pipelineModelParallelSize=2, or no',
    ],
  ],
  ['virtual stages of one', logits('--vpp', '2'), [needsStages('virtualPipelineModelParallelSize=2')]],
  [
    'tokens for too few heads',
    logits('--cp', '2', '--tp', '2', '--cp-comm-type', 'a2a'),
    ['cpCommType=a2a must share out the 1 key and value heads that a rank of tp has, got 2 ranks: use p2p'],
  ],
  [
    'tokens for too few heads in a ring',
    train('--cp', '4', '--cp-comm-type', 'a2a+p2p', '--hierarchical-context-parallel-sizes', '4,1'),
    ['model.hierarchicalContextParallelSizes must share out the 2 key and value heads', 'got 4 ranks: use 2,2'],
  ],
  [
    'a ring of no sizes',
    logits('--cp', '2', '--cp-comm-type', 'a2a+p2p'),
    ['two sizes with the product contextParallelSize=2 for cpCommType=a2a+p2p, got none: use 2,1'],
  ],
  [
    'sizes of no ring',
    logits('--cp', '4', '--hierarchical-context-parallel-sizes', '2,2'),
    ['hierarchicalContextParallelSizes=2,2 needs cpCommType=a2a+p2p, got p2p: leave it out'],
  ],
  ['no form of cp', train('--cp', '2', 'model.cp_comm_type=tree'), ['must be one of p2p, all_gather, a2a, a2a+p2p']],
  ['heads', generate('--tp', '3'), [heads(3)]],
  ['heads', verify('--tp', '8'), [heads(8)]],
  [
    'a layout string with too few blocks',
    verify('--pp', '2', '--pipeline-layout', 'Et|L'),
    ['must have numLayers=2 times t, got 1; this fits: Et|tL'],
  ],
  [
    'a layout string with too many stages',
    verify('--pp', '2', '--pipeline-layout', 'Et|t|L'),
    ['must have a multiple of pipelineModelParallelSize=2 stages, got 3; this fits: Et|tL'],
  ],
  [
    'a layout string whose ends are wrong, and its blocks too',
    verify('--pp', '2', '--pipeline-layout', 'tE|L'),
    [
      'must begin with its only E in the first stage',
      '; this fits: Et|tL\n',
      'must have numLayers=2 times t, got 1; this fits: Et|tL',
    ],
  ],
  [
    'a layout string of other letters',
    verify('--pp', '2', '--pipeline-layout', 'Etx|tL'),
    ['has "x" where one of these is expected'],
  ],
  [
    'a first stage of more than all',
    verify('--pp', '2', '--num-layers-in-first-pipeline-stage', '3'),
    [
      'less numLayersInFirstPipelineStage=3 cannot be spread evenly over 1 stage: use numLayersInFirstPipelineStage=1, or no',
      'or pipelineModelParallelLayout=Et|tL, without numLayersInFirstPipelineStage',
    ],
  ],
  [
    'more chunks than blocks',
    verify('--pp', '2', '--vpp', '2'),
    ['numLayers=2 cannot be spread evenly over 2 stages of 2 chunks: use no virtualPipelineModelParallelSize, or'],
  ],
  ['a share of experts', imports('olmoe', '--ep', '4'), ['must divide the 6 experts, got 4: use 1, 2, 3, 6']],
  [
    'a share of an expert',
    imports('olmoe', '--etp', '5'),
    ['must divide moeFfnHiddenSize=12, got 5: use 1, 2, 3, 4, 6, 12'],
  ],
  [
    'ranks that experts do not fill',
    imports('olmoe', '--ep', '2', '--dp', '3'),
    ['ep·etp = 2 must divide tp·cp·dp = 3: use 2 ranks (dp 2) or a multiple'],
  ],
  [
    'two ways to say the stages',
    imports('plain', '--pp', '2', '--pipeline-layout', 'Et|tL', '--num-layers-in-first-pipeline-stage', '1'),
    ['numLayersInFirstPipelineStage=1 conflicts with pipelineModelParallelLayout="Et|tL": leave it out'],
  ],
  ['heads, by several processes', imports('plain', '--tp', '3', '--nproc-per-node', '2'), [heads(3)]],
  ['an odd number of heads', imports('one_kv', '--tp', '2'), ['must divide numAttentionHeads=5, got 2: use 1']],
]

/** Runs a command; everything that it made below its TMPDIR, if only for a moment. */
async function refuse(name: string, args: readonly string[], env: Record<string, string> = {}) {
  const scratch = inside(name)
  mkdirSync(scratch)
  const made: string[] = []
  const watcher = watch(scratch, (_event, file) => made.push(String(file)))
  const environment = { ...plainEnvironment(), TMPDIR: scratch, ...env }
  const { code, out, err } = await startCommand(process.execPath, [viaductFile, ...args], environment, folder).ended
  watcher.close()
  return { code, out, err, made: [...made, ...readdirSync(scratch)] }
}

describe.concurrent('impossible', () => {
  test.each(rows.map(([what, args, problems], i) => [`${args[0]}: ${what}`, args, problems, `tmp-${i}`] as const))(
    '%s',
    async (_what, args, problems, name) => {
      const { code, out, err, made } = await refuse(name, args)
      expect([code, out], err).toEqual([2, ''])
      for (const problem of problems) expect(err).toContain(problem)
      // Several problems are counted and have a line each.
      const [first = '', ...lines] = err.trimEnd().split('\n')
      const count = / (\d+) problems:$/.exec(first)?.[1]
      expect(lines.filter((line) => /^ {2}\S/.test(line))).toHaveLength(Number(count ?? 0))
      // The launcher makes a folder there first of all.
      expect(made).toEqual([])
      expect(existsSync(inside('out'))).toBe(false)
    },
  )

  test('by the flags that set the fields', async () => {
    const { err } = await refuse('tmp-flags', verify('--pp', '2', '--vpp', '2'))
    expect(err.trimEnd().split('\n').at(-1)).toBe(
      'flags: --pp is pipelineModelParallelSize, --vpp is virtualPipelineModelParallelSize, --pipeline-layout is pipelineModelParallelLayout',
    )
  })

  test('as data, for programs', async () => {
    const { code, out } = await refuse('tmp-json', logits('--tp', '3', '--ep', '2', '--json'))
    const { error } = JSON.parse(out)
    expect([code, error.code]).toEqual([2, 'ERR_LAYOUT_INVALID'])
    expect(error.details.problems).toHaveLength(3)
  })

  test.each([
    ['2', '--dp 3 times tp·pp·cp = 2 conflicts with 2 ranks: leave it out, or give --dp 1'],
    ['3', 'the 3 ranks must be a multiple of tp·pp·cp = 2: use 2 or 4 ranks'],
  ])('under a launcher of %s ranks, before it looks for the others', async (size, problem) => {
    const launcher = { RANK: '0', WORLD_SIZE: size, LOCAL_RANK: '0', MASTER_ADDR: '127.0.0.1', MASTER_PORT: '1' }
    const { code, err } = await refuse(`tmp-ranks-${size}`, logits('--tp', '2', '--dp', '3'), launcher)
    expect(code, err).toBe(2)
    expect(err).toContain(problem)
  })
})

/** Every choice of one entry of each list. */
const choices = <T>(lists: readonly (readonly T[])[]): T[][] =>
  lists.reduce<T[][]>((all, list) => all.flatMap((chosen) => list.map((one) => [...chosen, one])), [[]])

describe('the ways out that are named', () => {
  test.each(rows.map(([what, args]) => [`${args[0]} ${args.slice(2).join(' ')}`, what, args] as const))(
    'work: %s (%s)',
    async (_line, _what, args) => {
      const problems = await problemsOf(folder, args)
      expect(problems.length).toBeGreaterThan(0)
      const ways = waysOut(problems)
      for (const named of ways) expect(named.length, problems.join('\n')).toBeGreaterThan(0)
      for (const chosen of choices(ways)) {
        const line = changed(args, chosen.flat())
        expect(await problemsOf(folder, line), `${problems.join('\n')}\n${line.join(' ')}`).toEqual([])
      }
    },
  )

  test('work for stages of any numbers', () => {
    const end = fc.option(fc.nat(5), { freq: 1 })
    const parallels = fc.record({
      ...Object.fromEntries(Object.entries(defaultParallel).map(([key, value]) => [key, fc.constant(value)])),
      pipelineModelParallelSize: fc.integer({ min: 1, max: 5 }),
      virtualPipelineModelParallelSize: fc.option(fc.integer({ min: 1, max: 3 }), { freq: 1 }),
      numLayersInFirstPipelineStage: end,
      numLayersInLastPipelineStage: end,
      accountForEmbeddingInPipelineSplit: fc.boolean(),
      accountForLossInPipelineSplit: fc.boolean(),
      pipelineModelParallelLayout: fc.option(fc.constantFrom('Et|tL', 'E|t|L', 'tE|L', 'Ex|L', 'Etm|L'), { freq: 1 }),
    }) as fc.Arbitrary<ParallelConfig>
    const valueOf = (key: string, text: string | undefined) => {
      if (text === undefined) return defaultParallel[key as keyof ParallelConfig]
      return /^(\d+|false)$/.test(text) ? JSON.parse(text) : text
    }
    let refused = 0
    const works = (parallel: ParallelConfig, layers: number) => {
      const problems = pipelineProblems(parallel, layers)
      if (problems.length === 0) return
      refused++
      for (const chosen of choices(waysOut(problems))) {
        const changes = chosen.flat().map(([key, text]) => [key, valueOf(key, text)])
        expect(changes.length).toBeGreaterThan(0)
        const other = { ...parallel, ...Object.fromEntries(changes) }
        expect(pipelineProblems(other, layers), `${problems.join('\n')}\n${JSON.stringify(changes)}`).toEqual([])
      }
    }
    fc.assert(fc.property(parallels, fc.integer({ min: 1, max: 12 }), works), { seed: 5, numRuns: 500 })
    expect(refused).toBeGreaterThan(200)
  })
})
