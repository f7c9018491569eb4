// Optimizer state on the host: where its bytes lie, and that copies and updates keep their order however slow each stream is.
import { expect, it } from 'vitest'
import { native } from '../../../lib/addon/load.js'
import type { DType } from '../../../lib/base/dtype.js'
import { Parameter } from '../../../lib/nn/parameter.js'
import { AdamW } from '../../../lib/optim/adamw.js'
import { Device } from '../../../lib/tensor/device.js'
import { Ctx, replicated, Tensor } from '../../../lib/tensor/index.js'

const options = { adamBeta1: 0.9, adamBeta2: 0.95, adamEps: 1e-8, weightDecay: 0.1 }
const shapes = [[40, 33], [57], [16, 16]]
const elements = 40 * 33 + 57 + 256

const numbers = (count: number, seed: number) =>
  Float32Array.from({ length: count }, (_, i) => Math.sin(seed + i * 1.7) * 0.3)

/** Weights after three steps from given gradients; the named stream is held up before each step. */
async function train(dtype: DType, optimizerOffloadFraction: number, slow?: string): Promise<Float32Array[]> {
  const ctx = Ctx.create({ device: 'cpu' })
  const streams = [
    ctx.stream,
    Device.host().stream,
    ctx.device.communication('optimizer up'),
    ctx.device.communication('optimizer down'),
  ]
  const parameters = shapes.map((shape, i) => {
    const parameter = new Parameter(replicated(shape), dtype, { kind: 'constant', value: 0 })
    parameter.name = `p${i}`
    const start = numbers(
      shape.reduce((a, b) => a * b, 1),
      i,
    )
    parameter.data = Tensor.fromHost(ctx, start, shape, dtype).keep()
    return parameter
  })
  const adam = new AdamW(ctx, parameters, { ...options, optimizerCpuOffload: true, optimizerOffloadFraction })
  for (let step = 0; step < 3; step++) {
    adam.gradients.zero(ctx)
    for (const { mainGrad } of parameters)
      native.upload(ctx.stream.id, (mainGrad as Tensor).handle, numbers((mainGrad as Tensor).numel, 10 * step))
    for (const stream of streams) if (stream.name === slow) native.debugDelay(stream.id, 20_000)
    adam.step(ctx, { lr: 1e-2, factor: 0.5 })
  }
  const weights: Float32Array[] = []
  for (const { data } of parameters) weights.push(await data.toFloat32Array())
  await adam.settle(ctx)
  adam.dispose()
  for (const parameter of parameters) parameter.dispose()
  ctx.scope.close()
  return weights
}

it.each(['float32', 'bfloat16'] as const)('order holds whichever stream is slow: %s', async (dtype) => {
  const expected = await train(dtype, 0)
  for (const fraction of [0.4, 1]) {
    for (const slow of ['compute', 'host', 'communication optimizer up', 'communication optimizer down'])
      expect(await train(dtype, fraction, slow), `${fraction}, ${slow}`).toEqual(expected)
  }
})

it('state lies on the host alone', async () => {
  const ctx = Ctx.create({ device: 'cpu' })
  const host = Device.host()
  const parameter = new Parameter(replicated([elements]), 'bfloat16', { kind: 'constant', value: 0 })
  parameter.data = Tensor.zeros(ctx, [elements], 'bfloat16').keep()
  const [slots, device, beside] = [native.liveSlots(), ctx.device.memory().liveBytes, host.memory().liveBytes]
  const adam = new AdamW(ctx, [parameter], { ...options, optimizerCpuOffload: true })
  const gradients = 4 * adam.gradients.layout.length
  expect(ctx.device.memory().liveBytes - device).toBeLessThan(gradients + 4096)
  // Moments, master, the gradient and the bfloat16 weights on their way.
  expect(host.memory().liveBytes - beside).toBeGreaterThan((4 + 4 + 4 + 4 + 2) * elements)
  adam.step(ctx, { lr: 1e-3, factor: 1 })
  await adam.settle(ctx)
  adam.dispose()
  await ctx.stream.sync()
  expect(native.liveSlots()).toBe(slots)
  parameter.dispose()
})

it('a tensor of the host is no operand of the device', () => {
  const ctx = Ctx.create({ device: 'cpu' })
  const there = Tensor.zeros(ctx.with({ device: Device.host(), stream: Device.host().stream }), [4], 'float32')
  const here = Tensor.zeros(ctx, [4], 'float32')
  expect(() => native.copy(ctx.stream.id, here.handle, there.handle)).toThrow(/copyBetween carries it over/)
  expect(() => native.copyBetween(ctx.stream.id, here.handle, here.handle)).not.toThrow()
  const short = here.slice(ctx, 0, 0, 3)
  expect(() => native.copyBetween(ctx.stream.id, short.handle, there.handle)).toThrow(/tensors that are alike/)
  ctx.scope.close()
})
