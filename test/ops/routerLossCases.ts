// Cases of the losses of routers, which have no value in the pass: what passes by is the oracle's output, their definition the extra
// loss whose gradient joins; see cases.ts. Some rows stand behind the last token and count nowhere.
import { balance, zLoss } from '../../lib/ops/routerLosses.js'
import { expertCounts, route } from '../../lib/ops/routing.js'
import type { OpCase } from './cases.js'
import type { F64 } from './oracle.js'
import { routeToken, routings } from './routingCases.js'

const tokens = 6

interface Balanced {
  readonly runs: number
  /** Of the rows the first so many are tokens `first` and on. */
  readonly first?: number
  readonly sigmoid?: boolean
}

/** The weights of a routing, whose gradient also has that of factor · sum of counts · scores. */
function balanceCase({ runs, first = 0, sigmoid = false }: Balanced): OpCase {
  const r = { ...routings[0]!, sigmoid, bias: null, groups: 1, groupTopk: 1 }
  const factor = 0.25
  const routed = (x: F64) =>
    Array.from({ length: tokens }, (_, t) => routeToken(Array.from(x.subarray(t * r.E, (t + 1) * r.E)), r))
  return {
    name: `balance, ${runs} runs, from token ${first}${sigmoid ? ', sigmoid' : ''}`,
    inputs: { x: { shape: [tokens, r.E] } },
    float32Only: true,
    run(ctx, { x }) {
      const { weights, scores, experts } = route(ctx, { ...r, logits: x!, topk: r.K, bias: null })
      const counts = expertCounts(ctx, experts, r.E, runs)
      return [balance(ctx, { weights, scores, counts, factor, first, tokens, normalize: sigmoid }).weights]
    },
    oracle: ({ x }) => [Float64Array.from(routed(x!).flatMap((t) => t.weights))],
    extraLoss({ x }) {
      const all = routed(x!)
      const size = tokens / runs
      return all.slice(0, tokens - first).reduce((loss, { scores }, row) => {
        const run = Math.floor((first + row) / size)
        const counted = all.slice(run * size, (run + 1) * size)
        const counts = scores.map((_, e) => counted.filter(({ experts }) => experts.includes(e)).length)
        const total = sigmoid ? scores.reduce((sum, s) => sum + s, 0) : 1
        return loss + scores.reduce((sum, s, e) => sum + (factor * counts[e]! * s) / total, 0)
      }, 0)
    },
  }
}

/** Logits, whose gradient also has that of the squares of their log-sum-exps. */
function zLossCase(counting: number): OpCase {
  const [E, coefficient] = [7, 0.1]
  return {
    name: `zLoss, ${counting} of ${tokens} rows`,
    inputs: { x: { shape: [tokens, E] } },
    run: (ctx, { x }) => [zLoss(ctx, { logits: x!, coefficient, first: tokens - counting, tokens }).logits],
    oracle: ({ x }) => [Float64Array.from(x!)],
    extraLoss: ({ x }) =>
      Array.from({ length: counting }, (_, t) => {
        const row = Array.from(x!.subarray(t * E, (t + 1) * E))
        return coefficient * Math.log(row.reduce((sum, v) => sum + Math.exp(v), 0)) ** 2
      }).reduce((a, b) => a + b, 0),
  }
}

export const routerLossCases: readonly OpCase[] = [
  balanceCase({ runs: 1 }),
  balanceCase({ runs: 2 }),
  balanceCase({ runs: 3, first: 2 }),
  balanceCase({ runs: 1, sigmoid: true }),
  balanceCase({ runs: 2, first: 1, sigmoid: true }),
  zLossCase(6),
  zLossCase(4),
]
