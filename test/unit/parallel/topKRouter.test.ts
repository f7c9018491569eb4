// The router's own losses against finite differences of their definition: Megatron's, times the tokens; and what is told of them.
import { describe, expect, it } from 'vitest'
import { Tape } from '../../../lib/ops/tape.js'
import { RouterTotals } from '../../../lib/parallel/routerTotals.js'
import { plainRouter, type RouterConfig, TopKRouter } from '../../../lib/parallel/topKRouter.js'
import { Ctx, soloGroups } from '../../../lib/tensor/ctx.js'
import { replicated } from '../../../lib/tensor/shardSpec.js'
import { Tensor } from '../../../lib/tensor/tensor.js'
import { normals } from '../../ops/normals.js'
import { routeToken, routings } from '../../ops/routingCases.js'

const [T, H, E, K, sequences] = [12, 5, 6, 2, 3]
const next = normals('router')
const x = Float32Array.from({ length: T * H }, next)
const w = Float64Array.from({ length: E * H }, () => Math.fround(next()))
const coefficient = 0.3

interface Case {
  readonly config: Partial<RouterConfig>
}

/** Runs of tokens whose balance counts, and what the log calls the loss. */
const kinds = {
  aux_loss: { runs: 1, name: 'load_balancing_loss' },
  seq_aux_loss: { runs: sequences, name: 'seq_load_balancing_loss' },
} as const

const logitsOf = (v: Float64Array, t: number) =>
  Array.from({ length: E }, (_, e) =>
    Array.from({ length: H }, (_, c) => x[t * H + c]! * v[e * H + c]!).reduce((a, b) => a + b, 0),
  )

/** Means over tokens: of each balance loss E · sum over experts of share · mean score over runs of tokens; of squared log-sum-exps. */
function losses(weight: Float64Array, chosenBy: Float64Array, { config }: Case) {
  const sigmoid = config.scoreFunction === 'sigmoid'
  // Choices that the balance loss counts are those of the scores alone: no groups.
  const how = { ...routings[0]!, E, K, sigmoid, bias: null, groups: 1, groupTopk: 1 }
  const routed = (v: Float64Array) => Array.from({ length: T }, (_, t) => routeToken(logitsOf(v, t), how))
  const [scores, choices] = [routed(weight), routed(chosenBy)]
  const balanceOf = (runs: number) => {
    const length = T / runs
    let balance = 0
    for (let run = 0; run < runs; run++) {
      const tokens = Array.from({ length }, (_, i) => run * length + i)
      for (let e = 0; e < E; e++) {
        const share = tokens.filter((t) => choices[t]!.experts.includes(e)).length / (length * K)
        const score = (t: number) => {
          const all = scores[t]!.scores
          return all[e]! / (sigmoid ? all.reduce((a, b) => a + b, 0) : 1)
        }
        balance += (E * share * tokens.reduce((sum, t) => sum + score(t), 0)) / length / runs
      }
    }
    return balance
  }
  const balance = { aux_loss: balanceOf(kinds.aux_loss.runs), seq_aux_loss: balanceOf(kinds.seq_aux_loss.runs) }
  const z = Array.from(
    { length: T },
    (_, t) => Math.log(logitsOf(weight, t).reduce((sum, v) => sum + Math.exp(v), 0)) ** 2,
  )
  return { balance, z: z.reduce((a, b) => a + b, 0) / T }
}

const cases: Record<string, Case> = {
  aux_loss: { config: { auxLossCoeffs: { aux_loss: coefficient } } },
  seq_aux_loss: { config: { auxLossCoeffs: { seq_aux_loss: coefficient } } },
  'seq_aux_loss, sigmoid': {
    config: { auxLossCoeffs: { seq_aux_loss: coefficient }, scoreFunction: 'sigmoid' },
  },
  'aux_loss, sigmoid, groups': {
    config: { auxLossCoeffs: { aux_loss: coefficient }, scoreFunction: 'sigmoid', groups: 3, groupTopk: 1 },
  },
  'aux_loss and seq_aux_loss': {
    config: { auxLossCoeffs: { aux_loss: coefficient, seq_aux_loss: 2 * coefficient } },
  },
  'z loss': { config: { zLossCoeff: coefficient } },
  'z loss in float32, and aux_loss': {
    config: { zLossCoeff: coefficient, float32: true, auxLossCoeffs: { aux_loss: coefficient } },
  },
}

