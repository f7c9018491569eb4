// Our router against those of Transformers' models on random tokens: weights by expert, gradients of tokens and of the router's weight,
// and the balance loss that a step tells. The seed is printed.
import { beforeAll, describe, expect, test } from 'vitest'
import { Tape } from '../../lib/ops/tape.js'
import { RouterTotals } from '../../lib/parallel/routerTotals.js'
import { plainRouter, TopKRouter } from '../../lib/parallel/topKRouter.js'
import { Ctx, soloGroups } from '../../lib/tensor/ctx.js'
import { replicated } from '../../lib/tensor/shardSpec.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { python, runPython } from './python.js'

interface Case {
  readonly name: string
  readonly sizes: readonly [T: number, H: number, E: number, K: number]
  readonly groups: number
  readonly group_topk: number
  readonly scaling: number
  readonly normalize: boolean
  readonly bias: readonly number[] | null
  /** Mean over choices and tokens of the loss of Transformers, which counts a token once for each choice. */
  readonly balance: number
  readonly x: number[][]
  readonly weight: number[][]
  readonly seeds: number[][]
  readonly dense: number[][]
  readonly dx: number[][]
  readonly dw: number[][]
}

const seed = Number(process.env['VIADUCT_ORACLE_SEED'] ?? Math.floor(Math.random() * 1e9))
const names = ['Qwen3-MoE', 'Qwen3-MoE without normalisation', 'OLMoE', 'Mixtral', 'DeepSeek V3', 'GLM-4.5', 'GPT-OSS']
const cases = new Map<string, Case>()

describe.skipIf(python === null)('routers of Transformers', () => {
  beforeAll(() => {
    process.stdout.write(`VIADUCT_ORACLE_SEED=${seed}\n`)
    for (const line of runPython('routers.py', String(seed)).trim().split('\n')) {
      const one = JSON.parse(line) as Case
      cases.set(one.name, one)
    }
    expect([...cases.keys()]).toEqual(names)
  }, 120_000)

  test.each(names)('%s', async (name) => {
    const one = cases.get(name) as Case
    const [T, H, E, K] = one.sizes
    const ctx = Ctx.create({ device: 'cpu', tape: new Tape() })
    const tape = ctx.tape as Tape
    const totals = new RouterTotals()
    const sigmoid = one.bias !== null
    const router = new TopKRouter({
      config: {
        ...plainRouter,
        numExperts: E,
        topk: K,
        preSoftmax: !one.normalize,
        scoreFunction: sigmoid ? 'sigmoid' : 'softmax',
        groups: one.groups,
        groupTopk: one.group_topk,
        scaling: one.scaling,
        biasUpdateRate: sigmoid ? 0 : null,
        float32: true,
        auxLossCoeffs: { aux_loss: 1e-12 },
      },
      tp: soloGroups.get('tp'),
      weight: replicated([E, H]),
      bias: sigmoid ? replicated([E]) : null,
      dtype: 'float32',
      init: { kind: 'constant', value: 0 },
      layer: 0,
      totals,
    })
    const upload = (rows: readonly (readonly number[])[], width: number) =>
      Tensor.fromHost(ctx, Float32Array.from(rows.flat()), [rows.length, width], 'float32')
    router.weight.data = upload(one.weight, H).keep()
    if (router.expertBias !== null)
      router.expertBias.data = upload([one.bias as number[]], E)
        .reshape(ctx, [E])
        .keep()
    const x = upload(one.x, H)
    tape.watch(x)
    const { weights, experts } = router.forward(ctx, x, 1)
    const chosen = new Int32Array((await experts.bytes()).buffer)
    const got = await weights.toFloat32Array()
    const dense = Array.from({ length: T }, () => Array<number>(E).fill(0))
    const seeds = new Float32Array(T * K)
    for (let i = 0; i < T * K; i++) {
      const [t, e] = [Math.floor(i / K), chosen[i] as number]
      ;(dense[t] as number[])[e] = got[i] as number
      seeds[i] = one.seeds[t]?.[e] as number
    }
    const near = (values: Iterable<number>, expected: readonly (readonly number[])[]) => {
      const flat = expected.flat()
      ;[...values].forEach((value, i) => void expect(value).toBeCloseTo(flat[i] as number, 5))
    }
    near(dense.flat(), one.dense)
    const gradients = await tape.backward(ctx, [weights], [Tensor.fromHost(ctx, seeds, [T, K], 'float32')])
    near(await (gradients.get(x) as Tensor).toFloat32Array(), one.dx)
    near(await (router.weight.mainGrad as Tensor).toFloat32Array(), one.dw)
    // Their loss is of a softmax; a token counts for each of its choices.
    const told = (await totals.read()).get('load_balancing_loss') as number
    if (!sigmoid) expect(told).toBeCloseTo(one.balance / K, 5)
    totals.dispose()
    router.dispose()
    ctx.scope.close()
  })
})
