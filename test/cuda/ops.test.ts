// Every op's cases on the GPU of gpu.ts, against the same oracle and bounds as on the CPU.
import { afterEach, beforeAll, describe, expect, test } from 'vitest'
import { Device } from '../../lib/tensor/device.js'
import { cases } from '../ops/cases.js'
import { checkCase } from '../ops/checkCase.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'

beforeAll(useGpu, gpuSetupTimeout)
afterEach(() => Device.open('cuda').stream.reset()) // a failure is one test's

/** Cases of ops that are not built for CUDA: each must say so. Whoever builds one takes its line away. */
const notBuilt = /^(rmsNorm|layerNorm|attention (?!one head)|gated|activation)\b/ // rotation is not built

describe.each(['float32', 'bfloat16'] as const)('ops on the GPU in %s', (dtype) => {
  for (const op of cases) {
    if (dtype === 'bfloat16' && op.float32Only) continue
    test(op.name, async () => {
      if (!notBuilt.test(op.name)) return checkCase(op, dtype, 'cuda')
      await expect(checkCase(op, dtype, 'cuda')).rejects.toThrow(/is not built for this device/)
    })
  }
})
