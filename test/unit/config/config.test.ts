// Configs: wrong keys name the right ones, overrides and YAML, all problems of a run in one error before any process starts.
import { describe, expect, it } from 'vitest'
import { applyOverrides, applyYaml, toPlain, toYaml } from '../../../lib/config/overrides.js'
import { configProblems, resolve } from '../../../lib/config/resolve.js'
import { type RunConfig, runConfig } from '../../../lib/config/runConfig.js'
import { GPTModelProvider } from '../../../lib/models/provider.js'
import { parameterCount } from '../../../lib/plan/cost.js'
import {
  mixtral_8x7b_pretrain_config,
  mixtral_8x22b_pretrain_config,
  olmoe_7b_pretrain_config,
  qwen3_30b_a3b_pretrain_config,
  qwen3_moe_tiny_cpu_pretrain_config,
  qwen15_moe_a2_7b_pretrain_config,
} from '../../../recipes/experts.js'
import { llama_tiny_cpu_pretrain_config, llama32_1b_pretrain_config } from '../../../recipes/llama.js'

const tiny = (): RunConfig =>
  runConfig({
    model: new GPTModelProvider({
      numLayers: 2,
      hiddenSize: 64,
      numAttentionHeads: 4,
      vocabSize: 100,
      maxPositionEmbeddings: 64,
      seqLength: 32,
    }),
    train: { trainIters: 10, globalBatchSize: 8, microBatchSize: 2 },
    scheduler: { lrWarmupIters: 2 },
  })

describe('sealing', () => {
  it.each<[string, (cfg: RunConfig) => void, string]>([
    [
      'snake_case',
      (cfg) => Object.assign(cfg.train, { train_iters: 3 }),
      '[config.train] expected a known key, got "train_iters": write trainIters',
    ],
    ['a misspelling', (cfg) => Object.assign(cfg.optimizer, { wieghtDecay: 0 }), 'write weightDecay'],
    ['an unknown section', (cfg) => Object.assign(cfg, { optimiser: {} }), 'write optimizer'],
    [
      'reading a wrong section',
      (cfg) => void ((cfg as unknown as { trian: { trainIters: number } }).trian.trainIters = 1),
      'write train',
    ],
    [
      'the model',
      (cfg) => Object.assign(cfg.model, { tensor_model_parallel_size: 2 }),
      'write tensorModelParallelSize',
    ],
    ['undefined', (cfg) => Object.assign(cfg.rng, { seed: undefined }), 'expected a value for seed'],
    ['a section with a wrong key', (cfg) => Object.assign(cfg, { rng: { sede: 1 } }), 'write seed'],
  ])('%s throws at the assignment', (_, change, message) => {
    expect(() => change(tiny())).toThrow(
      expect.objectContaining({ code: 'ERR_CONFIG', message: expect.stringContaining(message) }),
    )
  })

  it('a section that is replaced keeps the defaults of what is left out', () => {
    const cfg = tiny()
    Object.assign(cfg, { optimizer: { lr: 1 } })
    expect({ ...cfg.optimizer }).toMatchObject({ lr: 1, adamBeta1: 0.9, clipGrad: 1 })
  })

  it('is frozen once resolved', () => {
    const cfg = tiny()
    resolve(cfg, 1)
    expect(() => (cfg.train.trainIters = 5)).toThrow('trainIters cannot change')
    expect(() => (cfg.model.hiddenSize = 5)).toThrow('hiddenSize cannot change')
    expect(() => (cfg.mixedPrecision = 'fp32')).toThrow('mixedPrecision cannot change')
  })
})

