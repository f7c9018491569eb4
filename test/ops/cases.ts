// One list of cases for each op. Each case serves correctness (against the float64 oracle), gradients (against finite differences
// of that oracle) and timing. `inputs` are float tensors through which gradients flow; integers are fixed parts of a case.

import { type Activation, activation, activationCodes, gatedActivation } from '../../lib/ops/activation.js'
import { attention } from '../../lib/ops/attention.js'
import { crossEntropy } from '../../lib/ops/crossEntropy.js'
import { add, cast, clip, mul, reshape, scale, sum } from '../../lib/ops/elementwise.js'
import { embedding } from '../../lib/ops/embedding.js'
import { addBias, linear, linearActivation, linearFloat32 } from '../../lib/ops/linear.js'
import { layerNorm, rmsNorm } from '../../lib/ops/norm.js'
import type { TrainableWeight } from '../../lib/ops/weight.js'
import type { Ctx } from '../../lib/tensor/ctx.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import type { F64 } from './oracle.js'
import * as oracle from './oracle.js'
import { routerLossCases } from './routerLossCases.js'
import { routingCases } from './routingCases.js'

export interface OpInput {
  readonly shape: readonly number[]
  /** A parameter: its gradient is float32 and accumulates. */
  readonly weight?: boolean
  /** Values are drawn from a normal distribution of this width. Default 1. */
  readonly spread?: number
}

export interface OpCase {
  readonly name: string
  readonly inputs: Readonly<Record<string, OpInput>>
  /** float32 only: the op has no bfloat16 form. */
  readonly float32Only?: boolean
  run(ctx: Ctx, x: Readonly<Record<string, Tensor>>, w: Readonly<Record<string, TrainableWeight>>): readonly Tensor[]
  oracle(x: Readonly<Record<string, F64>>): readonly F64[]
  /** A loss that the op adds in the backward pass alone. */
  extraLoss?(x: Readonly<Record<string, F64>>): number
}

const activations = Object.keys(activationCodes) as Activation[]

function linearFloat32Case(T: number, K: number, N: number): OpCase {
  return {
    name: `linearFloat32 ${T}x${K}x${N}`,
    inputs: { x: { shape: [T, K] }, w: { shape: [N, K], weight: true } },
    run: (ctx, { x }, { w }) => [linearFloat32(ctx, { x: x!, weight: w! }).y],
    oracle: ({ x, w }) => [oracle.linear(x!, w!, null, T, K, N)],
  }
}

function linearCase(T: number, K: number, N: number, bias: boolean): OpCase {
  return {
    name: `linear ${T}x${K}x${N}${bias ? ' with bias' : ''}`,
    inputs: {
      x: { shape: [T, K] },
      w: { shape: [N, K], weight: true },
      ...(bias ? { b: { shape: [N], weight: true } } : {}),
    },
    run: (ctx, { x }, { w, b }) => [linear(ctx, { x: x!, weight: w!, bias: b ?? null }).y],
    oracle: ({ x, w, b }) => [oracle.linear(x!, w!, b ?? null, T, K, N)],
  }
}

function rmsCase(T: number, H: number, residual: boolean, zeroCentered: boolean): OpCase {
  return {
    name: `rmsNorm ${T}x${H}${residual ? ' with residual' : ''}${zeroCentered ? ' zero-centered' : ''}`,
    inputs: { x: { shape: [T, H] }, ...(residual ? { r: { shape: [T, H] } } : {}), w: { shape: [H], weight: true } },
    run(ctx, { x, r }, { w }) {
      const { y, sum: h } = rmsNorm(ctx, { x: x!, residual: r ?? null, weight: w!, eps: 1e-3, zeroCentered })
      return [y, h]
    },
    oracle({ x, r, w }) {
      const h = x!.map((value, i) => value + (r ? r[i]! : 0))
      const y = oracle.rmsNorm(h, w!, T, H, 1e-3, zeroCentered ? 1 : 0)
      return [y, h]
    },
  }
}

function layerNormCase(T: number, H: number, bias: boolean): OpCase {
  return {
    name: `layerNorm ${T}x${H}${bias ? ' with bias' : ''}`,
    inputs: {
      x: { shape: [T, H] },
      w: { shape: [H], weight: true },
      ...(bias ? { b: { shape: [H], weight: true } } : {}),
    },
    run: (ctx, { x }, { w, b }) => [layerNorm(ctx, { x: x!, weight: w!, bias: b ?? null, eps: 1e-3 }).y],
    oracle: ({ x, w, b }) => [oracle.layerNorm(x!, w!, b ?? null, T, H, 1e-3, 0)],
  }
}

