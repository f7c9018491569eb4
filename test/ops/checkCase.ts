// Runs one case of cases.ts on a device: values against the float64 oracle, gradients against finite differences of the oracle.
import { expect } from 'vitest'
import { Tape } from '../../lib/ops/tape.js'
import type { TrainableWeight } from '../../lib/ops/weight.js'
import { Ctx } from '../../lib/tensor/ctx.js'
import type { DeviceKind } from '../../lib/tensor/device.js'
import { bfloat16Bits, bfloat16Value } from '../../lib/tensor/host.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import type { OpCase } from './cases.js'
import { normals } from './normals.js'

type Arrays = Record<string, Float64Array>

function draw(op: OpCase, dtype: 'float32' | 'bfloat16'): Arrays {
  const random = normals(op.name)
  const round = dtype === 'float32' ? Math.fround : (x: number) => bfloat16Value(bfloat16Bits(x))
  return Object.fromEntries(
    Object.entries(op.inputs).map(([name, { shape, spread = 1 }]) => {
      const n = shape.reduce((a, b) => a * b, 1)
      return [name, Float64Array.from({ length: n }, () => round(spread * random()))]
    }),
  )
}

/** Largest difference as a share of the largest expected value. */
function difference(got: Float32Array, want: Float64Array): number {
  expect(got.length).toBe(want.length)
  const scale = Math.max(1e-30, ...want.map(Math.abs))
  let worst = 0
  for (let i = 0; i < want.length; i++) {
    const d = Math.abs(got[i]! - want[i]!) / scale
    if (!(d <= worst)) worst = d
  }
  return worst
}

/** dL/d(input element) for L = sum of seeds · outputs, by central differences of the oracle. */
function numericGradient(op: OpCase, x: Arrays, seeds: readonly Float64Array[], name: string, element: number): number {
  const h = 1e-5
  const loss = (delta: number) => {
    const moved = { ...x, [name]: x[name]!.map((value, i) => (i === element ? value + delta : value)) }
    return op
      .oracle(moved)
      .reduce(
        (total, out, k) => total + out.reduce((s, value, i) => s + value * seeds[k]![i]!, 0),
        op.extraLoss?.(moved) ?? 0,
      )
  }
  return (loss(h) - loss(-h)) / (2 * h)
}

// float32: sums of up to some hundred products, each rounded to 6e-8. bfloat16: inputs are exact, one rounding of 2^-9 of an
// output and of a gradient, and of intermediate values inside an op.
const tolerance = { float32: { value: 2e-6, gradient: 1e-5 }, bfloat16: { value: 1e-2, gradient: 3e-2 } }

/** Fails like any expectation; throws what the op throws, e.g. ERR_UNSUPPORTED. */
export async function checkCase(op: OpCase, dtype: 'float32' | 'bfloat16', device: DeviceKind): Promise<void> {
  const host = draw(op, dtype)
  const ctx = Ctx.create({ device, tape: new Tape() })
  const tape = ctx.tape as Tape
  const x: Record<string, Tensor> = {}
  const w: Record<string, TrainableWeight> = {}
  for (const [name, input] of Object.entries(op.inputs)) {
    const data = Tensor.fromHost(ctx, Float32Array.from(host[name]!), input.shape, 'float32')
    let typed = data
    if (dtype === 'bfloat16') typed = Tensor.fromHost(ctx, Array.from(host[name]!), input.shape, 'bfloat16')
    if (input.weight) w[name] = { name, data: typed, requiresGrad: true, mainGrad: null }
    else {
      x[name] = typed
      tape.watch(typed)
    }
  }
  const outputs = op.run(ctx, x, w)
  const want = op.oracle(host)
  for (const [k, output] of outputs.entries()) {
    expect(difference(await output.toFloat32Array(), want[k]!)).toBeLessThanOrEqual(tolerance[dtype].value)
  }

  const random = normals(`${op.name} seeds`)
  const round = (t: Tensor, v: number) => (t.dtype === 'bfloat16' ? bfloat16Value(bfloat16Bits(v)) : Math.fround(v))
  const seeds = outputs.map((t) => Float64Array.from({ length: t.numel }, () => round(t, random())))
  const dOutputs = outputs.map((t, k) => Tensor.fromHost(ctx, Array.from(seeds[k]!), t.shape, t.dtype))
  const gradients = await tape.backward(ctx, outputs, dOutputs)
  for (const [name, input] of Object.entries(op.inputs)) {
    const got = input.weight ? w[name]!.mainGrad! : gradients.get(x[name]!)!
    expect(got, `gradient of ${name}`).toBeDefined()
    expect(got.shape).toEqual(input.shape)
    const values = await got.toFloat32Array()
    // A sample of elements: each costs two runs of the oracle.
    const every = Math.max(1, Math.floor(values.length / 24))
    const sampled = Array.from(values.keys()).filter((i) => i % every === 0)
    const numeric = Float64Array.from(sampled, (i) => numericGradient(op, host, seeds, name, i))
    const ours = Float32Array.from(sampled, (i) => values[i]!)
    expect(difference(ours, numeric), `gradient of ${name}`).toBeLessThanOrEqual(tolerance[dtype].gradient)
    w[name]?.mainGrad?.dispose()
  }
  tape.dispose()
  ctx.scope.close()
}
