// The package as its users get it: `npm pack`, installed into an empty folder, imported with types, required, called.
// Wants npm's cache or a registry for the dependencies; without both it fails and says so.
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { copyFixture, type Ended, root, start } from '../cli/commandLine.js'
import { digestsOf, temporaryFolder } from '../hostile/temporary.js'

const folder = temporaryFolder()
const app = join(folder, 'app')
const installed = join(app, 'node_modules/viaduct')
const inApp = (program: string, ...args: string[]) => start(program, args, app).ended
const node = (...args: string[]) => inApp(process.execPath, ...args)

function expectDone({ code, stdout, stderr }: Ended): string {
  expect(code, `${stderr}\n${stdout}`).toBe(0)
  return stdout
}

/** The name that the example asks a hub for, as a folder here. */
const named = 'meta-llama/Llama-3.2-1B'

beforeAll(async () => {
  mkdirSync(app)
  // What `prepack` does, without the set-up: `npm test` has just done it.
  const { scripts } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
    scripts: Record<string, string>
  }
  expect(scripts['prepack']).toBe('node deploy/setup.mjs && node deploy/prebuild.mjs')
  expectDone(await start(process.execPath, ['deploy/prebuild.mjs'], root).ended)
  expectDone(await start('npm', ['pack', '--silent', '--ignore-scripts', '--pack-destination', folder], root).ended)
  const [tarball] = readdirSync(folder).filter((name) => name.endsWith('.tgz'))
  writeFileSync(join(app, 'package.json'), JSON.stringify({ name: 'app', private: true, type: 'module' }))
  const quiet = ['--ignore-scripts', '--prefer-offline', '--no-audit', '--no-fund', '--loglevel=error']
  const install = await inApp('npm', 'install', ...quiet, join('..', tarball as string))
  if (/ENOTFOUND|ECONNREFUSED|ETIMEDOUT|EAI_AGAIN|ENOTCACHED|network/i.test(install.stderr) && install.code !== 0) {
    throw new Error(`this test needs npm's cache or a registry, and neither has the dependencies:\n${install.stderr}`)
  }
  expectDone(install)
  copyFixture('plain', join(app, named))
  for (const name of ['convert.ts', 'pretrain.ts']) cpSync(join(root, 'examples', name), join(app, name))
}, 300_000)

