// One call of attention on the CPU and on the GPU of gpu.ts: tensors from names, in every layout, and how far both may be apart.
import { expect } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { numel } from '../../lib/base/shape.js'
import { type Bench, numbers, onBoth, type Results, randomBytes } from './pair.js'

export type Float = 'float32' | 'bfloat16'

export interface Case {
  readonly B: number
  readonly S: number
  readonly G: number
  readonly R: number
  readonly D: number
  readonly K: number
  readonly Dv: number
  readonly causal: boolean
  /** Key position of the first query. */
  readonly offset: number
  readonly window: number
  readonly softcap: number
  /** First key that query i of sample b sees. */
  readonly firstKey: ((b: number, i: number) => number) | null
  readonly keyEnd: readonly number[] | null
  /** How q, k and v lie: each alone; as one packed tensor; with gaps at odd addresses. */
  readonly layout: 'alone' | 'packed' | 'gaps'
  readonly backward: boolean
}

export function sized(changes: Partial<Case>): Case {
  const base = { B: 1, S: 5, G: 1, R: 1, D: 8, offset: 0, window: 0, softcap: 0, ...changes }
  return {
    K: base.S,
    Dv: base.D,
    causal: true,
    firstKey: null,
    keyEnd: null,
    layout: 'alone',
    backward: true,
    ...base,
  }
}

/** Strides of [B,S,G,R,D] or, without a `heads`, [B,S,G,D] in rows of `row` elements, groups `group` apart. */
function stridesIn(S: number, row: number, group: number, heads: number | null): number[] {
  return heads === null ? [S * row, row, group, 1] : [S * row, row, group, heads, 1]
}

/** out, lse and, backward, dq, dk, dv. */
export async function run(bench: Bench, c: Case, dtype: Float): Promise<Results> {
  const { B, S, G, R, D, K, Dv } = c
  const shapes = { q: [B, S, G, R, D], k: [B, K, G, D], v: [B, K, G, Dv], out: [B, S, G, R, Dv] }
  const data = (name: string, shape: readonly number[]) => randomBytes(`${name} ${shape}`, numel(shape), dtype)
  const views = (name: string, filled: boolean) => {
    const get = (part: 'q' | 'k' | 'v') => (filled ? data(`${name} ${part}`, shapes[part]) : undefined)
    const gaps = c.layout === 'gaps' ? { offset: 3, gap: 5 } : {}
    if (c.layout !== 'packed') {
      return {
        q: bench.tensor(shapes.q, dtype, get('q'), gaps),
        k: bench.tensor(shapes.k, dtype, get('k'), gaps),
        v: bench.tensor(shapes.v, dtype, get('v'), gaps),
      }
    }
    const [row, group] = [G * (R + 2) * D, (R + 2) * D]
    const whole = bench.tensor([B * S, row], dtype, filled ? data(name, [B * S, row]) : undefined)
    return {
      q: bench.view(whole, shapes.q, stridesIn(S, row, group, D)),
      k: bench.view(whole, shapes.k, stridesIn(S, row, group, null), R * D),
      v: bench.view(whole, shapes.v, stridesIn(S, row, group, null), (R + 1) * D),
    }
  }
  const { q, k, v } = views('x', true)
  const out = bench.tensor(shapes.out, dtype)
  const lseShape = [B, G * R, S]
  const lse = bench.tensor(lseShape, 'float32')
  const first = c.firstKey
  const firstKey =
    first === null
      ? 0
      : bench.tensor(
          [B, S],
          'int32',
          Int32Array.from({ length: B * S }, (_, t) => first(Math.floor(t / S), t % S)),
        )
  const keyEnd = c.keyEnd === null ? 0 : bench.tensor([B], 'int32', Int32Array.from(c.keyEnd))
  const rest = [firstKey, keyEnd, D ** -0.5, c.causal, c.offset, c.window, c.softcap] as const
  native.attentionForward(bench.stream, out, lse, q, k, v, ...rest)
  const results = [
    { bytes: await bench.read(out, shapes.out, dtype), dtype },
    { bytes: await bench.read(lse, lseShape, 'float32'), dtype: 'float32' as const },
  ]
  if (!c.backward) return results
  const dOut = bench.tensor(shapes.out, dtype, data('dOut', shapes.out))
  const d = views('d', false)
  native.attentionBackward(bench.stream, d.q, d.k, d.v, dOut, q, k, v, out, lse, ...rest)
  for (const part of ['q', 'k', 'v'] as const) {
    results.push({ bytes: await bench.read(d[part], shapes[part], dtype), dtype })
  }
  return results
}

// Both compute in float32 and round once: float32 differs by the order of sums, bfloat16 by the last bit of what is stored, and
// of `out`, from which the backward pass begins.
const bounds: Record<Float, number> = { float32: 3e-6, bfloat16: 2 ** -7 }

/**
 * Fails unless GPU and CPU agree, with -inf in the same places. `hardwareTanh`: cuDNN's softcap takes the hardware's approximated tanh,
 * within 2^-11 of its size; so are the scores, and their log-sum-exp.
 */
export async function same(c: Case, dtype: Float, { hardwareTanh = false } = {}): Promise<void> {
  const [cpu, gpu] = await onBoth((bench) => run(bench, c, dtype))
  const names = ['out', 'lse', 'dq', 'dk', 'dv']
  for (const [index, result] of cpu.entries()) {
    const want = numbers(result)
    const got = numbers(gpu[index]!)
    const most = want.reduce((top, x) => (Number.isFinite(x) ? Math.max(top, Math.abs(x)) : top), 1e-30)
    const capped = hardwareTanh && names[index] === 'lse' ? 2 ** -11 * c.softcap : 0
    const bound = Math.max((result.dtype === 'float32' ? bounds.float32 : bounds[dtype]) * most, capped)
    const wrong = want.findIndex((x, i) => x !== got[i] && !(Math.abs(got[i]! - x) <= bound))
    if (wrong >= 0) expect.fail(`${names[index]}[${wrong}]: ${got[wrong]} for ${want[wrong]}, bound ${bound}`)
  }
}

/** The first key of each query, where sequences of these lengths lie one behind the other. */
export const packed = (lengths: readonly number[]) => (_: number, i: number) => {
  let begin = 0
  for (const length of lengths) {
    if (i < begin + length) return begin
    begin += length
  }
  return begin
}