function attentionCase(name: string, changes: Partial<oracle.AttentionCase>, sink = false): OpCase {
  const base = {
    B: 2,
    S: 7,
    G: 2,
    R: 3,
    D: 6,
    causal: true,
    window: 0,
    softcap: 0,
    firstKey: null,
    keyEnd: null,
    interleaved: false,
  }
  const sized = { ...base, ...changes }
  const { B, S, G, R, D } = sized
  const c: oracle.AttentionCase = {
    scale: D ** -0.5,
    frequencies: Array.from({ length: D / 2 }, (_, i) => 0.7 ** i),
    positions: Array.from({ length: B * S }, (_, t) => (t % S) + 2 * Math.floor(t / S)),
    ...sized,
  }
  const P = Math.max(...c.positions) + 1
  const half = c.frequencies.length
  const table = (f: (x: number) => number) =>
    Array.from({ length: P * half }, (_, i) => f(Math.floor(i / half) * c.frequencies[i % half]!))
  return {
    name: `attention ${name}`,
    inputs: {
      qkv: { shape: [B * S, G * (R + 2) * D] },
      ...(sink ? { sink: { shape: [G * R], weight: true } } : {}),
    },
    run(ctx, { qkv }, { sink: weight }) {
      const int32 = (values: readonly number[], shape: number[]) =>
        Tensor.fromHost(ctx, Int32Array.from(values), shape, 'int32')
      const rotary =
        half === 0
          ? null
          : {
              cos: Tensor.fromHost(ctx, Float32Array.from(table(Math.cos)), [P, half], 'float32'),
              sin: Tensor.fromHost(ctx, Float32Array.from(table(Math.sin)), [P, half], 'float32'),
              positions: int32(c.positions, [B * S]),
              interleaved: c.interleaved,
            }
      const { scale: factor, causal, window, softcap } = c
      const args = {
        batchSize: B,
        groups: G,
        queriesPerGroup: R,
        channels: D,
        rotary,
        scale: factor,
        causal,
        window,
        softcap,
      }
      const firstKey = c.firstKey ? int32(c.firstKey, [B, S]) : null
      const keyEnd = c.keyEnd ? int32(c.keyEnd, [B]) : null
      // The op rotates its input in place; the case's input must stay what it is.
      const own = ctx.empty(qkv!.shape, qkv!.dtype)
      const copy = cast(ctx, { x: qkv!, dtype: own.dtype }).y
      return [attention(ctx, { ...args, qkv: copy, firstKey, keyEnd, sink: weight ?? null }).y]
    },
    oracle: ({ qkv, sink: scores }) => [oracle.attention(qkv!, c, scores)],
  }
}

function linearActivationCase(T: number, K: number, N: number, bias: boolean, kind: Activation): OpCase {
  const { name, inputs, oracle: product } = linearCase(T, K, N, bias)
  return {
    name: `${name}, then ${kind}`,
    inputs,
    run: (ctx, { x }, { w, b }) => [linearActivation(ctx, { x: x!, weight: w!, bias: b ?? null, kind })],
    oracle: (x) => [product(x)[0]!.map(oracle.act[kind]!)],
  }
}

function crossEntropyCase(T: number, V: number, vocabSize: number): OpCase {
  const labels = Array.from({ length: T }, (_, t) => (t % 4 === 1 ? -100 : (t * 7) % vocabSize))
  return {
    name: `crossEntropy ${T}x${V}${V > vocabSize ? ' padded' : ''}`,
    inputs: { x: { shape: [T, V], spread: 3 } },
    run(ctx, { x }) {
      const { loss, lossSum } = crossEntropy(ctx, {
        logits: x!,
        labels: Tensor.fromHost(ctx, labels, [T], 'int32'),
        vocabSize,
      })
      return [loss, lossSum]
    },
    oracle({ x }) {
      const loss = oracle.crossEntropy(x!, labels, T, V, vocabSize)
      return [loss, Float64Array.of(loss.reduce((a, l) => a + l, 0))]
    },
  }
}

function embeddingCase(vocabStart: number): OpCase {
  const ids = [3, 0, 6, 3, 9, 4, 3]
  const [V, H] = [7, 5]
  return {
    name: `embedding from row ${vocabStart}`,
    inputs: { w: { shape: [V, H], weight: true } },
    run: (ctx, _, { w }) => [
      embedding(ctx, { ids: Tensor.fromHost(ctx, ids, [ids.length], 'int32'), weight: w!, vocabStart }).y,
    ],
    oracle({ w }) {
      const y = new Float64Array(ids.length * H)
      ids.forEach((id, t) => {
        const row = id - vocabStart
        if (row >= 0 && row < V) y.set(w!.subarray(row * H, (row + 1) * H), t * H)
      })
      return [y]
    },
  }
}

