// Latent experts are plain ones whose matrices are products: fc1 of an expert behind the layer's fc1_latent_proj, the layer's
// fc2_latent_proj behind fc2 of an expert. So the plain mixture, which is held against Transformers, gives loss and gradients.
import { afterAll, expect, test } from 'vitest'
import { native } from '../../../lib/addon/load.js'
import { type TokenBatch, uploadBatch } from '../../../lib/models/batch.js'
import { qwen2Moe } from '../../../lib/models/families/qwen2Moe.js'
import { GPTModel } from '../../../lib/models/gpt.js'
import { allocateParameter, initializeParameter } from '../../../lib/models/initialize.js'
import { GPTModelProvider } from '../../../lib/models/provider.js'
import type { TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { Tape } from '../../../lib/ops/tape.js'
import { trainingFlopsPerToken } from '../../../lib/plan/cost.js'
import { Ctx, soloGroups } from '../../../lib/tensor/ctx.js'
import { Scope } from '../../../lib/tensor/scope.js'
import { Tensor } from '../../../lib/tensor/tensor.js'
import { readFixture } from '../../parity/llamaLayout.js'

const [E, F, L] = [4, 20, 12]
const plain: TransformerConfig = {
  ...readFixture('wide_heads').config,
  // Large enough that experts have a say.
  initMethodStd: 0.2,
  numMoeExperts: E,
  moeRouterTopk: 2,
  moeFfnHiddenSize: F,
  moeSharedExpertIntermediateSize: 16,
  moeSharedExpertGate: true,
}
const H = plain.hiddenSize
const latent: TransformerConfig = { ...plain, moeLatentSize: L }
const root = Ctx.create({ device: 'cpu' })
afterAll(() => root.scope.close())

const [B, S] = [2, 9]
const tokens = Int32Array.from({ length: B * S }, (_, i) => (i * 31 + 7) % plain.vocabSize)
const labels = Int32Array.from({ length: B * S }, (_, i) => (i % 5 === 0 ? -100 : (i * 17) % plain.vocabSize))
const batch: TokenBatch = { batchSize: B, seqLength: S, tokens, labels }

type Values = ReadonlyMap<string, Float64Array>

async function build(config: TransformerConfig, values?: Values): Promise<GPTModel> {
  const model = new GPTModel(config, { groups: soloGroups })
  for (const [name, p] of model.namedParameters()) {
    allocateParameter(root, p)
    if (values === undefined) initializeParameter(root, p, 5)
    else {
      const given = Tensor.fromHost(root, Float32Array.from(values.get(name) as Float64Array), p.data.shape, 'float32')
      native.copy(root.stream.id, p.data.handle, given.handle)
    }
  }
  return model
}

async function step(model: GPTModel): Promise<{ loss: number; gradients: Values }> {
  const tape = new Tape()
  const scope = new Scope()
  const ctx = root.with({ scope, tape })
  const { lossSum } = await model.loss(ctx, uploadBatch(ctx, batch, plain))
  await tape.backward(ctx, [lossSum], [Tensor.fromHost(ctx, [1], [1], 'float32')])
  const gradients = new Map<string, Float64Array>()
  for (const [name, p] of model.namedParameters()) {
    gradients.set(name, Float64Array.from(await (p.mainGrad as Tensor).toFloat32Array()))
    p.mainGrad?.dispose()
  }
  const loss = await lossSum.item()
  tape.dispose()
  scope.close()
  return { loss, gradients }
}

/** a [m, k] · b [k, n]. */
function product(a: Float64Array, b: Float64Array, k: number): Float64Array {
  const [m, n] = [a.length / k, b.length / k]
  return Float64Array.from({ length: m * n }, (_, at) => {
    const [row, column] = [Math.floor(at / n), at % n]
    let sum = 0
    for (let i = 0; i < k; i++) sum += (a[row * k + i] as number) * (b[i * n + column] as number)
    return sum
  })
}

function transposed(a: Float64Array, columns: number): Float64Array {
  const rows = a.length / columns
  return Float64Array.from(a, (_, at) => a[(at % rows) * columns + Math.floor(at / rows)] as number)
}

const sum = (all: readonly Float64Array[]) =>
  (all[0] as Float64Array).map((_, i) => all.reduce((total, one) => total + (one[i] as number), 0))
const norm = (a: Float64Array) => Math.sqrt(a.reduce((total, v) => total + v * v, 0))

test('are plain experts with products as matrices: loss and gradients', async () => {
  const model = await build(latent)
  const values = new Map<string, Float64Array>()
  for (const [name, p] of model.namedParameters()) values.set(name, Float64Array.from(await p.data.toFloat32Array()))
  const at = (from: Values, name: string) => from.get(name) as Float64Array
  const layers = Array.from({ length: plain.numLayers }, (_, i) => `decoder.layers.${i}.mlp`)
  const experts = Array.from({ length: E }, (_, e) => e)

  const whole = new Map([...values].filter(([name]) => !name.includes('latent_proj')))
  for (const mlp of layers)
    for (const e of experts) {
      const [fc1, fc2] = [`${mlp}.experts.linear_fc1.weight${e}`, `${mlp}.experts.linear_fc2.weight${e}`]
      whole.set(fc1, product(at(values, fc1), at(values, `${mlp}.fc1_latent_proj.weight`), L))
      whole.set(fc2, product(at(values, `${mlp}.fc2_latent_proj.weight`), at(values, fc2), L))
    }
  const reference = await build(plain, whole)
  const [got, wanted] = [await step(model), await step(reference)]

  const expected = new Map(wanted.gradients)
  for (const mlp of layers) {
    const of = (from: Values, name: string) => experts.map((e) => at(from, `${mlp}.experts.linear_${name}.weight${e}`))
    const [down, up] = [at(values, `${mlp}.fc1_latent_proj.weight`), at(values, `${mlp}.fc2_latent_proj.weight`)]
    const [fc1, fc2] = [of(values, 'fc1'), of(values, 'fc2')]
    const [dFc1, dFc2] = [of(wanted.gradients, 'fc1'), of(wanted.gradients, 'fc2')]
    const mine = (e: number) =>
      [fc1, fc2, dFc1, dFc2].map((all) => all[e]) as [Float64Array, Float64Array, Float64Array, Float64Array]
    const parts = experts.map((e) => {
      const [w1, w2, d1, d2] = mine(e)
      expected.set(`${mlp}.experts.linear_fc1.weight${e}`, product(d1, transposed(down, H), H))
      expected.set(`${mlp}.experts.linear_fc2.weight${e}`, product(transposed(up, L), d2, H))
      return [product(transposed(w1, L), d1, w1.length / L), product(d2, transposed(w2, F), F)] as const
    })
    expected.set(`${mlp}.fc1_latent_proj.weight`, sum(parts.map(([d]) => d)))
    expected.set(`${mlp}.fc2_latent_proj.weight`, sum(parts.map(([, d]) => d)))
  }
  // Both are float32, and the products are rounded once more: some 1e-7 an element, which sums over layers carry to 1e-6.
  expect(Math.abs(got.loss / wanted.loss - 1)).toBeLessThan(1e-6)
  expect([...got.gradients.keys()].sort()).toEqual([...expected.keys()].sort())
  for (const [name, gradient] of got.gradients) {
    const want = at(expected, name)
    // An expert that no token chose has none.
    const difference = norm(gradient.map((v, i) => v - (want[i] as number)))
    expect(difference, name).toBeLessThanOrEqual(1e-5 * norm(want))
  }
  model.dispose()
  reference.dispose()
})

test('need experts, and no family of Hugging Face writes them', () => {
  const provider = (more: Partial<TransformerConfig>) =>
    new GPTModelProvider({ numLayers: 1, hiddenSize: 16, numAttentionHeads: 2, vocabSize: 32, ...more }).finalize()
  expect(() => provider({ moeLatentSize: 8 })).toThrow(/moeLatentSize=8 needs numMoeExperts/)
  expect(() => provider({ moeLatentSize: 0, numMoeExperts: 2 })).toThrow(/moeLatentSize must be a whole number/)
  const config = { ...latent, addQkvBias: true, moeRouterPreSoftmax: true }
  expect(() => qwen2Moe.toHf(config, null)).toThrow(/moeLatentSize=12 would come back as null/)
})

test('cost the projections once, and experts at their width', () => {
  const [at, of] = [trainingFlopsPerToken(latent, S, 128), trainingFlopsPerToken(plain, S, 128)]
  const saved = latent.moeRouterTopk * 3 * F * (H - L) - 2 * H * L
  expect(of - at).toBe(6 * saved * latent.numLayers)
})
