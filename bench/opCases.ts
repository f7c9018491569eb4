// The ops whose rate is measured, one row each: how it is called, and the floating-point operations and bytes that it cannot do
// without (each input read once, each output written once). Sizes come from the caller; opRun.ts times the calls.
import { native } from '../lib/addon/load.js'
import type { DType } from '../lib/base/dtype.js'
import { contiguousStrides } from '../lib/base/shape.js'
import type { Ctx } from '../lib/tensor/ctx.js'
import { Tensor } from '../lib/tensor/tensor.js'

/** Widths of the layer that the ops belong to. */
export interface OpSizes {
  readonly batch: number
  readonly seqLength: number
  readonly hidden: number
  readonly ffn: number
  readonly groups: number
  readonly headsPerGroup: number
  readonly channels: number
  readonly vocabulary: number
  /** Rows of logits: fewer than tokens, a row is large. */
  readonly logitRows: number
  /** Elements of the optimizer's and the element-wise ops' tensors. */
  readonly elements: number
  readonly experts: number
  readonly expertFfn: number
  readonly topk: number
}

/** Matrix products: y [m,n] = a [m,k] . b, with b as [n,k] as a linear's forward pass has it. */
export type MatmulShape = readonly [m: number, n: number, k: number]

/** One measured op. */
export interface OpCase {
  readonly flops?: number
  readonly bytes: number
  /** Which measured ceiling of products it is held to; default bfloat16. */
  readonly ceiling?: 'float32'
  /** Makes the tensors; what comes back enqueues the op once. */
  build(make: Maker): () => void
}

/** Tensors with random content on the device. */
export class Maker {
  #seed = 0
  readonly #views: number[] = []
  constructor(readonly ctx: Ctx) {}

  get stream(): number {
    return this.ctx.stream.id
  }

  empty(shape: readonly number[], dtype: DType): number {
    return Tensor.empty(this.ctx, shape, dtype).handle
  }

  full(shape: readonly number[], value: number, dtype: DType = 'float32'): number {
    return Tensor.full(this.ctx, shape, dtype, value).handle
  }

