// Every op's cases on the GPU of gpu.ts, against the same oracle and bounds as on the CPU.
import { afterEach, beforeAll, describe, test } from 'vitest'
import { Device } from '../../lib/tensor/device.js'
import { cases } from '../ops/cases.js'
import { checkCase } from '../ops/checkCase.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'

beforeAll(useGpu, gpuSetupTimeout)
afterEach(() => Device.open('cuda').stream.reset()) // a failure is one test's

describe.each(['float32', 'bfloat16'] as const)('ops on the GPU in %s', (dtype) => {
  for (const op of cases) {
    if (dtype === 'bfloat16' && op.float32Only) continue
    test(op.name, () => checkCase(op, dtype, 'cuda'))
  }
})
