// Mixtures of experts (Qwen3-MoE, Qwen2-MoE, OLMoE, Mixtral) against Transformers in float32: on one rank here, over tp, ep, etp, dp and pp by
// real ranks of `viaduct logits`.
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { Ctx } from '../../lib/tensor/ctx.js'
import { viaductJson } from '../cli/commandLine.js'
import { readSafetensorsFile } from '../fixtures/safetensorsFile.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { computeExperts, continueExperts, expertFixtures, expertModels } from './experts.js'
import { agreement } from './resultFile.js'

const folder = temporaryFolder()

test.each(expertModels)('%s', async (name) => {
  const { device } = Ctx.create({ device: 'cpu' })
  const slots = device.liveSlots()
  const { red, logits, gradients } = await computeExperts(name, 'cpu')
  expect(red).toEqual([])
  // Looser would hide a mistake: the noise between two correct implementations is some 1e-6.
  expect(logits).toBeLessThan(3e-6)
  expect(gradients).toBeLessThan(2e-5)
  expect(device.liveSlots()).toBe(slots)
})

test.each(expertModels)('%s continues as Transformers does', async (name) => {
  const [ours, theirs] = await continueExperts(name, 'cpu')
  expect(ours).toEqual(theirs)
  expect(theirs).toHaveLength(20)
})

describe('in layouts', () => {
  test.each([
    ['qwen3_moe1', '--tp 2'],
    ['qwen3_moe1', '--tp 2 --ep 2'],
    ['qwen2_moe0', '--tp 2 --ep 2'],
    ['qwen2_moe1', '--tp 2 --dp 2 --etp 2'],
    ['qwen2_moe0', '--cp 2 --ep 2'],
    ['qwen2_moe1', '--pp 2 --tp 2 --pipeline-layout Et*2|tL'],
    ['qwen2_moe1', '--tp 2 --cp 2 --ep 2 --etp 2'],
    ['olmoe1', '--tp 2 --etp 2'],
    ['olmoe1', '--ep 3 --dp 3'],
    ['mixtral1', '--ep 2 --etp 2 --dp 4'],
    ['mixtral0', '--pp 2 --ep 2 --dp 2'],
    ['qwen3_moe0', '--cp 2 --ep 2'],
    ['qwen3_moe1', '--cp 2 --ep 2 --cp-comm-type a2a'],
    ['mixtral1', '--tp 2 --cp 2 --ep 2 --etp 2'],
    ['mixtral0', '--cp 4 --ep 2 --cp-comm-type all_gather'],
  ])('%s %s', async (name, layout) => {
    const model = join(expertFixtures, name)
    const output = `${name}${layout.replaceAll(' ', '')}.safetensors`
    const files = ['--input', join(model, 'in.safetensors'), '--output', output]
    await viaductJson(folder, ['logits', model, ...files, '--grads', '--dtype', 'float32', ...layout.split(' ')])
    const got = readSafetensorsFile(join(folder, output))
    expect(agreement(got, readSafetensorsFile(join(model, 'expected.safetensors'))).red).toEqual([])
  })
})
