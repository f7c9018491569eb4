// Activation offload: the same bits whichever stream is slow, what the device and the host hold by their counters, and nothing left.
import * as fc from 'fast-check'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import { native } from '../../../lib/addon/load.js'
import { defaultOffload, offloadProblems } from '../../../lib/models/offloadSettings.js'
import type { TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { linear } from '../../../lib/ops/linear.js'
import { ActivationOffload } from '../../../lib/ops/offload.js'
import { Tape } from '../../../lib/ops/tape.js'
import { Device } from '../../../lib/tensor/device.js'
import { base, layerBytes, measure, root } from './measuredPass.js'

afterAll(() => root.scope.close())
const host = Device.host()
const streams = () => [
  root.stream,
  root.device.communication('activations down'),
  root.device.communication('activations up'),
]

describe('activation offload', () => {
  const configs: fc.Arbitrary<Partial<TransformerConfig>> = fc.record({
    paramsDtype: fc.constantFrom('float32', 'bfloat16'),
    normalization: fc.constantFrom('RMSNorm', 'LayerNorm'),
    gatedLinearUnit: fc.boolean(),
    addQkvBias: fc.boolean(),
    addProjBias: fc.boolean(),
    hiddenDropout: fc.constantFrom(0, 0.2),
    shareEmbeddingsAndOutputWeights: fc.boolean(),
  })

  test('keeps the bits, and of the offloaded layers what the next one reads', async () => {
    await fc.assert(
      fc.asyncProperty(configs, fc.integer({ min: 1, max: 5 }), async (changes, offloadedLayers) => {
        const plain = await measure(changes, {})
        const away = await measure(changes, { offloadedLayers })
        expect(away.loss).toBe(plain.loss)
        expect(away.gradients).toEqual(plain.gradients)
        const { all, norm } = layerBytes({ ...base, ...changes })
        // The stream that the last of these layers gave to the next is not the tape's alone while that layer ends.
        const gone = offloadedLayers * all - norm.input
        expect(plain.kept - away.kept).toBe(gone)
        expect(away.host - plain.host).toBe(gone)
        expect(away.peak).toBeLessThan(plain.peak)
      }),
      { numRuns: process.env['VIADUCT_TEST_FULL'] === '1' ? 60 : 12, seed: 20261126 },
    )
  })

  test.each(['compute', 'communication activations down', 'communication activations up'])(
    'order holds where %s is slow',
    async (slow) => {
      const plain = await measure({}, {})
      const [stream] = streams().filter(({ name }) => name === slow)
      for (let i = 0; i < 3; i++) native.debugDelay((stream as (typeof root)['stream']).id, 30_000)
      const away = await measure({}, { offloadedLayers: 3 })
      expect(away.gradients).toEqual(plain.gradients)
    },
  )
})

describe('what is left behind', () => {
  const before = { slots: 0, device: 0, host: 0 }
  const now = () => {
    root.device.trim()
    host.trim()
    root.empty([1], 'float32').dispose() // what waited for streams is given back at the next allocation
    return { slots: root.device.liveSlots(), device: root.device.memory().liveBytes, host: host.memory().liveBytes }
  }
  afterEach(() => expect(now()).toEqual(before))

  function halfAPass(tape: Tape) {
    const ctx = root.with({ tape })
    const weight = { name: 'w', requiresGrad: false, data: root.empty([8, 8], 'float32'), mainGrad: null }
    const x = root.empty([4, 8], 'float32')
    tape.watch(x)
    return { ctx, weight, x }
  }

  test('nothing of a pass that is dropped, before and after its activations have left', () => {
    for (const ends of [false, true]) {
      Object.assign(before, now())
      const tape = new Tape()
      const { ctx, weight, x } = halfAPass(tape)
      using offload = new ActivationOffload(tape)
      const y = linear(ctx, { x, weight, bias: null }).y
      const z = linear(ctx, { x: y, weight, bias: null }).y
      y.dispose()
      offload.leave(ctx)
      if (ends) offload.end(ctx)
      z.dispose()
      x.dispose()
      weight.data.dispose()
      tape.dispose()
    }
  })
})

test('settings that do not fit are told together', () => {
  const problems = (changes: object, layers = 4, pp = 1) =>
    offloadProblems(
      { ...defaultOffload, recomputeGranularity: null, ...changes },
      { pipelineModelParallelSize: pp },
      layers,
    )
  expect(problems({})).toEqual([])
  expect(problems({ cpuOffloading: true, cpuOffloadingNumLayers: 3 })).toEqual([])
  expect(problems({ cpuOffloadingNumLayers: 2 })).toEqual([
    'cpuOffloadingNumLayers=2 needs cpuOffloading=true: set both or neither',
  ])
  expect(problems({ cpuOffloading: true, cpuOffloadingNumLayers: 4 })[0]).toContain('use 1 to 3')
  const all = problems(
    { cpuOffloading: true, cpuOffloadingNumLayers: 0.5, cpuOffloadingWeights: true, recomputeGranularity: 'full' },
    4,
    2,
  )
  expect(all.map((problem) => problem.split(/[ =]/)[0])).toEqual([
    'cpuOffloadingNumLayers',
    'cpuOffloadingWeights',
    'cpuOffloading',
    'cpuOffloading',
  ])
})
