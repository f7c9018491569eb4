// Cases of the ops that route tokens to experts, with their oracle in plain float64 loops; see cases.ts.
import { cast } from '../../lib/ops/elementwise.js'
import { qkNorm } from '../../lib/ops/qkNorm.js'
import { combine, expertOrder, groupedLinear, route, spread } from '../../lib/ops/routing.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import type { OpCase } from './cases.js'
import { type F64, linear, rmsNorm } from './oracle.js'

interface Routing {
  readonly E: number
  readonly K: number
  readonly sigmoid: boolean
  readonly normalize: boolean
  readonly bias: readonly number[] | null
  readonly groups: number
  readonly groupTopk: number
  readonly scaling: number
}

const highest = (keys: readonly number[], count: number) =>
  keys
    .map((key, i) => [key, i] as const)
    .sort(([a, i], [b, j]) => b - a || i - j)
    .slice(0, count)
    .map(([, i]) => i)

/** Scores, chosen experts and weights of one token, from the definitions of the models' papers. */
export function routeToken(logits: readonly number[], r: Routing) {
  const top = Math.max(...logits)
  const exps = logits.map((x) => Math.exp(x - top))
  const total = exps.reduce((a, b) => a + b, 0)
  const scores = logits.map((x, e) => (r.sigmoid ? 1 / (1 + Math.exp(-x)) : exps[e]! / total))
  let keys = scores.map((s, e) => s + (r.bias?.[e] ?? 0))
  if (r.groups > 1) {
    const width = r.E / r.groups
    const sums = Array.from({ length: r.groups }, (_, g) => {
      const own = keys.slice(g * width, (g + 1) * width)
      return highest(own, r.K / r.groupTopk).reduce((sum, i) => sum + own[i]!, 0)
    })
    const kept = highest(sums, r.groupTopk)
    keys = keys.map((key, e) => (kept.includes(Math.floor(e / width)) ? key : Number.NEGATIVE_INFINITY))
  }
  const experts = highest(keys, r.K)
  const chosen = experts.map((e) => scores[e]!)
  const sum = r.normalize ? chosen.reduce((a, b) => a + b, 0) : 1
  return { scores, experts, weights: chosen.map((s) => (r.scaling * s) / sum) }
}

/** Experts that tokens are sent to where the case does not draw them. */
const fixedExperts = [2, 0, 1, 2, 0, 2, 2, 1, 0, 1, 2, 1, 1, 0]
const [T, K, E, H] = [7, 2, 4, 9]

function order(): { source: number[]; place: number[]; counts: number[] } {
  const source = fixedExperts.map((e, i) => [e, i] as const).sort(([a, i], [b, j]) => a - b || i - j)
  const place: number[] = []
  source.forEach(([, i], at) => {
    place[i] = at
  })
  const counts = Array.from({ length: E }, (_, e) => fixedExperts.filter((x) => x === e).length)
  return { source: source.map(([, i]) => i), place, counts }
}

export const routings: readonly (Routing & { name: string })[] = [
  { name: 'softmax', sigmoid: false, normalize: false, bias: null, groups: 1, groupTopk: 1 },
  { name: 'softmax over the chosen', sigmoid: false, normalize: true, bias: null, groups: 1, groupTopk: 1 },
  { name: 'sigmoid with bias, scaled', sigmoid: true, normalize: true, bias: [0.3, -0.2], groups: 1, groupTopk: 1 },
  { name: 'sigmoid of two groups of four', sigmoid: true, normalize: true, bias: [0, 0.1], groups: 4, groupTopk: 2 },
].map(({ bias, ...r }) => {
  const experts = 12
  const all = bias && Array.from({ length: experts }, (_, e) => bias[e % 2]! * (e % 3))
  return { ...r, E: experts, K: 4, bias: all, scaling: bias ? 2.5 : 1 }
})

function routeCase(r: Routing & { name: string }): OpCase {
  return {
    name: `route: ${r.name}`,
    inputs: { x: { shape: [5, r.E] } },
    run(ctx, { x }) {
      const bias = r.bias && Tensor.fromHost(ctx, Array.from(r.bias), [r.E], 'float32')
      const out = route(ctx, { ...r, logits: x!, topk: r.K, bias })
      return [out.weights, out.scores]
    },
    oracle({ x }) {
      const tokens = Array.from({ length: 5 }, (_, t) => routeToken(Array.from(x!.subarray(t * r.E, (t + 1) * r.E)), r))
      return [Float64Array.from(tokens.flatMap((t) => t.weights)), Float64Array.from(tokens.flatMap((t) => t.scores))]
    },
  }
}

