// VIADUCT_ATTENTION_ENGINE chooses the engine of attention when a GPU is opened. A file of its own: a device is opened once.
import { beforeAll, expect, test } from 'vitest'
import { Device } from '../../lib/tensor/device.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'

beforeAll(useGpu, gpuSetupTimeout)

test('a GPU is opened with the engine of the variable', () => {
  process.env['VIADUCT_ATTENTION_ENGINE'] = 'flash'
  expect(() => Device.open('cuda')).toThrow(/expected engine auto, cudnn or own, got flash/)
  process.env['VIADUCT_ATTENTION_ENGINE'] = 'own'
  expect(Device.open('cpu').info.description).not.toMatch(/attention/)
  expect(Device.open('cuda').info.description).toMatch(/attention by own kernels$/)
})