  normal(shape: readonly number[], dtype: DType = 'bfloat16', mean = 0): number {
    const y = this.empty(shape, dtype)
    const start = shape.map(() => 0)
    native.randomNormal(this.stream, y, 1, ++this.#seed, start, contiguousStrides(shape), mean, 1)
    return y
  }

  /** Whole numbers below `bound`, all of them equally often, scattered. */
  ints(count: number, bound: number): number {
    const data = Int32Array.from({ length: count }, (_, i) => Math.imul(i, 7919) % bound).map(Math.abs)
    return Tensor.fromHost(this.ctx, data, [count], 'int32').handle
  }

  /** The same memory in another shape. */
  view(tensor: number, shape: readonly number[]): number {
    const view = native.view(tensor, shape, contiguousStrides(shape), 0)
    this.#views.push(view)
    return view
  }

  /** Frees all that was made. */
  close(): void {
    for (const view of this.#views.splice(0)) native.free(view)
    this.ctx.scope.close()
  }

  host(data: Int32Array | Float32Array, shape: readonly number[]): number {
    return Tensor.fromHost(this.ctx, data, shape, data instanceof Int32Array ? 'int32' : 'float32').handle
  }
}

const width = { float32: 4, bfloat16: 2, float16: 2 } as const
export type FloatName = keyof typeof width

/** A product; `weights` is that of a weight's gradient, which adds to float32. */
export function matmulCase([m, n, k]: MatmulShape, dtype: FloatName, form: 'forward' | 'weights' = 'forward'): OpCase {
  const forward = form === 'forward'
  return {
    flops: 2 * m * n * k,
    bytes: (m * k + n * k) * width[dtype] + m * n * (forward ? width[dtype] : 8),
    build(make) {
      const a = make.normal(forward ? [m, k] : [k, m], dtype)
      const b = make.normal(forward ? [n, k] : [k, n], dtype)
      const y = forward ? make.empty([m, n], dtype) : make.full([m, n], 0)
      return () => native.matmul(make.stream, y, a, b, 0, !forward, forward, !forward)
    },
  }
}

const silu = 0

/** How attention is computed; `unordered`: by cuDNN, whose gradients' bits need not be equal. */
type AttentionWay = 'auto' | 'own' | 'unordered'

function attentionCase(o: OpSizes, engine: AttentionWay, backward: boolean, dtype: FloatName): OpCase {
  // Each query meets the keys before it and its own.
  const scores = o.batch * o.groups * o.headsPerGroup * ((o.seqLength * (o.seqLength + 1)) / 2) * o.channels
  const [B, S, G, R, D] = [o.batch, o.seqLength, o.groups, o.headsPerGroup, o.channels]
  const queries = B * S * G * R * D * width[dtype]
  const keys = B * S * G * D * width[dtype]
  return {
    // Two products forward, five backward.
    flops: 2 * scores * (backward ? 5 : 2),
    bytes: backward ? 4 * queries + 4 * keys : 2 * queries + 2 * keys,
    ...(dtype === 'float32' ? { ceiling: 'float32' as const } : {}),
    build(make) {
      const [q, out] = [make.normal([B, S, G, R, D], dtype), make.empty([B, S, G, R, D], dtype)]
      const [k, v] = [make.normal([B, S, G, D], dtype), make.normal([B, S, G, D], dtype)]
      const lse = make.empty([B, G * R, S], 'float32')
      const [dOut, dq] = [make.normal([B, S, G, R, D], dtype), make.empty([B, S, G, R, D], dtype)]
      const [dk, dv] = [make.empty([B, S, G, D], dtype), make.empty([B, S, G, D], dtype)]
      const { index } = make.ctx.device
      const scale = 1 / Math.sqrt(D)
      const choose = () => {
        native.setAttentionEngine(index, engine === 'own' ? 'own' : 'auto')
        native.allowNondeterministic(index, engine === 'unordered')
      }
      const forward = () => {
        choose()
        native.attentionForward(make.stream, out, lse, q, k, v, 0, 0, scale, true, 0, 0, 0)
      }
      if (!backward) return forward
      forward()
      return () => {
        choose()
        native.attentionBackward(make.stream, dq, dk, dv, dOut, q, k, v, out, lse, 0, 0, scale, true, 0, 0, 0)
      }
    },
  }
}

function crossEntropyCase({ logitRows: L, vocabulary: V }: OpSizes, backward: boolean, dtype: FloatName): OpCase {
  return {
    bytes: (backward ? 2 : 1) * width[dtype] * L * V,
    build(make) {
      const [logits, labels] = [make.normal([L, V], dtype), make.ints(L, V)]
      if (backward) {
        const [lse, dLoss] = [make.full([L], 12), make.full([1], 1)]
        // Over the logits, as in a training step.
        return () => native.crossEntropyBackward(make.stream, logits, logits, lse, labels, dLoss, 0, V)
      }
      const [stats, lse, loss] = [make.empty([3, L], 'float32'), make.empty([L], 'float32'), make.empty([L], 'float32')]
      const ofOne = make.view(stats, [1, 3, L])
      return () => {
        native.crossEntropyStats(make.stream, stats, logits, labels, 0, V)
        native.crossEntropyCombine(make.stream, lse, loss, ofOne, labels)
      }
    },
  }
}

/** All ops but products and copies, by name. */
export function opCases(o: OpSizes): Readonly<Record<string, OpCase>> {
  const T = o.batch * o.seqLength
  const { hidden: H, ffn: F, vocabulary: V, elements: N, topk: K, experts: E, expertFfn: X } = o
  const norm = (backward: 'no' | 'input' | 'weight', residual: boolean): OpCase => ({
    bytes: 2 * T * H * (backward === 'weight' ? 2 : backward === 'input' || residual ? 4 : 2),
    build(make) {
      const [x, y, w] = [make.normal([T, H]), make.normal([T, H]), make.normal([H], 'bfloat16', 1)]
      const [r, sum] = [make.normal([T, H]), make.empty([T, H], 'bfloat16')]
      const rstd = make.full([T], 1)
      const dw = make.full([H], 0)
      const s = make.stream
      if (backward === 'no')
        return () => native.rmsNormForward(s, y, rstd, residual ? sum : 0, x, residual ? r : 0, w, 1e-5, false)
      if (backward === 'input') return () => native.rmsNormBackwardInput(s, sum, y, x, w, rstd, r, false)
      return () => native.rmsNormBackwardWeight(s, dw, y, x, rstd)
    },
  })
  const layerNorm = (backward: boolean): OpCase => ({
    bytes: 2 * T * H * (backward ? 3 : 2),
    build(make) {
      const [x, y, dx] = [make.normal([T, H]), make.normal([T, H]), make.empty([T, H], 'bfloat16')]
      const [w, b] = [make.normal([H], 'bfloat16', 1), make.normal([H])]
      const [mean, rstd] = [make.full([T], 0), make.full([T], 1)]
      return backward
        ? () => native.layerNormBackwardInput(make.stream, dx, y, x, w, mean, rstd, false)
        : () => native.layerNormForward(make.stream, y, mean, rstd, x, w, b, 1e-5, false)
    },
  })
  const elementwise = (bytes: number, build: (make: Maker) => () => void): OpCase => ({ bytes: bytes * N, build })
  const cast = (from: FloatName, to: FloatName) =>
    elementwise(width[from] + width[to], (make) => {
      const [x, y] = [make.normal([N], from), make.empty([N], to)]
      return () => native.copy(make.stream, y, x)
    })
  const attention = (engine: AttentionWay, backward: boolean) => attentionCase(o, engine, backward, 'bfloat16')
  const counts = Array.from({ length: E }, (_, e) => Math.floor(((e + 1) * T * K) / E) - Math.floor((e * T * K) / E))
  const grouped = (backward: boolean, engine: string): OpCase => ({
    flops: 2 * T * K * H * 2 * X,
    bytes: 2 * T * K * (H + 2 * X) + E * 2 * X * H * (backward ? 8 : 2),
    build(make) {
      const [x, y] = [make.normal([T * K, H]), make.normal([T * K, 2 * X])]
      const w = counts.map(() => (backward ? make.full([2 * X, H], 0) : make.normal([2 * X, H])))
      const { index } = make.ctx.device
      return () => {
        native.setGroupedMatmulEngine(index, engine)
        if (backward) native.groupedMatmulWeights(make.stream, w, y, x, counts)
        else native.groupedMatmul(make.stream, y, x, w, counts, true)
      }
    },
  })
  return {
    'RMS norm': norm('no', false),
    'RMS norm with residual': norm('no', true),
    'RMS norm, gradient of the input': norm('input', true),
    'RMS norm, gradient of the weight': norm('weight', false),
    'layer norm': layerNorm(false),
    'layer norm, gradient of the input': layerNorm(true),
    'rotary embedding': {
      bytes: 4 * T * o.groups * o.headsPerGroup * o.channels,
      build(make) {
        const x = make.normal([T, o.groups * o.headsPerGroup, o.channels])
        const [cos, sin] = [
          make.full([o.seqLength, o.channels / 2], 0.8),
          make.full([o.seqLength, o.channels / 2], 0.6),
        ]
        const positions = make.host(
          Int32Array.from({ length: T }, (_, t) => t % o.seqLength),
          [T],
        )
        return () => native.rope(make.stream, x, cos, sin, positions, false, false)
      },
    },
    SwiGLU: {
      bytes: 2 * T * F * 3,
      build(make) {
        const [x, y] = [make.normal([T, 2 * F]), make.empty([T, F], 'bfloat16')]
        return () => native.gatedActivationForward(make.stream, y, x, silu)
      },
    },
    'SwiGLU, gradient': {
      bytes: 2 * T * F * 5,
      build(make) {
        const [x, dy, dx] = [make.normal([T, 2 * F]), make.normal([T, F]), make.empty([T, 2 * F], 'bfloat16')]
        return () => native.gatedActivationBackward(make.stream, dx, dy, x, silu)
      },
    },
    'embedding (rows of the table)': {
      bytes: 4 * T * H,
      build(make) {
        const [w, y, ids] = [make.normal([V, H]), make.empty([T, H], 'bfloat16'), make.ints(T, V)]
        return () => native.embeddingForward(make.stream, y, w, ids, 0)
      },
    },
    'embedding, gradient': {
      bytes: T * H * (2 + 8),
      build(make) {
        const [dw, dy, ids] = [make.full([V, H], 0), make.normal([T, H]), make.ints(T, V)]
        return () => native.embeddingBackward(make.stream, dw, dy, ids, 0)
      },
    },
    'cross entropy': crossEntropyCase(o, false, 'bfloat16'),
    'cross entropy, gradient': crossEntropyCase(o, true, 'bfloat16'),
    'AdamW, bfloat16 with masters': elementwise(30, (make) => {
      const [p, g] = [make.normal([N], 'float32'), make.normal([N], 'float32')]
      const [m, v, model] = [make.full([N], 0), make.full([N], 0), make.empty([N], 'bfloat16')]
      const slots = make.host(Float32Array.of(1e-4, 0.1, 0.05, 1), [4])
      return () => native.adamw(make.stream, p, m, v, model, g, slots, 0.9, 0.95, 1e-8, 0.1)
    }),
    'sum of squares': elementwise(4, (make) => {
      const [acc, x] = [make.full([1], 0, 'float64'), make.normal([N], 'float32')]
      return () => native.sumSquares(make.stream, acc, x)
    }),
    'cast float32 to bfloat16': cast('float32', 'bfloat16'),
    'cast bfloat16 to float32': cast('bfloat16', 'float32'),
    add: elementwise(6, (make) => {
      const [y, a, b] = [make.empty([N], 'bfloat16'), make.normal([N]), make.normal([N])]
      return () => native.add(make.stream, y, a, b)
    }),
    'sum into float32': elementwise(10, (make) => {
      const [acc, x] = [make.full([N], 0), make.normal([N])]
      return () => native.accumulate(make.stream, acc, x)
    }),
    'sum over rows': {
      bytes: 2 * T * H,
      build(make) {
        const [acc, x] = [make.full([H], 0), make.normal([T, H])]
        return () => native.sumRows(make.stream, acc, x)
      },
    },
    dropout: {
      bytes: 4 * T * H,
      build(make) {
        const [x, y] = [make.normal([T, H]), make.empty([T, H], 'bfloat16')]
        const rng = make.full([2], 1, 'int64')
        const [ids, positions] = [make.full([T], 1, 'int64'), make.ints(T, o.seqLength)]
        return () => native.dropout(make.stream, y, x, rng, ids, positions, 1, 0, 0.1)
      },
    },
    'choice of experts': {
      bytes: T * E * (2 + 4) + 8 * T * K,
      build(make) {
        const logits = make.normal([T, E])
        const [weights, chosen] = [make.empty([T, K], 'float32'), make.empty([T, K], 'int32')]
        const scores = make.empty([T, E], 'float32')
        return () => native.routerForward(make.stream, weights, chosen, scores, logits, 0, false, true, 1, 1, 1)
      },
    },
    'rows to experts': {
      bytes: 4 * T * K * H,
      build(make) {
        const [x, y, source] = [make.normal([T, H]), make.empty([T * K, H], 'bfloat16'), make.ints(T * K, T * K)]
        return () => native.spreadRows(make.stream, y, x, source, 0, K)
      },
    },
    'rows of experts summed': {
      bytes: 2 * T * K * H + 2 * T * H,
      build(make) {
        const [x, y] = [make.normal([T * K, H]), make.empty([T, H], 'bfloat16')]
        const source = make.empty([T * K], 'int32')
        const place = make.empty([T, K], 'int32')
        native.expertOrder(make.stream, source, place, make.view(make.ints(T * K, E), [T, K]), E)
        const weights = make.full([T, K], 1 / K)
        return () => native.combineRows(make.stream, y, x, place, weights, 0)
      },
    },
    "products of experts' rows": grouped(false, 'streams'),
    "products of experts' rows in one launch": grouped(false, 'one_launch'),
    "products of experts' rows, gradient of the weights": grouped(true, 'streams'),
    'attention, causal': attention('auto', false),
    'attention, causal, gradient': attention('auto', true),
    'attention, causal, unordered, gradient': attention('unordered', true),
    'attention, causal, own kernel': attention('own', false),
    'attention, causal, own kernel, gradient': attention('own', true),
    'attention, causal, float32': attentionCase(o, 'own', false, 'float32'),
  }
}

/** The ops of a training step on a CPU that no matrix product is, by name. */
export function cpuOpCases(o: OpSizes): Readonly<Record<string, OpCase>> {
  const all = opCases(o)
  const picked = [
    'RMS norm',
    'RMS norm with residual',
    'RMS norm, gradient of the input',
    'RMS norm, gradient of the weight',
    'layer norm',
    'layer norm, gradient of the input',
    'rotary embedding',
    'SwiGLU',
    'SwiGLU, gradient',
    'cross entropy',
    'cross entropy, gradient',
    'AdamW, bfloat16 with masters',
    'sum of squares',
    'cast float32 to bfloat16',
    'cast bfloat16 to float32',
    'attention, causal',
    'attention, causal, gradient',
  ]
  return {
    ...Object.fromEntries(picked.map((name) => [name, all[name] as OpCase])),
    'cross entropy, float32': crossEntropyCase(o, false, 'float32'),
    'cross entropy, float32, gradient': crossEntropyCase(o, true, 'float32'),
    'attention, causal, float32': attentionCase(o, 'auto', false, 'float32'),
    'attention, causal, float32, gradient': attentionCase(o, 'auto', true, 'float32'),
  }
}