describe.each(Object.entries(cases))('%s', (_, one) => {
  const { config } = one
  const coeffs = Object.entries(config.auxLossCoeffs ?? {}) as [keyof typeof kinds, number][]
  it('has the gradient of its definition, and tells its value', async () => {
    const ctx = Ctx.create({ device: 'cpu', tape: new Tape() })
    const totals = new RouterTotals()
    const router = new TopKRouter({
      config: {
        ...plainRouter,
        numExperts: E,
        topk: K,
        preSoftmax: true,
        ...config,
      },
      tp: soloGroups.get('tp'),
      weight: replicated([E, H]),
      bias: null,
      dtype: 'float32',
      init: { kind: 'constant', value: 0 },
      layer: 0,
      totals,
    })
    router.weight.data = Tensor.fromHost(ctx, Float32Array.from(w), [E, H], 'float32').keep()
    const { weights } = router.forward(ctx, Tensor.fromHost(ctx, x, [T, H], 'float32'), sequences)
    // The losses alone: nothing else reaches the weights of the choices.
    await (ctx.tape as Tape).backward(ctx, [weights], [Tensor.zeros(ctx, [T, K], 'float32')])
    const got = await (router.weight.mainGrad as Tensor).toFloat32Array()
    const total = (v: Float64Array) => {
      const { balance, z } = losses(v, w, one)
      const balanced = coeffs.reduce((sum, [type, coeff]) => sum + coeff * balance[type], 0)
      return T * (balanced + (config.zLossCoeff ?? 0) * z)
    }
    const h = 1e-5
    for (let i = 0; i < E * H; i++) {
      const moved = (delta: number) => w.map((value, at) => (at === i ? value + delta : value))
      expect(got[i]).toBeCloseTo((total(moved(h)) - total(moved(-h))) / (2 * h), 4)
    }
    expect(Math.max(...got.map(Math.abs))).toBeGreaterThan(0.05)
    const told = await totals.read()
    const { balance, z } = losses(w, w, one)
    expect(told.size).toBe(coeffs.length + (config.zLossCoeff ? 1 : 0))
    for (const [type] of coeffs) expect(told.get(kinds[type].name)).toBeCloseTo(balance[type], 5)
    if (config.zLossCoeff) expect(told.get('z_loss')).toBeCloseTo(z, 4)
    totals.clear(ctx)
    expect([...(await totals.read()).values()].every((value) => value === 0)).toBe(true)
    totals.dispose()
    router.dispose()
    ctx.scope.close()
  })
})

it('forced balance: the choice does not depend on the tokens, and the weight still gets a gradient', async () => {
  const ctx = Ctx.create({ device: 'cpu', tape: new Tape() })
  const totals = new RouterTotals()
  const plain = { preSoftmax: true } as const
  const make = (forceBalance: boolean) => {
    const router = new TopKRouter({
      config: { ...plainRouter, ...plain, numExperts: E, topk: K, forceBalance },
      tp: soloGroups.get('tp'),
      weight: replicated([E, H]),
      bias: null,
      dtype: 'float32',
      init: { kind: 'constant', value: 0 },
      layer: 0,
      totals,
    })
    router.weight.data = Tensor.fromHost(ctx, Float32Array.from(w), [E, H], 'float32').keep()
    return router
  }
  const choices = async (router: TopKRouter, values: Float32Array) => {
    const { weights, experts } = router.forward(ctx, Tensor.fromHost(ctx, values, [T, H], 'float32'), sequences)
    return { weights, chosen: [...new Int32Array((await experts.bytes()).buffer)] }
  }
  const others = x.map((value) => -value)
  const [free, forced] = [make(false), make(true)]
  expect((await choices(free, x)).chosen).not.toEqual((await choices(free, others)).chosen)
  const { weights, chosen } = await choices(forced, x)
  expect((await choices(forced, others)).chosen).toEqual(chosen)
  expect(new Set(chosen).size).toBe(E)
  await (ctx.tape as Tape).backward(ctx, [weights], [Tensor.full(ctx, [T, K], 'float32', 1)])
  expect(Math.max(...(await (forced.weight.mainGrad as Tensor).toFloat32Array()).map(Math.abs))).toBeGreaterThan(0)
  for (const one of [free, forced, totals]) one.dispose()
  ctx.scope.close()
})