describe('an installed package', () => {
  test('carries its addon, its libraries and its sources, and nothing else', () => {
    const top = readdirSync(installed).sort()
    expect(top).toEqual(['LICENSE', 'README.md', 'dist', 'docs', 'lib', 'package.json', 'prebuilds', 'recipes'])
    expect(existsSync(join(installed, 'prebuilds', `${process.platform}-${process.arch}`, 'viaduct.node'))).toBe(true)
    expect(existsSync(join(installed, 'node_modules'))).toBe(false)
  })

  test('is imported with types', async () => {
    writeFileSync(
      join(app, 'typed.ts'),
      `import { AutoBridge, type GPTModelProvider, ViaductError } from 'viaduct'
import { llama32_1b_pretrain_config } from 'viaduct/recipes/llama'
import { forwardStep, pretrain, type TrainResult } from 'viaduct/train'

const bridge = await AutoBridge.fromHfPretrained('${named}', { trustRemoteCode: true })
const provider: GPTModelProvider = bridge.toMegatronProvider()
const size: number = provider.tensorModelParallelSize
const model = await provider.provideDistributedModel({ wrapWithDdp: false })
for await (const [name, weight] of bridge.exportHfWeights(model, { cpu: true })) {
  const shape: readonly number[] = weight.shape
  if (name === 'model.norm.weight') console.log(size, shape, (await weight.toFloat32Array()).length)
}
await model.dispose()
const cfg = llama32_1b_pretrain_config()
cfg.train.trainIters = 10
export const run = (): Promise<TrainResult> => pretrain(cfg, forwardStep)
// @ts-expect-error the number of steps is a number
cfg.train.trainIters = 'ten'
export const isOurs = (error: unknown): boolean => error instanceof ViaductError && error.code === 'ERR_USAGE'
`,
    )
    // Node's types are not the package's: a user brings them, here from where they are.
    const compilerOptions = {
      module: 'nodenext',
      target: 'es2022',
      lib: ['es2023', 'esnext.disposable'],
      strict: true,
      noEmit: true,
      exactOptionalPropertyTypes: true,
      types: ['node'],
      typeRoots: [join(root, 'node_modules/@types')],
    }
    writeFileSync(
      join(app, 'tsconfig.json'),
      JSON.stringify({ compilerOptions, files: ['typed.ts', 'convert.ts', 'pretrain.ts'] }),
    )
    const tsc = join(root, 'node_modules/typescript/bin/tsc')
    expectDone(await node(tsc, '-p', '.'))
    const wrong = readFileSync(join(app, 'typed.ts'), 'utf8').replace('// @ts-expect-error', '//')
    writeFileSync(join(app, 'wrong.ts'), wrong)
    writeFileSync(join(app, 'tsconfig.wrong.json'), JSON.stringify({ compilerOptions, files: ['wrong.ts'] }))
    const refused = await node(tsc, '-p', 'tsconfig.wrong.json')
    expect([refused.code === 0, refused.stdout]).toEqual([false, expect.stringContaining('wrong.ts')])
    expect(expectDone(await node('--import', 'tsx', 'typed.ts'))).toContain('1 [ 32 ] 32')
  })

  test('is required', async () => {
    writeFileSync(
      join(app, 'required.cjs'),
      `const { AutoBridge, exitCodes } = require('viaduct')
const { pretrain } = require('viaduct/train')
const { llama_tiny_cpu_pretrain_config } = require('viaduct/recipes/llama')
console.log(AutoBridge.listSupportedModels().join(), exitCodes.input, typeof pretrain, typeof llama_tiny_cpu_pretrain_config().model.hiddenSize)
`,
    )
    expect(expectDone(await node('required.cjs'))).toMatch(/^LlamaForCausalLM,.* 3 function number\n$/)
  })

  test('gives its other modules only through its entry points', async () => {
    const { code, stderr } = await node('-e', `import('viaduct/dist/lib/base/errors.js')`)
    expect([code === 0, stderr]).toEqual([false, expect.stringContaining('ERR_PACKAGE_PATH_NOT_EXPORTED')])
  })

  test('has the command, which starts ranks', async () => {
    const command = join(app, 'node_modules/.bin/viaduct')
    expect(expectDone(await inApp(command, 'models'))).toContain('LlamaForCausalLM')
    const doctor = JSON.parse(expectDone(await inApp(command, 'doctor', '--json'))) as {
      findings: { item: string; detail: string }[]
    }
    expect(doctor.findings.find(({ item }) => item === 'addon')?.detail).toContain(
      join('node_modules/viaduct/prebuilds'),
    )
    expectDone(await inApp(command, 'import', named, 'ckpt', '--tp', '2'))
    expectDone(await inApp(command, 'export', 'ckpt', 'out'))
    expect(digestsOf(join(app, 'out'))).toEqual(digestsOf(join(app, named)))
    expectDone(await inApp(command, 'verify', named, '--tp', '2'))
  })

  test('runs the example of conversion, on a folder of the name that it asks for', async () => {
    const output = expectDone(await inApp(join(app, 'node_modules/.bin/viaduct'), 'run', 'convert.ts'))
    expect(output).toContain('lm_head.weight [ 97, 32 ]')
    expect(digestsOf(join(app, 'hf_exports/llama32_1b'))).toEqual(digestsOf(join(app, named)))
  })

  test('runs the example of training on two ranks, with a smaller model and fewer tokens by overrides', async () => {
    const overrides = [
      ...[
        'num_layers=1',
        'hidden_size=32',
        'ffn_hidden_size=64',
        'num_attention_heads=4',
        'num_query_groups=2',
        'kv_channels=8',
      ],
      ...['seq_length=16', 'tensor_model_parallel_size=2'],
    ].map((text) => `model.${text}`)
    const shorter = [
      'train.train_iters=2',
      'train.global_batch_size=2',
      'validation.eval_iters=1',
      'logger.log_interval=1',
    ]
    const command = join(app, 'node_modules/.bin/viaduct')
    const output = expectDone(
      await inApp(command, 'run', '--nproc-per-node', '2', 'pretrain.ts', ...overrides, ...shorter),
    )
    expect(output).toContain('vocabulary 8192')
    expect(existsSync(join(app, 'nemo_experiments/default/checkpoints/iter_0000002/index.json'))).toBe(true)
  })
})
