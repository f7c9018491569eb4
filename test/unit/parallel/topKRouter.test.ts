// The balance losses of the router against finite differences of their definition: Megatron's, times the tokens.
import { describe, expect, it } from 'vitest'
import { Tape } from '../../../lib/ops/tape.js'
import { TopKRouter } from '../../../lib/parallel/topKRouter.js'
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

/** coefficient · E · sum over experts of share · mean score, over runs of tokens; the choices of `chosenBy`. */
function loss(weight: Float64Array, chosenBy: Float64Array, runs: number): number {
  const routed = (v: Float64Array) =>
    Array.from({ length: T }, (_, t) => {
      const logits = Array.from({ length: E }, (_, e) =>
        Array.from({ length: H }, (_, c) => x[t * H + c]! * v[e * H + c]!).reduce((a, b) => a + b, 0),
      )
      return routeToken(logits, { ...routings[0]!, E, K, bias: null, groups: 1, groupTopk: 1 })
    })
  const [scores, choices] = [routed(weight), routed(chosenBy)]
  const length = T / runs
  let total = 0
  for (let run = 0; run < runs; run++) {
    const tokens = Array.from({ length }, (_, i) => run * length + i)
    for (let e = 0; e < E; e++) {
      const share = tokens.filter((t) => choices[t]!.experts.includes(e)).length / (length * K)
      const mean = tokens.reduce((sum, t) => sum + scores[t]!.scores[e]!, 0) / length
      total += (coefficient * E * share * mean) / runs
    }
  }
  return total * T
}

describe.each([
  ['aux_loss', 1],
  ['seq_aux_loss', sequences],
] as const)('%s', (loadBalancing, runs) => {
  it('has the gradient of its definition', async () => {
    const ctx = Ctx.create({ device: 'cpu', tape: new Tape() })
    const router = new TopKRouter({
      config: { numExperts: E, topk: K, preSoftmax: true, loadBalancing, auxLossCoeff: coefficient },
      tp: soloGroups.get('tp'),
      weight: replicated([E, H]),
      dtype: 'float32',
      init: { kind: 'constant', value: 0 },
    })
    router.weight.data = Tensor.fromHost(ctx, Float32Array.from(w), [E, H], 'float32').keep()
    const { weights } = router.forward(ctx, Tensor.fromHost(ctx, x, [T, H], 'float32'), sequences)
    // The loss alone: nothing else reaches the weights of the choices.
    await (ctx.tape as Tape).backward(ctx, [weights], [Tensor.zeros(ctx, [T, K], 'float32')])
    const got = await (router.weight.mainGrad as Tensor).toFloat32Array()
    const h = 1e-5
    for (let i = 0; i < E * H; i++) {
      const moved = (delta: number) => w.map((value, at) => (at === i ? value + delta : value))
      const numeric = (loss(moved(h), w, runs) - loss(moved(-h), w, runs)) / (2 * h)
      expect(got[i]).toBeCloseTo(numeric, 4)
    }
    expect(Math.max(...got.map(Math.abs))).toBeGreaterThan(0.1)
    router.dispose()
    ctx.scope.close()
  })
})