/** Every op, with sizes that no vector width divides. */
export const cases: readonly OpCase[] = [
  ...routingCases,
  ...routerLossCases,
  linearFloat32Case(7, 13, 11),
  linearCase(7, 13, 11, true),
  linearCase(1, 5, 3, false),
  linearCase(33, 17, 40, true),
  linearActivationCase(9, 13, 16, true, 'gelu_tanh'),
  linearActivationCase(6, 10, 11, false, 'gelu_tanh'),
  linearActivationCase(5, 12, 24, false, 'relu2'),
  {
    name: 'addBias',
    inputs: { x: { shape: [5, 9] }, b: { shape: [9], weight: true } },
    run(ctx, { x }, { b }) {
      const copy = cast(ctx, { x: x!, dtype: x!.dtype }).y
      return [addBias(ctx, { x: copy, bias: b! }).y]
    },
    oracle: ({ x, b }) => [x!.map((value, i) => value + b![i % 9]!)],
  },
  rmsCase(5, 19, false, false),
  rmsCase(6, 24, true, false),
  rmsCase(3, 7, true, true),
  layerNormCase(5, 19, true),
  layerNormCase(4, 33, false),
  attentionCase('causal, grouped, halves', {}),
  attentionCase('interleaved', { interleaved: true, D: 8 }),
  attentionCase('one head, no rotation', { G: 1, R: 1, frequencies: [], B: 1 }),
  attentionCase('window 3', { window: 3 }),
  attentionCase('softcap 2', { softcap: 2 }),
  attentionCase('not causal, ragged keys', { causal: false, keyEnd: [7, 4] }),
  attentionCase('left padding', { firstKey: [0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3] }),
  attentionCase('with sinks', {}, true),
  attentionCase(
    'with sinks, softcap, a window and left padding',
    {
      window: 3,
      softcap: 2,
      firstKey: [0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3],
    },
    true,
  ),
  attentionCase('packed', { firstKey: [0, 0, 2, 2, 2, 5, 5, 0, 0, 0, 0, 4, 4, 4] }),
  attentionCase('longer than a block', { B: 1, S: 70, G: 1, R: 2, D: 4 }),
  ...activations.map(
    (kind): OpCase => ({
      name: `gated ${kind}`,
      inputs: { x: { shape: [3, 22] } },
      run: (ctx, { x }) => [gatedActivation(ctx, { x: x!, kind }).y],
      oracle: ({ x }) => [oracle.gated(x!, 3, 11, kind)],
    }),
  ),
  ...activations.map(
    (kind): OpCase => ({
      name: `activation ${kind}`,
      inputs: { x: { shape: [3, 17] } },
      run: (ctx, { x }) => [activation(ctx, { x: x!, kind }).y],
      oracle: ({ x }) => [x!.map(oracle.act[kind]!)],
    }),
  ),
  embeddingCase(0),
  embeddingCase(3),
  crossEntropyCase(9, 31, 31),
  crossEntropyCase(6, 40, 37),
  {
    name: 'add, one tensor twice',
    inputs: { a: { shape: [4, 5] }, b: { shape: [4, 5] } },
    run(ctx, { a, b }) {
      const s = add(ctx, { a: a!, b: b! }).y
      return [add(ctx, { a: s, b: a! }).y]
    },
    oracle: ({ a, b }) => [a!.map((value, i) => 2 * value + b![i]!)],
  },
  {
    name: 'mul, square',
    inputs: { a: { shape: [4, 5] }, b: { shape: [4, 5] } },
    run(ctx, { a, b }) {
      const p = mul(ctx, { a: a!, b: b! }).y
      return [mul(ctx, { a: p, b: p }).y]
    },
    oracle: ({ a, b }) => [a!.map((value, i) => (value * b![i]!) ** 2)],
  },
  {
    name: 'clip',
    inputs: { x: { shape: [4, 19] } },
    run: (ctx, { x }) => [clip(ctx, { x: x!, limit: 0.75 }).y],
    oracle: ({ x }) => [x!.map((value) => Math.max(-0.75, Math.min(0.75, value)))],
  },
  {
    name: 'scale and reshape',
    inputs: { x: { shape: [4, 6] } },
    run(ctx, { x }) {
      const factor = Tensor.fromHost(ctx, [0.75], [1], 'float32')
      return [scale(ctx, { x: reshape(ctx, { x: x!, shape: [3, 8] }).y, factor }).y]
    },
    oracle: ({ x }) => [x!.map((value) => 0.75 * value)],
  },
  {
    name: 'sum',
    float32Only: true,
    inputs: { x: { shape: [9, 5] } },
    run: (ctx, { x }) => [sum(ctx, { x: x! }).y],
    oracle: ({ x }) => [Float64Array.of(x!.reduce((a, value) => a + value, 0))],
  },
]
