// `viaduct plan`: the tables of a run and of a schedule, the picture, JSON, wrong use.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { temporaryFolder } from '../hostile/temporary.js'
import { viaduct, viaductJson } from './commandLine.js'

const folder = temporaryFolder()
const plan = (...args: string[]) => viaduct(folder, 'plan', ...args)

test('prints the bubble and what each stage holds, and draws the timeline', async () => {
  const { code, stdout } = await plan('--schedule', '1f1b', '--pp', '4', '--micro-batches', '8', '--svg', '1f1b.svg')
  expect(code).toBe(0)
  expect(stdout).toMatch(/^ *0 +24 +9 +37\.5% +4 +4 *$/m)
  expect(stdout).toMatch(/^ *3 +24 +9 +37\.5% +1 +1 *$/m)
  expect(stdout).toContain('bubble 37.5% of the work, 27.3% of the time; formula 37.5%\n1f1b.svg\n')
  const svg = readFileSync(join(folder, '1f1b.svg'), 'utf8')
  expect(svg.match(/<g>/g)).toHaveLength(4 * 8 * 2)
})

test('takes the interleaved schedule for virtual stages, and tells all as JSON', async () => {
  const args = ['plan', '--pp', '4', '--vpp', '2', '--micro-batches', '8', '--costs', '1,1.2,0.8']
  const told = await viaductJson<{ kind: string; bubble: number; formula: number; actions: unknown[][] }>(folder, args)
  expect([told.kind, told.formula]).toEqual(['interleaved', 3 / 16])
  expect(told.bubble).toBeCloseTo(3 / 16, 12)
  expect(told.actions.map((list) => list.length)).toEqual([32, 32, 32, 32])
})

const tiny = 'llama_tiny_cpu_pretrain_config'
const small = ['model.num_layers=4', 'train.micro_batch_size=2']

test('tells what a rank of each stage of a run needs, and its schedule', async () => {
  const { code, stdout, stderr } = await plan(tiny, '--pp', '2', '--dp', '2', ...small)
  expect([code, stderr]).toEqual([0, expect.stringContaining('layout      4 ranks: tp 1, pp 2 (1f1b), dp 2')])
  const sizes = String.raw`( +[\d.]+ [kMG]?B){5}`
  expect(stdout).toMatch(new RegExp(`^ *0  embedding, 0-1${sizes}$`, 'm'))
  expect(stdout).toMatch(new RegExp(`^ *1  2-3, output {3}${sizes}$`, 'm'))
  expect(stdout).toContain('formula 50.0%')
})

test('names context parallelism and its form', async () => {
  const form = ['--cp-comm-type', 'a2a+p2p', '--hierarchical-context-parallel-sizes', '2,2']
  const { code, stderr } = await plan(tiny, '--cp', '4', ...form)
  expect([code, stderr]).toEqual([0, expect.stringContaining('layout      4 ranks: tp 1, cp 4 (a2a+p2p 2,2), dp 1')])
})

test('tells a run as JSON, and one rank has one stage', async () => {
  interface Told {
    readonly ranks: number
    readonly memoryByStage: readonly { weights: number; optimizer: number; activations: number; total: number }[]
  }
  const one = await viaductJson<Told>(folder, ['plan', tiny, ...small])
  const shared = await viaductJson<Told>(folder, ['plan', tiny, '--dp', '2', ...small])
  expect([one.ranks, one.memoryByStage.length, shared.ranks]).toEqual([1, 1, 2])
  expect(shared.memoryByStage[0]?.optimizer).toBe((one.memoryByStage[0]?.optimizer as number) / 2)
  expect(shared.memoryByStage[0]?.weights).toBe(one.memoryByStage[0]?.weights)
})

test.each([
  [[], 'expected a recipe, a .yaml file or --hf DIR to plan a run, or --pp and --micro-batches'],
  [['--pp', '4'], 'or --pp and --micro-batches to plan a schedule'],
  [[tiny, '--micro-batches', '4'], 'expected no --micro-batches beside a run, got 4'],
  [['--schedule', 'zb-h1', '--pp', '2', '--vpp', '2', '--micro-batches', '4'], 'schedule zb-h1 has one chunk a stage'],
  [['--pp', '4', '--vpp', '2', '--group-size', '3', '--micro-batches', '4'], 'at least as many as there are stages, 4'],
  [['--pp', '4', '--micro-batches', '4', '--costs', '1,0'], 'expected --costs of three positive numbers'],
  [['--schedule', 'dualpipe', '--pp', '4', '--micro-batches', '4'], '1f1b'],
])('refuses %j', async (args, message) => {
  const { code, stderr } = await plan(...args)
  expect([code, stderr]).toEqual([2, expect.stringContaining(message)])
})