describe('overrides', () => {
  it('take snake_case and camelCase, values by YAML', () => {
    const cfg = tiny()
    applyOverrides(cfg, [
      'train.train_iters=7',
      'optimizer.lr=1e-4',
      'optimizer.adam_beta1=0.8',
      'model.tensor_model_parallel_size=2',
      'model.ropeScaling={type: linear, factor: 2}',
      'checkpoint.save=./out dir',
      'checkpoint.save_interval=5',
      'dataset.path=[a, b]',
      'mixed_precision=fp32',
      'train.exitSignalHandler=false',
      'validation.evalInterval=null',
    ])
    expect(cfg.train.trainIters).toBe(7)
    expect(cfg.optimizer).toMatchObject({ lr: 1e-4, adamBeta1: 0.8 })
    expect(cfg.model.tensorModelParallelSize).toBe(2)
    expect(cfg.model.ropeScaling).toEqual({ type: 'linear', factor: 2 })
    expect(cfg.checkpoint).toMatchObject({ save: './out dir', saveInterval: 5 })
    expect(cfg.dataset.path).toEqual(['a', 'b'])
    expect(cfg.mixedPrecision).toBe('fp32')
    expect(cfg.train.exitSignalHandler).toBe(false)
    expect(cfg.validation.evalInterval).toBeNull()
  })

  it.each([
    ['train.train_itres=3', 'write trainIters'],
    ['trian.train_iters=3', 'write train'],
    ['model.hiddensise=3', 'write hiddenSize'],
    ['train.trainIters', 'expected section.key=value'],
    ['train=3', 'expected section.key=value with one section'],
    ['train.trainIters={', 'is no YAML'],
  ])('%s is refused', (line, message) => {
    expect(() => applyOverrides(tiny(), [line])).toThrow(message)
  })

  it('come back from YAML', () => {
    const cfg = tiny()
    applyOverrides(cfg, ['train.train_iters=77', 'model.numLayers=3', 'checkpoint.save=x'])
    const again = tiny()
    applyYaml(again, toYaml(cfg))
    expect(toPlain(again)).toEqual(toPlain(cfg))
    applyYaml(again, 'train:\n  global_batch_size: 4\nmixed_precision: null\n')
    expect(again.train.globalBatchSize).toBe(4)
    expect(again.mixedPrecision).toBeNull()
    expect(() => applyYaml(again, 'train:\n  globalBatchSizes: 4\n')).toThrow('write globalBatchSize')
    expect(() => applyYaml(again, '- 1')).toThrow('expected sections')
  })
})

describe('resolve', () => {
  it('derives what follows', () => {
    const cfg = tiny()
    cfg.model.tensorModelParallelSize = 2
    expect(resolve(cfg, 4)).toMatchObject({
      dataParallelSize: 2,
      numMicroBatches: 2,
      vocabSize: 100,
      paddedVocabSize: 256,
      paramsDtype: 'bfloat16',
      lrDecayIters: 10,
      lrWarmupIters: 2,
    })
  })

  it("takes Megatron-Bridge's words for data parallelism, and refuses what sums in less than float32", () => {
    const cfg = tiny()
    expect(cfg.ddp).toMatchObject({ useDistributedOptimizer: true, overlapGradReduce: true, overlapParamGather: true })
    applyOverrides(cfg, ['ddp.use_distributed_optimizer=false', 'ddp.bucket_size=1000'])
    expect(configProblems(cfg, 2)).toEqual([
      'ddp.overlapParamGather=true needs ddp.useDistributedOptimizer=true: set both or neither',
    ])
    applyOverrides(cfg, ['ddp.overlap_param_gather=false', 'ddp.grad_reduce_in_fp32=false'])
    expect(configProblems(cfg, 2)).toEqual([expect.stringMatching(/^ddp\.gradReduceInFp32: .*true, got false$/)])
  })

  it('reports every problem together, naming the fields', () => {
    const cfg = tiny()
    cfg.model.tensorModelParallelSize = 3
    cfg.train.globalBatchSize = 7
    cfg.optimizer.minLr = 1
    cfg.scheduler.lrWarmupIters = 20
    cfg.dataset.kind = 'text'
    cfg.tokenizer.vocabSize = 200
    const { problems } = (() => {
      try {
        resolve(cfg, 6)
      } catch (error) {
        return (error as { details: { problems: string[] } }).details
      }
      throw new Error('resolved')
    })()
    expect(problems).toEqual([
      'model.tensorModelParallelSize must divide numAttentionHeads=4, got 3: use 1, 2, 4',
      'model.tensorModelParallelSize must divide numQueryGroups=4 or be a multiple of it, got 3: use 1, 2, 4',
      'model.tensorModelParallelSize must divide ffnHiddenSize=256, got 3: use 1, 2, 4',
      'train.globalBatchSize=7 must be divisible by train.microBatchSize=2 times the data-parallel size 2 (6 ranks / tp·pp·cp = 3): use train.globalBatchSize=4 or 8',
      'optimizer.minLr=1 is larger than optimizer.lr=0.0003: use at most 0.0003',
      'scheduler.lrWarmupIters=20 must be less than scheduler.lrDecayIters=10 (train.trainIters): shorten the warm-up or set a longer decay',
      'tokenizer.vocabSize=200 is more than model.vocabSize=100: tokens would have no embedding',
      'dataset.path must be set for dataset.kind=text',
      'dataset.kind=text needs tokenizer.tokenizerType=HuggingFaceTokenizer and tokenizer.tokenizerModel (--tokenizer DIR)',
    ])
  })

  it.each<[string, (cfg: RunConfig) => void, number, string]>([
    ['world too small', (cfg) => (cfg.model.tensorModelParallelSize = 4), 2, 'tp·pp·cp = 4 but 2 ranks run'],
    ['a wrong type', (cfg) => Object.assign(cfg.train, { trainIters: 'ten' }), 1, 'train.trainIters: expected'],
    ['an unknown word', (cfg) => Object.assign(cfg.scheduler, { lrDecayStyle: 'cosin' }), 1, 'scheduler.lrDecayStyle'],
    [
      'WSD without its length',
      (cfg) => (cfg.scheduler.lrDecayStyle = 'WSD'),
      1,
      'scheduler.lrWsdDecayIters must be set',
    ],
    [
      'a save interval without a folder',
      (cfg) => (cfg.checkpoint.saveInterval = 5),
      1,
      'checkpoint.saveInterval is set but checkpoint.save is null',
    ],
    ['no validation data', (cfg) => (cfg.dataset.split = '1'), 1, 'leaves no validation data'],
    [
      'a sequence longer than positions',
      (cfg) => (cfg.model.seqLength = 65),
      1,
      'model.seqLength=65 is longer than model.maxPositionEmbeddings=64',
    ],
  ])('%s', (_, change, world, message) => {
    const cfg = tiny()
    change(cfg)
    expect(configProblems(cfg, world).join('\n')).toContain(message)
    expect(() => resolve(cfg, world)).toThrow(expect.objectContaining({ code: 'ERR_CONFIG', kind: 'usage' }))
  })
})

