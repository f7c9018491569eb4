// `viaduct train`: a few steps, a checkpoint, the same numbers after a resume, SIGTERM, and what is refused before a step.
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { digestsOf, temporaryFolder } from '../hostile/temporary.js'
import { startViaduct, viaduct, viaductJson } from './commandLine.js'
import { writeWords } from './wordsFolder.js'

const folder = temporaryFolder()
const inside = (...names: string[]) => join(folder, ...names)

interface Result {
  readonly step: number
  readonly losses: readonly number[]
  readonly validation: { readonly loss: number } | null
  readonly checkpoint: string | null
  readonly reason: string
}

const tiny = [
  'llama_tiny_cpu_pretrain_config',
  'model.num_layers=1',
  'model.seq_length=32',
  'model.vocab_size=128',
  'train.global_batch_size=4',
  'train.micro_batch_size=2',
  'scheduler.lr_warmup_fraction=0.2',
  'scheduler.lr_decay_iters=6',
]

describe('train', () => {
  test('trains, saves, and resumes bit for bit', async () => {
    const whole = await viaductJson<Result>(folder, ['train', ...tiny, 'train.train_iters=6', '--save', 'whole'])
    expect(whole).toMatchObject({ step: 6, reason: 'done', checkpoint: inside('whole', 'iter_0000006') })
    expect(whole.losses).toHaveLength(6)
    expect(whole.losses[0]).toBeCloseTo(Math.log(128), 0)
    const first = await viaductJson<Result>(folder, ['train', ...tiny, 'train.train_iters=4', '--save', 'parts'])
    const second = await viaductJson<Result>(folder, ['train', ...tiny, 'train.train_iters=6', '--save', 'parts'])
    expect([...first.losses, ...second.losses]).toEqual(whole.losses)
    expect(second.losses).toHaveLength(2)
    const weights = (dir: string) =>
      digestsOf(inside(dir, 'iter_0000006')).filter((line) => line.includes('.safetensors'))
    expect(weights('parts')).toEqual(weights('whole'))
    expect(weights('parts').length).toBeGreaterThan(0)
  })

  test('prints a line a step on two ranks, and the result exports', async () => {
    const { code, stdout, stderr } = await viaduct(
      folder,
      'train',
      ...tiny,
      'train.train_iters=3',
      '--save',
      'two',
      '--tp',
      '2',
    )
    expect([code, stderr]).toEqual([0, ''])
    expect(stdout).toMatch(/layout +2 ranks: tp 2, dp 1, sequence parallelism$/m)
    expect(stdout.match(/^ +[123] +\d\.\d{5} /gm)).toHaveLength(3)
    expect((await viaduct(folder, 'export', 'two', 'two-hf')).code).toBe(0)
    expect(JSON.parse(readFileSync(inside('two-hf', 'config.json'), 'utf8'))).toMatchObject({
      architectures: ['LlamaForCausalLM'],
      vocab_size: 128,
    })
    expect((await viaduct(folder, 'verify', 'two-hf', '--ckpt', 'two', '--tp', '2')).code).toBe(0)
  })

  test('starts from --load, goes on from --save once it holds a checkpoint, and refuses a --load without one', async () => {
    const args = ['train', ...tiny, '--load', 'base', '--save', 'next']
    const none = await viaduct(folder, ...args, 'train.train_iters=6')
    expect([none.code, none.stderr]).toEqual([3, expect.stringMatching(/ERR_CHECKPOINT.*base/)])
    const base = await viaductJson<Result>(folder, ['train', ...tiny, 'train.train_iters=2', '--save', 'base'])
    const first = await viaductJson<Result>(folder, [...args, 'train.train_iters=4'])
    const second = await viaductJson<Result>(folder, [...args, 'train.train_iters=6'])
    expect([base, first, second].map(({ losses }) => losses.length)).toEqual([2, 2, 2])
    const { stdout } = await viaduct(folder, 'train', ...tiny, 'train.train_iters=2', `checkpoint.load=${inside('no')}`)
    expect(stdout).toMatch(/note +no checkpoint in .*no: the weights begin at their initial values/)
  })

  test('goes on from a Hugging Face folder, on text, and generates from the checkpoint', async () => {
    writeWords(inside('words'))
    mkdirSync(inside('text'))
    writeFileSync(inside('text', 'a.txt'), 'the cat sat on the mat. '.repeat(400))
    const args = [
      'train',
      '--hf',
      'words',
      '--data',
      'text',
      '--save',
      'tuned',
      'train.train_iters=4',
      'train.global_batch_size=2',
    ]
    const { losses, checkpoint } = await viaductJson<Result>(folder, [...args, 'model.seq_length=32'])
    expect(losses).toHaveLength(4)
    expect(losses[3]).toBeLessThan(losses[0] as number)
    expect(checkpoint).toBe(inside('tuned', 'iter_0000004'))
    const { tokens } = await viaductJson<{ tokens: number[] }>(folder, [
      'generate',
      'tuned',
      '--prompt',
      'the',
      '--max-new-tokens',
      '4',
      '--ignore-eos',
    ])
    expect(tokens).toHaveLength(4)
    // The tokenizer has 260 tokens: a model with fewer rows is refused before a step.
    const small = await viaduct(folder, 'train', ...tiny, '--tokenizer', 'words', '--data', 'text')
    expect([small.code, small.stderr]).toEqual([2, expect.stringMatching(/260 tokens but model.vocabSize=128/)])
  })

  test('--dry-run tells configuration and price and starts nothing', async () => {
    const { code, stdout, stderr } = await viaduct(
      folder,
      'train',
      ...tiny,
      'train.train_iters=9999',
      '--save',
      'dry',
      '--tp',
      '2',
      '--dry-run',
    )
    expect(code).toBe(0)
    expect(stdout).toContain('trainIters: 9999')
    expect(stdout).toContain('tensorModelParallelSize: 2')
    expect(stdout).toContain('sequenceParallel: true')
    expect(stderr).toMatch(/memory +\d/)
    expect(existsSync(inside('dry'))).toBe(false)
    const json = await viaductJson<{ ranks: number; config: { train: { trainIters: number } } }>(folder, [
      'train',
      ...tiny,
      'train.train_iters=7',
      '--dry-run',
      '--tp',
      '2',
      '--no-sp',
    ])
    expect(json).toMatchObject({ ranks: 2, config: { train: { trainIters: 7 }, model: { sequenceParallel: false } } })
    // What it prints is a configuration again.
    writeFileSync(inside('run.yaml'), `recipe: llama_tiny_cpu_pretrain_config\n${stdout}`)
    const again = await viaduct(folder, 'train', 'run.yaml', '--dry-run')
    expect(again.code).toBe(0)
    expect(again.stdout).toBe(stdout)
    // A dtype that mixedPrecision replaces is told; nothing is told where they agree.
    const replaced = await viaduct(folder, 'train', ...tiny, 'model.params_dtype=float16', '--dry-run')
    expect(replaced.stderr).toContain('mixedPrecision=fp32 computes in float32, not in model.paramsDtype=float16')
    expect(replaced.stderr).toMatch(/^model .* parameters, float32/m)
    expect(stderr).not.toContain('mixedPrecision')
  })

  test('offload by flags and by overrides, host memory told, all problems together', async () => {
    const dry = (...args: string[]) => ['train', ...tiny, 'model.num_layers=3', '--dry-run', ...args]
    const flags = ['--cpu-offloading-num-layers', '2', '--optimizer-cpu-offload', '--optimizer-offload-fraction', '0.5']
    const told = await viaductJson<{ config: Record<string, unknown> }>(folder, dry(...flags))
    expect(told.config['model']).toMatchObject({ cpuOffloading: true, cpuOffloadingNumLayers: 2 })
    const optimizer = { optimizerCpuOffload: true, optimizerOffloadFraction: 0.5 }
    expect(told.config['optimizer']).toMatchObject(optimizer)
    const pasted = ['optimizer.optimizer_cpu_offload=true', 'optimizer.optimizer_offload_fraction=0.5']
    const same = await viaductJson<{ config: Record<string, unknown> }>(folder, dry(...pasted))
    expect(same.config['optimizer']).toMatchObject(optimizer)
    const wrong = ['model.cpu_offloading=true', 'model.cpu_offloading_num_layers=3', '--recompute-granularity', 'full']
    const { code, stderr } = await viaduct(folder, ...dry(...wrong, 'model.cpu_offloading_weights=true'))
    expect(code).toBe(2)
    for (const problem of [
      'model.cpuOffloadingNumLayers must be at least 1 and less than numLayers=3, got 3: use 1 to 2',
      'model.cpuOffloadingWeights=true is not built',
      'model.cpuOffloading=true does not go with recomputeGranularity="full"',
    ])
      expect(stderr).toContain(problem)
  })

  test('recompute by flags and by overrides, all problems together', async () => {
    const dry = (...args: string[]) => ['train', ...tiny, 'model.num_layers=3', '--dry-run', ...args]
    const modelOf = async (...args: string[]) =>
      (await viaductJson<{ config: { model: unknown } }>(folder, dry(...args))).config.model
    const block = ['--recompute-granularity', 'full', '--recompute-method', 'block', '--recompute-num-layers', '2']
    expect(await modelOf(...block)).toMatchObject({
      recomputeGranularity: 'full',
      recomputeMethod: 'block',
      recomputeNumLayers: 2,
    })
    expect(await modelOf('--recompute-granularity', 'selective', '--recompute-modules', 'layernorm,mlp')).toMatchObject(
      {
        recomputeGranularity: 'selective',
        recomputeModules: ['layernorm', 'mlp'],
      },
    )
    const pasted = ['model.recompute_granularity=selective', 'model.recompute_modules=[core_attn]']
    expect(await modelOf(...pasted)).toMatchObject({
      recomputeGranularity: 'selective',
      recomputeModules: ['core_attn'],
    })
    const wrong = ['--recompute-method', 'uniform', '--recompute-num-layers', '9', '--recompute-modules', 'moe_act,mlp']
    const { code, stderr } = await viaduct(folder, ...dry(...wrong))
    expect(code).toBe(2)
    for (const problem of [
      'model.recomputeMethod="uniform" needs recomputeGranularity=\'full\'',
      "model.recomputeNumLayers=9 needs recomputeGranularity='full'",
      'model.recomputeNumLayers must be at most 3',
      'model.recomputeModules has "moe_act", which belongs to activations of experts alone, not built yet',
    ])
      expect(stderr).toContain(problem)
  })

  test('finishes the step, saves, and exits with 143 on SIGTERM', async () => {
    for (const tp of ['1', '2']) {
      const { child, ended } = startViaduct(
        folder,
        'train',
        ...tiny,
        'train.train_iters=100000',
        'scheduler.lr_decay_iters=100000',
        '--save',
        `term${tp}`,
        '--tp',
        tp,
      )
      let seen = ''
      await new Promise<void>((go) => {
        child.stdout?.on('data', (chunk) => {
          seen += chunk
          if (/^ +2 +\d\.\d{5} /m.test(seen)) go()
        })
        child.on('close', () => go())
      })
      child.kill('SIGTERM')
      const { code, signal, stdout, stderr } = await ended
      expect([code, signal], stderr).toEqual([143, null])
      expect(stdout).toContain('SIGTERM')
      const [saved] = readdirSync(inside(`term${tp}`)).filter((name) => name.startsWith('iter_'))
      expect(readFileSync(inside(`term${tp}`, 'latest_checkpointed_iteration.txt'), 'utf8').trim()).toBe(
        String(Number(saved?.slice(5))),
      )
      const step = Number(saved?.slice(5))
      expect(step).toBeGreaterThan(1)
      const after = await viaductJson<Result>(folder, [
        'train',
        ...tiny,
        `train.train_iters=${step + 1}`,
        'scheduler.lr_decay_iters=100000',
        '--save',
        `term${tp}`,
      ])
      expect(after.losses).toHaveLength(1)
    }
  })

  test('tells all that is wrong before a process starts', async () => {
    for (const [args, code, words] of [
      [['nope_config'], 2, 'viaduct recipes'],
      [['llama_tiny_cpu_pretrain_confg'], 2, 'did you mean llama_tiny_cpu_pretrain_config'],
      [[...tiny, 'train.train_itres=1'], 2, 'trainIters'],
      [[...tiny, 'train.train_iters=many'], 2, 'trainIters'],
      [[...tiny, 'train.global_batch_size=3', 'scheduler.lr_warmup_iters=999'], 2, 'globalBatchSize=3'],
      [[...tiny, '--cp', '3', '--dp', '3'], 2, 'globalBatchSize'],
      [[...tiny, '--pp', '3'], 2, 'cannot be spread evenly over 3 stages'],
      [[...tiny, '--data', 'no-such-text'], 2, '--tokenizer'],
      [[...tiny, '--tokenizer', 'words', '--data', 'no-such-text', 'model.vocab_size=260'], 3, 'no-such-text'],
      [['missing.yaml'], 3, 'missing.yaml'],
      [['--hf', 'meta-llama/Llama-3.2-1B'], 2, 'hub id'],
      [[], 2, 'expected a recipe'],
    ] as const) {
      const ended = await viaduct(folder, 'train', ...args)
      expect([args.at(-1), ended.code, ended.stderr]).toEqual([args.at(-1), code, expect.stringContaining(words)])
    }
  })
})
