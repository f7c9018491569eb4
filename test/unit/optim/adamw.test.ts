// AdamW against PyTorch's single-tensor form, from committed gradients; master weights, clipping factor, buffers.
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { native } from '../../../lib/addon/load.js'
import type { DType } from '../../../lib/base/dtype.js'
import { Parameter } from '../../../lib/nn/parameter.js'
import { AdamW, gradientFactor } from '../../../lib/optim/adamw.js'
import { FlatLayout } from '../../../lib/optim/flatLayout.js'
import { bfloat16Bits, bfloat16Value, Ctx, replicated, rowRuns, splitDim, Tensor } from '../../../lib/tensor/index.js'
import { type HostTensor, readSafetensorsFile } from '../../fixtures/safetensorsFile.js'

const fixture = readSafetensorsFile(join(dirname(fileURLToPath(import.meta.url)), '../../fixtures/adamw.safetensors'))
const of = (name: string): HostTensor => {
  const found = fixture.get(name)
  if (found === undefined) throw new Error(`no ${name} in the fixture`)
  return found
}
const options = { adamBeta1: 0.9, adamBeta2: 0.95, adamEps: 1e-8, weightDecay: 0.1 }

let ctx: Ctx
let live = 0
beforeEach(() => {
  ctx = Ctx.create({ device: 'cpu' })
  live = native.liveSlots()
})
afterEach(async () => {
  await ctx.stream.sync()
  ctx.scope.close()
})

function parameterOf(name: string, start: HostTensor, dtype: DType = 'float32'): Parameter {
  const parameter = new Parameter(replicated(start.shape), dtype, { kind: 'constant', value: 0 })
  parameter.name = name
  parameter.data = Tensor.fromHost(ctx, start.data, start.shape, dtype).keep()
  return parameter
}

/** Distance of two float32 numbers at x's magnitude. */
function ulp(x: number): number {
  const exponent = Math.max(-126, Math.floor(Math.log2(Math.abs(x))))
  return 2 ** (exponent - 23)
}

describe('AdamW', () => {
  it('is within 3 ulp of PyTorch over five steps, moments within 1', async () => {
    const names = ['matrix', 'vector']
    const lrs = of('lr').data
    for (let step = 1; step <= lrs.length; step++) {
      // Each step starts from PyTorch's own state, so that errors do not add up.
      const parameters = names.map((name) => parameterOf(name, of(`${name}.${step - 1}`)))
      const adam = new AdamW(ctx, parameters, options)
      adam.updates = step - 1
      for (const { name, tensor } of adam.state(ctx)) {
        const [, slot, parameter] = name.split('.') as [string, string, string]
        if (step > 1) native.upload(ctx.stream.id, tensor.handle, of(`${parameter}.${slot}.${step - 1}`).data)
      }
      for (const parameter of parameters) {
        native.upload(ctx.stream.id, (parameter.mainGrad as Tensor).handle, of(`${parameter.name}.grad.${step}`).data)
      }
      const lr = lrs[step - 1] as number
      adam.step(ctx, { lr, factor: 1 })
      for (const parameter of parameters) {
        const got = await parameter.data.toFloat32Array()
        const before = of(`${parameter.name}.${step - 1}`).data
        const after = of(`${parameter.name}.${step}`).data
        let worst = 0
        got.forEach((value, i) => {
          const scale = Math.max(Math.abs(before[i] as number), Math.abs(after[i] as number), lr)
          worst = Math.max(worst, Math.abs(value - (after[i] as number)) / ulp(scale))
        })
        // Three roundings lie between the two orders of evaluation: decay, quotient, sum.
        expect(worst, `${parameter.name}, step ${step}`).toBeLessThanOrEqual(3)
      }
      for (const { name, tensor } of adam.state(ctx)) {
        const [, slot, parameter] = name.split('.') as [string, string, string]
        const expected = of(`${parameter}.${slot}.${step}`).data
        const got = await tensor.toFloat32Array()
        got.forEach((value, i) => {
          expect(Math.abs(value - (expected[i] as number)) / ulp(expected[i] as number)).toBeLessThanOrEqual(1)
        })
      }
      adam.dispose()
      for (const parameter of parameters) parameter.dispose()
    }
    ctx.scope.close()
    expect(native.liveSlots()).toBe(live)
  })

  it('optimises float32 masters of bfloat16 weights, which are their rounded copies', async () => {
    const start = of('matrix.0')
    const parameter = parameterOf('matrix', start, 'bfloat16')
    const adam = new AdamW(ctx, [parameter], options)
    const slots = [...adam.state(ctx)]
    expect(slots.map(({ name }) => name)).toEqual([
      'optimizer.exp_avg.matrix',
      'optimizer.exp_avg_sq.matrix',
      'optimizer.master.matrix',
    ])
    const master = slots[2]?.tensor as Tensor
    expect(await master.toFloat32Array()).toEqual(start.data.map((x) => bfloat16Value(bfloat16Bits(x))))
    native.upload(ctx.stream.id, (parameter.mainGrad as Tensor).handle, of('matrix.grad.1').data)
    adam.step(ctx, { lr: 1e-5, factor: 1 })
    const weights = await master.toFloat32Array()
    expect(await parameter.data.toFloat32Array()).toEqual(weights.map((x) => bfloat16Value(bfloat16Bits(x))))
    // A step below bfloat16's resolution moves the master.
    expect(weights).not.toEqual(await parameter.data.toFloat32Array())
    adam.dispose()
    parameter.dispose()
  })

  it('takes the factor of the gradients', async () => {
    const run = async (scale: number, factor: number) => {
      const parameter = parameterOf('vector', of('vector.0'))
      const adam = new AdamW(ctx, [parameter], options)
      native.upload(
        ctx.stream.id,
        (parameter.mainGrad as Tensor).handle,
        of('vector.grad.1').data.map((x) => x * scale),
      )
      adam.step(ctx, { lr: 1e-3, factor })
      const result = await parameter.data.toFloat32Array()
      adam.dispose()
      parameter.dispose()
      return result
    }
    expect(await run(8, 0.125)).toEqual(await run(1, 1))
  })
})

