// The gate on a result file of `viaduct logits` (logits, loss, grad.*) against the same of another implementation, float32.
import type { HostTensor } from '../fixtures/safetensorsFile.js'

const norm = (x: Float32Array) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0))
const largest = (x: Float32Array) => x.reduce((most, v) => Math.max(most, Math.abs(v)), 0)
const minus = (a: Float32Array, b: Float32Array) => a.map((v, i) => v - (b[i] as number))

/** Largest relative differences, and what is outside the gate: nothing where the results agree. */
export interface Agreement {
  readonly logits: number
  readonly loss: number
  readonly gradients: number
  readonly red: readonly string[]
}

type Tensors = ReadonlyMap<string, HostTensor>

/** Bounds of two correct float32 implementations: logits 1e-5 of the largest, loss 1e-6, each gradient 1e-4 of its norm. */
export function agreement(got: Tensors, expected: Tensors): Agreement {
  const red: string[] = []
  const pair = (name: string): [Float32Array, Float32Array] => {
    const [a, b] = [got.get(name), expected.get(name)]
    if (a !== undefined && b !== undefined && a.shape.join() === b.shape.join()) return [a.data, b.data]
    red.push(`${name} [${a?.shape}] for [${b?.shape}]`)
    return [new Float32Array(1), new Float32Array(1)]
  }
  const [a, b] = pair('logits')
  const logits = largest(minus(a, b)) / largest(b)
  if (!(logits <= 1e-5)) red.push(`logits ${logits}`)
  const [[ours], [theirs]] = pair('loss') as unknown as [[number], [number]]
  const loss = Math.abs(ours / theirs - 1)
  if (!(loss <= 1e-6)) red.push(`loss ${ours} for ${theirs}`)
  const isGradient = (name: string) => name.startsWith('grad.')
  const names = [...new Set([...got.keys(), ...expected.keys()])].filter(isGradient)
  const pairs = names.map((name) => [name, ...pair(name)] as const)
  const global = Math.sqrt(pairs.reduce((sum, [, , want]) => sum + norm(want) ** 2, 0))
  let gradients = 0
  for (const [name, have, want] of pairs) {
    // A gradient that is nothing beside the others is measured by a small share of theirs.
    const difference = norm(minus(have, want)) / Math.max(norm(want), (1e-3 * global) / Math.sqrt(names.length))
    gradients = Math.max(gradients, difference)
    if (!(difference <= 1e-4)) red.push(`${name} ${difference}`)
  }
  return { logits, loss, gradients, red }
}