describe('the bias of experts', () => {
  const bias = [0.4, 0, -0.3, 0, 0.1, 0]
  const rate = 0.125

  it('has a say in the choice alone, and moves against the counts', async () => {
    const ctx = Ctx.create({ device: 'cpu', tape: new Tape() })
    const totals = new RouterTotals()
    const balanced = { auxLossCoeffs: { aux_loss: coefficient } } as const
    const router = new TopKRouter({
      config: {
        ...plainRouter,
        ...balanced,
        numExperts: E,
        topk: K,
        preSoftmax: false,
        scoreFunction: 'sigmoid',
        biasUpdateRate: rate,
      },
      tp: soloGroups.get('tp'),
      weight: replicated([E, H]),
      bias: replicated([E]),
      dtype: 'float32',
      init: { kind: 'constant', value: 0 },
      layer: 0,
      totals,
    })
    const expertBias = router.expertBias as NonNullable<typeof router.expertBias>
    router.weight.data = Tensor.fromHost(ctx, Float32Array.from(w), [E, H], 'float32').keep()
    expertBias.data = Tensor.fromHost(ctx, Float32Array.from(bias), [E], 'float32').keep()
    const { weights, experts } = router.forward(ctx, Tensor.fromHost(ctx, x, [T, H], 'float32'), sequences)
    const how = { ...routings[0]!, E, K, sigmoid: true, normalize: true, bias, groups: 1, groupTopk: 1 }
    const expected = Array.from({ length: T }, (_, t) => routeToken(logitsOf(w, t), how))
    const chosen = new Int32Array((await experts.bytes()).buffer)
    expect([...chosen]).toEqual(expected.flatMap((token) => token.experts))
    const plain = Array.from({ length: T }, (_, t) => routeToken(logitsOf(w, t), { ...how, bias: null }))
    expect(expected.map((t) => t.experts)).not.toEqual(plain.map((t) => t.experts))
    const got = await weights.toFloat32Array()
    expected.flatMap((token) => token.weights).forEach((value, i) => void expect(got[i]).toBeCloseTo(value, 6))
    // The balance loss counts what would be chosen without the bias.
    await (ctx.tape as Tape).backward(ctx, [weights], [Tensor.zeros(ctx, [T, K], 'float32')])
    const one = { config: { ...balanced, scoreFunction: 'sigmoid' as const } }
    expect((await totals.read()).get('load_balancing_loss')).toBeCloseTo(losses(w, w, one).balance.aux_loss, 5)

    await router.updateExpertBias(ctx)
    const counts = Array.from({ length: E }, (_, e) => chosen.filter((expert) => expert === e).length)
    const moved = bias.map((value, e) => Math.fround(Math.fround(value) + rate * Math.sign((T * K) / E - counts[e]!)))
    expect([...(await expertBias.data.toFloat32Array())]).toEqual(moved)
    expect(new Set(moved.map((value, e) => Math.sign(value - Math.fround(bias[e]!)))).size).toBeGreaterThan(1)
    router.beginStep(ctx)
    await router.updateExpertBias(ctx)
    expect([...(await expertBias.data.toFloat32Array())]).toEqual(moved)
    totals.dispose()
    router.dispose()
    ctx.scope.close()
  })
})
