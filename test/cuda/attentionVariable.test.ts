// Variables choose the engine of attention, and whether its bits may differ, when a GPU is opened. A file of its own: a device is
// opened once.
import { beforeAll, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { Device } from '../../lib/tensor/device.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'

beforeAll(useGpu, gpuSetupTimeout)

test('a GPU is opened with the engine of the variable', () => {
  process.env['VIADUCT_ATTENTION_ENGINE'] = 'flash'
  expect(() => Device.open('cuda')).toThrow(/expected engine auto, cudnn or own, got flash/)
  process.env['VIADUCT_ATTENTION_ENGINE'] = 'own'
  expect(Device.open('cpu').info.description).not.toMatch(/attention/)
  process.env['VIADUCT_ALLOW_NONDETERMINISTIC_ALGO'] = '1'
  const gpu = Device.open('cuda')
  expect(gpu.info.description).toMatch(/attention by own kernels$/)
  native.setAttentionEngine(gpu.index, 'cudnn')
  expect(native.deviceInfo(gpu.index).description).toMatch(/\(not deterministic\)$/)
  native.allowNondeterministic(gpu.index, false)
  expect(native.deviceInfo(gpu.index).description).not.toMatch(/deterministic/)
})