describe('recipes', () => {
  it('are sound, and the lines of the first script work', () => {
    const cfg = llama32_1b_pretrain_config()
    cfg.train.trainIters = 10
    cfg.scheduler.lrDecayIters = 10000
    cfg.model.vocabSize = 8192
    cfg.tokenizer.vocabSize = cfg.model.vocabSize
    expect(resolve(cfg, 1)).toMatchObject({ numMicroBatches: 512, paddedVocabSize: 8192, paramsDtype: 'bfloat16' })
    expect(resolve(llama_tiny_cpu_pretrain_config(), 1)).toMatchObject({ paramsDtype: 'float32', numMicroBatches: 1 })
  })
  it('of experts have the published sizes, and fit their layouts', () => {
    const [qwen, olmoe] = [qwen3_30b_a3b_pretrain_config(), olmoe_7b_pretrain_config()]
    expect([qwen, olmoe].map(({ model }) => parameterCount(model))).toEqual([30_532_122_624, 6_919_161_856])
    expect(resolve(qwen, 8)).toMatchObject({ numMicroBatches: 32, dataParallelSize: 1 })
    expect(resolve(olmoe, 8)).toMatchObject({ numMicroBatches: 256, dataParallelSize: 8 })
    expect(parameterCount(qwen15_moe_a2_7b_pretrain_config().model)).toBe(14_315_784_192)
    expect(resolve(qwen15_moe_a2_7b_pretrain_config(), 4)).toMatchObject({ numMicroBatches: 8, dataParallelSize: 4 })
    const mixtrals = [mixtral_8x7b_pretrain_config(), mixtral_8x22b_pretrain_config()] as const
    expect(mixtrals.map(({ model }) => parameterCount(model))).toEqual([46_702_792_704, 140_620_634_112])
    expect(resolve(mixtrals[0], 32)).toMatchObject({ numMicroBatches: 32, dataParallelSize: 8 })
    expect(resolve(mixtrals[1], 128)).toMatchObject({ numMicroBatches: 32, dataParallelSize: 8 })
    expect(resolve(qwen3_moe_tiny_cpu_pretrain_config(), 1)).toMatchObject({ paramsDtype: 'float32' })
  })
})
