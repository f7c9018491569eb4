// The program as a whole: help, information, wrong use, exit codes, `viaduct run`, and how soon it starts.
import { execFileSync } from 'node:child_process'
import { copyFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { temporaryFolder } from '../hostile/temporary.js'
import { copyFixture, plainEnvironment, start, viaduct, viaductFile, viaductJson } from './commandLine.js'

const folder = temporaryFolder()
const inside = (...names: string[]) => join(folder, ...names)
const commands = [
  'import',
  'export',
  'verify',
  'logits',
  'generate',
  'train',
  'plan',
  'run',
  'models',
  'recipes',
  'doctor',
]

describe('help', () => {
  test('lists every command', async () => {
    const { code, stdout } = await viaduct(folder, '--help')
    expect(code).toBe(0)
    for (const name of commands) expect(stdout).toMatch(new RegExp(`^  ${name} `, 'm'))
    expect(stdout).toContain('Exit codes: 0 done, 1 the check failed, 2 wrong use, 3 bad input, 4 a fault at run time')
  })

  test.each(commands)('of %s has an example that is its own', async (name) => {
    const { code, stdout } = await viaduct(folder, name, '--help')
    expect(code).toBe(0)
    expect(stdout).toMatch(new RegExp(`Example:\n  \\$ viaduct ${name}`))
  })

  test('comes soon: nothing of the library is loaded for it', () => {
    const soonest = (...args: string[]) => {
      const times = Array.from({ length: 5 }, () => {
        const begun = process.hrtime.bigint()
        execFileSync(process.execPath, args, { cwd: folder, env: plainEnvironment(), stdio: 'ignore' })
        return Number(process.hrtime.bigint() - begun) / 1e6
      })
      return Math.min(...times)
    }
    writeFileSync(inside('empty.mjs'), '')
    // 150 ms on a quiet machine, where an empty script takes some 50: as a ratio, for machines that are not quiet.
    expect(soonest(viaductFile, '--help')).toBeLessThan(3 * soonest(inside('empty.mjs')))
  })
})

describe('information', () => {
  test('models, recipes and version, for people and programs', async () => {
    const { models } = await viaductJson<{ models: object[] }>(folder, ['models'])
    expect(models).toEqual([
      { architecture: 'LlamaForCausalLM', modelType: 'llama', converts: true, runs: true },
      { architecture: 'MixtralForCausalLM', modelType: 'mixtral', converts: true, runs: true },
      { architecture: 'OlmoeForCausalLM', modelType: 'olmoe', converts: true, runs: true },
      { architecture: 'Qwen2MoeForCausalLM', modelType: 'qwen2_moe', converts: true, runs: true },
      { architecture: 'Qwen3MoeForCausalLM', modelType: 'qwen3_moe', converts: true, runs: true },
    ])
    expect((await viaduct(folder, 'models')).stdout).toMatch(
      /^LlamaForCausalLM +llama +yes +yes\s.*^Mixtral\w+ +mixtral +yes +yes/ms,
    )
    const { recipes } = await viaductJson<{ recipes: { name: string }[] }>(folder, ['recipes'])
    expect(recipes.map((r) => r.name)).toContain('llama32_1b_pretrain_config')
    expect((await viaduct(folder, 'recipes')).stdout).toMatch(/^llama_tiny_cpu_pretrain_config +llama +/m)
    expect((await viaduct(folder, '--version')).stdout).toMatch(/^\d+\.\d+\.\d+\n$/)
  })

  test('doctor finds the addon and what computes', async () => {
    const { findings } = await viaductJson<{ findings: { item: string; state: string; detail: string }[] }>(folder, [
      'doctor',
    ])
    const of = (item: string) => findings.find((finding) => finding.item === item)
    expect(of('addon')).toMatchObject({ state: 'ok', detail: expect.stringContaining('viaduct.node') })
    expect(of('cpu backend')).toMatchObject({ state: 'ok' })
    expect((await viaduct(folder, 'doctor')).stdout).toMatch(/^node +ok +v\d+/m)
  })
})

describe('wrong use', () => {
  test.each([
    [['importt'], /unknown command 'importt'[\s\S]*import/],
    [['import'], /missing required argument 'hf'/],
    [['import', 'a'], /missing required argument 'ckpt'/],
    [['import', 'a', 'b', 'c'], /too many arguments/],
    [['import', 'a', 'b', '--tpp', '2'], /unknown option '--tpp'/],
    [['import', 'a', 'b', '--tp', '0'], /whole number of at least 1/],
    [['import', 'a', 'b', '--dtype', 'float23'], /expected one of float32, bfloat16/],
    [['import', 'a', 'b', '--dtype', 'int8'], /expected one of float32, bfloat16/],
    [['logits', 'a', '--input', 'b', '--output', 'c', '--dtype', 'float16'], /expected one of float32, bfloat16\./],
    [['logits', 'a'], /required option '--input/],
    [['generate', 'a'], /required option '--prompt/],
    [['train', '--mode', 'dance'], /Allowed choices are/],
    [['logits', 'a', '--input', 'b', '--output', 'c', '--device', 'tpu'], /Allowed choices are/],
  ])('%j exits with 2 and says how', async (args, words) => {
    const { code, stdout, stderr } = await viaduct(folder, ...args)
    expect([code, stdout]).toEqual([2, ''])
    expect(stderr).toMatch(words)
    expect(stderr).toContain('--help')
  })

  test('without a command shows the help and exits with 2', async () => {
    const { code, stderr } = await viaduct(folder)
    expect(code).toBe(2)
    expect(stderr).toContain('Commands:')
  })

  test('more parallelism than heads or layers divide is told by name', async () => {
    copyFixture('plain', inside('plain'))
    const uneven = await viaduct(folder, 'import', 'plain', 'c', '--pp', '3', '--ep', '2')
    expect([uneven.code, uneven.stderr]).toEqual([
      2,
      expect.stringMatching(
        /the model has no experts, use 1[\s\S]*cannot be spread evenly over 3 stages: use pipelineModelParallelSize=1, 2/,
      ),
    ])
    const tp = await viaduct(folder, 'verify', 'plain', '--tp', '3')
    expect([tp.code, tp.stderr]).toEqual([2, expect.stringContaining('use 1, 2')])
  })
})

describe('run', () => {
  test('starts ranks, hands on arguments and gives the exit code of the first that failed', async () => {
    writeFileSync(
      inside('ranks.mjs'),
      'console.log(`${process.env.RANK}/${process.env.WORLD_SIZE} ${process.argv.slice(2)}`)\nif (process.argv[2] === "fail" && process.env.RANK === "1") process.exit(7)\n',
    )
    const well = await viaduct(folder, 'run', '--nproc-per-node', '2', 'ranks.mjs', 'a', '--nnodes', 'b')
    expect(well.code).toBe(0)
    expect(well.stdout.split('\n').sort()).toEqual(['', '[rank0] 0/2 a,--nnodes,b', '[rank1] 1/2 a,--nnodes,b'])
    const ill = await viaduct(folder, 'run', '--nproc_per_node=2', 'ranks.mjs', 'fail')
    expect([ill.code, ill.stderr]).toEqual([7, expect.stringContaining('rank 1')])
  })

  test('takes TypeScript, and refuses what it cannot run', async () => {
    writeFileSync(inside('typed.ts'), 'const who: string = process.env["RANK"] ?? "none"\nconsole.log("rank", who)\n')
    expect((await viaduct(folder, 'run', 'typed.ts')).stdout).toBe('[rank0] rank 0\n')
    writeFileSync(inside('awaits.ts'), 'await Promise.resolve()\nconsole.log("awaited")\n')
    const awaits = await viaduct(folder, 'run', 'awaits.ts')
    expect([awaits.code, awaits.stderr]).toEqual([1, expect.stringContaining('"type": "module"')])
    copyFileSync(inside('awaits.ts'), inside('awaits.mts'))
    expect((await viaduct(folder, 'run', 'awaits.mts')).stdout).toBe('[rank0] awaited\n')
    const missing = await viaduct(folder, 'run', 'missing.ts')
    expect([missing.code, missing.stderr]).toEqual([3, expect.stringContaining('missing.ts')])
    const python = await viaduct(folder, 'run', 'train.py')
    expect([python.code, python.stderr]).toEqual([2, expect.stringContaining('--no-python')])
  })
})

test('works by any name: a link without an extension starts its ranks too', async () => {
  symlinkSync(viaductFile, inside('viaduct'))
  copyFixture('plain', inside('linked'))
  const { code, stdout, stderr } = await start(
    process.execPath,
    [inside('viaduct'), 'import', 'linked', 'linked-ckpt', '--tp', '2'],
    folder,
  ).ended
  expect([code, stdout], stderr).toEqual([0, 'linked-ckpt/iter_0000000\n'])
})

test('a reader that leaves ends the program quietly', async () => {
  const { code, stderr } = await start(
    'bash',
    [
      '-c',
      `set -o pipefail; ${process.execPath} ${viaductFile} train llama_tiny_cpu_pretrain_config --dry-run 2>/dev/null | head -n 1`,
    ],
    folder,
  ).ended
  expect([code, stderr]).toEqual([0, ''])
})
