// What the ops compute, in plain float64 loops written from their definitions: slow, obvious, independent of the kernels.
// Legend: T tokens, K input channels, N output channels, H channels, V vocabulary; arrays are row-major.

export type F64 = Float64Array

/** x[T,K] · w[N,K]ᵀ + b[N]. */
export function linear(x: F64, w: F64, b: F64 | null, T: number, K: number, N: number): F64 {
  const y = new Float64Array(T * N)
  for (let t = 0; t < T; t++) {
    for (let n = 0; n < N; n++) {
      let s = b ? b[n]! : 0
      for (let k = 0; k < K; k++) s += x[t * K + k]! * w[n * K + k]!
      y[t * N + n] = s
    }
  }
  return y
}

export function rmsNorm(h: F64, w: F64, T: number, H: number, eps: number, offset: number): F64 {
  const y = new Float64Array(T * H)
  for (let t = 0; t < T; t++) {
    let squares = 0
    for (let i = 0; i < H; i++) squares += h[t * H + i]! ** 2
    const r = 1 / Math.sqrt(squares / H + eps)
    for (let i = 0; i < H; i++) y[t * H + i] = h[t * H + i]! * r * (w[i]! + offset)
  }
  return y
}

export function layerNorm(x: F64, w: F64, b: F64 | null, T: number, H: number, eps: number, offset: number): F64 {
  const y = new Float64Array(T * H)
  for (let t = 0; t < T; t++) {
    let mean = 0
    for (let i = 0; i < H; i++) mean += x[t * H + i]! / H
    let variance = 0
    for (let i = 0; i < H; i++) variance += (x[t * H + i]! - mean) ** 2 / H
    const r = 1 / Math.sqrt(variance + eps)
    for (let i = 0; i < H; i++) y[t * H + i] = (x[t * H + i]! - mean) * r * (w[i]! + offset) + (b ? b[i]! : 0)
  }
  return y
}

/** Abramowitz and Stegun 7.1.5 as a series: exact to 1e-15 for |x| < 6. */
function erf(x: number): number {
  let term = x
  let total = x
  for (let n = 1; n < 200; n++) {
    term *= (-x * x) / n
    total += term / (2 * n + 1)
  }
  return (2 / Math.sqrt(Math.PI)) * total
}

export const act: Record<string, (x: number) => number> = {
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  relu: (x) => Math.max(0, x),
  relu2: (x) => Math.max(0, x) ** 2,
  quick_gelu: (x) => x / (1 + Math.exp(-1.702 * x)),
  sigmoid: (x) => 1 / (1 + Math.exp(-x)),
}

/** Gate first, then up. */
export function gated(x: F64, T: number, F: number, kind: string): F64 {
  const y = new Float64Array(T * F)
  for (let t = 0; t < T; t++) {
    for (let i = 0; i < F; i++) y[t * F + i] = act[kind]!(x[t * 2 * F + i]!) * x[t * 2 * F + F + i]!
  }
  return y
}

export interface AttentionCase {
  readonly B: number
  readonly S: number
  readonly G: number
  readonly R: number
  readonly D: number
  readonly scale: number
  readonly causal: boolean
  readonly window: number
  readonly softcap: number
  readonly firstKey: readonly number[] | null
  readonly keyEnd: readonly number[] | null
  /** Radians a position of each pair; empty: no rotation. */
  readonly frequencies: readonly number[]
  readonly positions: readonly number[]
  readonly interleaved: boolean
}

/** One head's channels rotated by position · frequency. */
function rotated(x: number[], position: number, { frequencies, interleaved }: AttentionCase): number[] {
  const y = [...x]
  const half = frequencies.length
  for (let i = 0; i < half; i++) {
    const [a, b] = interleaved ? [2 * i, 2 * i + 1] : [i, i + half]
    const c = Math.cos(position * frequencies[i]!)
    const s = Math.sin(position * frequencies[i]!)
    y[a!] = x[a!]! * c - x[b!]! * s
    y[b!] = x[b!]! * c + x[a!]! * s
  }
  return y
}

/** Packed qkv [B·S, G·(R+2)·D] to [B·S, G·R·D]. */
export function attention(qkv: F64, c: AttentionCase, sink?: F64): F64 {
  const { B, S, G, R, D } = c
  const row = G * (R + 2) * D
  const y = new Float64Array(B * S * G * R * D)
  const head = (b: number, s: number, g: number, h: number): number[] => {
    const at = (b * S + s) * row + (g * (R + 2) + h) * D
    const x = Array.from(qkv.subarray(at, at + D))
    return h <= R ? rotated(x, c.positions[b * S + s]!, c) : x
  }
  for (let b = 0; b < B; b++) {
    for (let g = 0; g < G; g++) {
      for (let r = 0; r < R; r++) {
        for (let i = 0; i < S; i++) {
          const q = head(b, i, g, r)
          const seen: number[] = []
          const scores: number[] = []
          for (let j = 0; j < S; j++) {
            if (c.causal && j > i) continue
            if (c.window > 0 && j <= i - c.window) continue
            if (c.firstKey && j < c.firstKey[b * S + i]!) continue
            if (c.keyEnd && j >= c.keyEnd[b]!) continue
            const k = head(b, j, g, R)
            let s = 0
            for (let d = 0; d < D; d++) s += q[d]! * k[d]!
            s *= c.scale
            seen.push(j)
            scores.push(c.softcap > 0 ? c.softcap * Math.tanh(s / c.softcap) : s)
          }
          if (sink) scores.push(sink[g * R + r]!)
          const top = Math.max(...scores)
          const weights = scores.map((s) => Math.exp(s - top))
          const total = weights.reduce((a, w) => a + w, 0)
          for (let n = 0; n < seen.length; n++) {
            const v = head(b, seen[n]!, g, R + 1)
            const at = (b * S + i) * G * R * D + (g * R + r) * D
            for (let d = 0; d < D; d++) y[at + d] = y[at + d]! + (weights[n]! / total) * v[d]!
          }
        }
      }
    }
  }
  return y
}

/** Loss of each token over the first `vocabSize` of V columns; 0 where the label is -100. */
export function crossEntropy(logits: F64, labels: readonly number[], T: number, V: number, vocabSize: number): F64 {
  const loss = new Float64Array(T)
  for (let t = 0; t < T; t++) {
    if (labels[t]! === -100) continue
    const row = Array.from(logits.subarray(t * V, t * V + vocabSize))
    const top = Math.max(...row)
    loss[t] = top + Math.log(row.reduce((a, x) => a + Math.exp(x - top), 0)) - row[labels[t]!]!
  }
  return loss
}