/** The cases; each kind of row movement once whole and once with a part of the rows. */
export const routingCases: readonly OpCase[] = [
  ...routings.map(routeCase),
  ...[0, 3].map(
    (first): OpCase => ({
      name: `spread from row ${first}`,
      inputs: { x: { shape: [T, H] } },
      run(ctx, { x }) {
        const { source, place } = expertOrder(ctx, Tensor.fromHost(ctx, fixedExperts, [T, K], 'int32'), E)
        const part = source.slice(ctx, 0, first, T * K - 2 * first)
        return [spread(ctx, { x: x!, source: part, place, first }).y]
      },
      oracle({ x }) {
        const rows = order().source.slice(first, T * K - first)
        return [Float64Array.from(rows.flatMap((i) => Array.from(rowOf(x!, Math.floor(i / K)))))]
      },
    }),
  ),
  ...[0, 3].map(
    (first): OpCase => ({
      name: `combine from row ${first}`,
      inputs: { x: { shape: [T * K - 2 * first, H] }, w: { shape: [T, K] } },
      run(ctx, { x, w }) {
        const { source, place } = expertOrder(ctx, Tensor.fromHost(ctx, fixedExperts, [T, K], 'int32'), E)
        const part = source.slice(ctx, 0, first, T * K - 2 * first)
        // Weights are float32 whatever the rows are.
        const weights = cast(ctx, { x: w!, dtype: 'float32' }).y
        return [combine(ctx, { x: x!, weights, source: part, place, first }).y]
      },
      oracle({ x, w }) {
        const y = new Float64Array(T * H)
        const rows = T * K - 2 * first
        order().place.forEach((at, i) => {
          if (at < first || at >= first + rows) return
          const row = rowOf(x!, at - first)
          for (let c = 0; c < H; c++) y[Math.floor(i / K) * H + c]! += w![i]! * row[c]!
        })
        return [y]
      },
    }),
  ),
  {
    name: 'groupedLinear, one expert without rows',
    inputs: {
      x: { shape: [T * K, H] },
      ...Object.fromEntries(Array.from({ length: E }, (_, e) => [`w${e}`, { shape: [5, H], weight: true }])),
    },
    run(ctx, { x }, w) {
      const weights = Array.from({ length: E }, (_, e) => w[`w${e}`]!)
      return [groupedLinear(ctx, { x: x!, weights, counts: order().counts }).y]
    },
    oracle(inputs) {
      let first = 0
      const parts = order().counts.map((count, e) => {
        const rows = inputs['x']!.subarray(first * H, (first + count) * H)
        first += count
        return linear(rows, inputs[`w${e}`]!, null, count, H, 5)
      })
      return [Float64Array.from(parts.flatMap((part) => Array.from(part)))]
    },
  },
  qkNormCase({ groups: 2, queriesPerGroup: 3, channels: 6 }),
  qkNormCase({ groups: 3, queriesPerGroup: 1, channels: 5 }),
]

/** Each head of packed queries and keys normalised by itself; values stay. */
function qkNormCase(shape: { groups: number; queriesPerGroup: number; channels: number }): OpCase {
  const { groups: G, queriesPerGroup: R, channels: D } = shape
  return {
    name: `qkNorm ${G}x${R}x${D}`,
    inputs: { x: { shape: [4, G * (R + 2) * D] }, q: { shape: [D], weight: true }, k: { shape: [D], weight: true } },
    run: (ctx, { x }, { q, k }) => [qkNorm(ctx, { ...shape, qkv: x!, q: q!, k: k!, eps: 1e-3 }).y],
    oracle({ x, q, k }) {
      const y = Float64Array.from(x!)
      for (let head = 0; head < 4 * G * (R + 2); head++) {
        const kind = head % (R + 2)
        if (kind === R + 1) continue
        const own = x!.subarray(head * D, (head + 1) * D)
        y.set(rmsNorm(own, kind === R ? k! : q!, 1, D, 1e-3, 0), head * D)
      }
      return [y]
    },
  }
}

const rowOf = (x: F64, t: number) => x.subarray(t * H, (t + 1) * H)
