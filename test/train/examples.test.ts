// The two scripts of the README, as they stand in examples/: on a local folder and with overrides that stand here.
import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, it } from 'vitest'
import { trainingFixture } from './fixtureRun.js'
import { steps } from './startRanks.js'

const root = join(dirname(fileURLToPath(import.meta.url)), '../..')
const folder = mkdtempSync(join(tmpdir(), 'viaduct-examples-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

function node(args: readonly string[]): { code: number | null; output: string } {
  const tsx = fileURLToPath(import.meta.resolve('tsx'))
  const result = spawnSync(process.execPath, ['--import', tsx, ...args], {
    cwd: folder,
    encoding: 'utf8',
    env: { ...process.env, VIADUCT_NUM_THREADS: '1' },
  })
  return { code: result.status, output: result.stdout + result.stderr }
}

describe('examples/convert.ts', () => {
  it('asks for a hub id that is no folder and not in the cache, in words that help', () => {
    const { code, output } = node([join(root, 'examples/convert.ts')])
    expect(code).not.toBe(0)
    expect(output).toMatch(/meta-llama\/Llama-3\.2-1B/)
    expect(output).toMatch(/HF_HUB_OFFLINE/)
  }, 60_000)

  it('gives a folder of that name back byte for byte', () => {
    const source = join(folder, 'meta-llama/Llama-3.2-1B')
    mkdirSync(source, { recursive: true })
    for (const name of ['config.json', 'model.safetensors']) cpSync(join(trainingFixture, name), join(source, name))
    const { code, output } = node([join(root, 'examples/convert.ts')])
    expect(code, output).toBe(0)
    expect(output).toContain('model.embed_tokens.weight [ 131, 64 ]')
    for (const name of ['config.json', 'model.safetensors']) {
      expect(readFileSync(join(folder, 'hf_exports/llama32_1b', name)).equals(readFileSync(join(source, name)))).toBe(
        true,
      )
    }
  }, 60_000)
})

describe('examples/pretrain.ts', () => {
  const overrides = [
    'model.num_layers=2',
    'model.hidden_size=64',
    'model.ffn_hidden_size=128',
    'model.num_attention_heads=4',
    'model.num_query_groups=2',
    'model.kv_channels=16',
    'model.seq_length=32',
    'train.train_iters=4',
    'train.global_batch_size=4',
    'scheduler.lr_warmup_iters=1',
    'validation.eval_iters=1',
    'logger.log_interval=1',
  ]

  it.each([1, 2])(
    'pretrains on %i ranks',
    (ranks) => {
      const metrics = join(folder, `metrics-${ranks}.jsonl`)
      const save = join(folder, `save-${ranks}`)
      const launcher =
        ranks === 1 ? [] : [join(root, 'lib/cli/main.ts'), 'run', '--standalone', '--nproc-per-node', '2']
      const { code, output } = node([
        ...launcher,
        join(root, 'examples/pretrain.ts'),
        ...overrides,
        `model.tensor_model_parallel_size=${ranks}`,
        `logger.metrics_file=${metrics}`,
        `checkpoint.save=${save}`,
        `checkpoint.load=${save}`,
      ])
      expect(code, output).toBe(0)
      expect(steps(metrics).map(({ step }) => step)).toEqual([1, 2, 3, 4])
      expect(output).toContain('bfloat16, 2 layers of 64, vocabulary 8192')
      expect(existsSync(join(save, 'iter_0000004/hf/config.json'))).toBe(true)
      // First loss of a model that knows nothing: near log(8192).
      expect(Math.abs((steps(metrics)[0]?.loss ?? 0) - Math.log(8192))).toBeLessThan(0.5)
    },
    120_000,
  )

  it('is refused unshrunk where memory does not suffice, before any is taken', () => {
    const { code, output } = node([join(root, 'examples/pretrain.ts'), 'model.num_layers=4000'])
    expect(code).not.toBe(0)
    expect(output).toContain('a smaller recipe: llama_tiny_cpu_pretrain_config')
  }, 60_000)
})