describe('gradients', () => {
  it('clip as torch.nn.utils.clip_grad_norm_ does, on the mean over tokens', () => {
    expect(gradientFactor(100 * 16, 4, 5)).toEqual({ factor: 5 / (10 + 1e-6) / 4, norm: 10 })
    expect(gradientFactor(100, 1, 20)).toEqual({ factor: 1, norm: 10 })
    expect(gradientFactor(100, 2, 0)).toEqual({ factor: 0.5, norm: 5 })
  })

  it('count owned blocks only: no replica, no padding', async () => {
    const whole = new Parameter(replicated([3, 4]), 'float32', { kind: 'constant', value: 0 })
    const replica = new Parameter(replicated([5], { replica: 1 }), 'float32', { kind: 'constant', value: 0 })
    const padded = new Parameter(splitDim([5, 4], 0, 1, 2, 8), 'float32', { kind: 'constant', value: 0 })
    const shared = new Parameter(
      rowRuns(
        [8, 2],
        [
          { start: 0, count: 2 },
          { start: 4, count: 2, replica: 1 },
          { start: 6, count: 2 },
        ],
      ),
      'float32',
      { kind: 'constant', value: 0 },
    )
    const parameters = [whole, replica, padded, shared]
    parameters.forEach((parameter, i) => {
      parameter.name = `p${i}`
      parameter.data = Tensor.zeros(ctx, parameter.shard.localShape, 'float32').keep()
    })
    expect(new FlatLayout(parameters).ownedRanges()).toEqual([
      { start: 0, length: 16 },
      { start: 32, length: 4 },
      { start: 48, length: 4 },
      { start: 56, length: 8 },
    ])
    const adam = new AdamW(ctx, parameters, options)
    for (const parameter of parameters) native.fill(ctx.stream.id, (parameter.mainGrad as Tensor).handle, 2)
    expect(await adam.gradients.sumOfSquares(ctx)).toBe(4 * (12 + 4 + 8))
    native.fill(ctx.stream.id, (shared.mainGrad as Tensor).handle, Number.NaN)
    expect(await adam.gradients.notFinite(ctx)).toEqual(['p3'])
    adam.gradients.zero(ctx)
    expect(await adam.gradients.sumOfSquares(ctx)).toBe(0)
    adam.dispose()
    for (const parameter of parameters) parameter.dispose()
  })
})
