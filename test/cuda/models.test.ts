// Whole models on the GPU of gpu.ts: logits, loss and gradients against Transformers, by the gates of the CPU.
import { readdirSync } from 'node:fs'
import { beforeAll, describe, expect, test } from 'vitest'
import { Ctx } from '../../lib/tensor/ctx.js'
import { llamaFixtures } from '../fixtures/safetensorsFile.js'
import { compute } from '../parity/compute.js'
import { computeExperts, expertModels } from '../parity/experts.js'
import { gate } from '../parity/gate.js'
import { readFixture } from '../parity/llamaLayout.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'

beforeAll(useGpu, gpuSetupTimeout)

const all = readdirSync(llamaFixtures).sort()

describe('experts, parity with Transformers, float32', () => {
  test.each(expertModels)('%s', async (name) => {
    const { red, logits, gradients } = await computeExperts(name, 'cuda')
    expect(red).toEqual([])
    expect(logits).toBeLessThan(5e-6)
    expect(gradients).toBeLessThan(2e-5)
  })
})

describe('parity with Transformers, float32', () => {
  test.each(all)('%s', async (name) => {
    const { device } = Ctx.create({ device: 'cuda' })
    const before = { slots: device.liveSlots(), bytes: device.memory().liveBytes }
    const fixture = readFixture(name)
    const report = gate(fixture, await compute(fixture, { device: 'cuda' }))
    expect(report.red).toEqual([])
    // As on the CPU: the noise between two correct implementations is some 1e-6. TF32 would be 1e-4.
    expect(report.logits).toBeLessThan(5e-6)
    expect(report.gradients).toBeLessThan(1e-5)
    await device.stream.sync()
    expect({ slots: device.liveSlots(), bytes: device.memory().liveBytes }).toEqual(before)
  })
})
