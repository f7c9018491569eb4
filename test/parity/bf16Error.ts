// How far bfloat16 logits are from float32 (same rounded weights), beside Transformers' own bfloat16 error, pooled over 8 sequences.
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect } from 'vitest'
import { readSafetensorsFile } from '../fixtures/safetensorsFile.js'

/** `input_ids`, `float32` and `bfloat16`: of the Llama fixture `plain` with rounded weights. */
export const bf16Expected = readSafetensorsFile(
  join(dirname(fileURLToPath(import.meta.url)), '../fixtures/llama_bf16.safetensors'),
)

/** KL divergence of each position's distribution from the exact one, averaged. */
function divergence(exact: Float32Array, got: Float32Array, V: number): number {
  const rows = exact.length / V
  const logProbabilities = (x: Float32Array, r: number) => {
    const row = Array.from(x.subarray(r * V, (r + 1) * V))
    const top = Math.max(...row)
    const total = Math.log(row.reduce((s, v) => s + Math.exp(v - top), 0)) + top
    return row.map((v) => v - total)
  }
  let sum = 0
  for (let r = 0; r < rows; r++) {
    const p = logProbabilities(exact, r)
    const q = logProbabilities(got, r)
    sum += p.reduce((s, v, i) => s + Math.exp(v) * (v - q[i]!), 0)
  }
  return sum / rows
}

/**
 * Fails where the error of these logits is more than that of two honest bfloat16 implementations differs: the spread was measured on
 * Transformers' attention variants.
 * @param ours - [T, V] of `input_ids`.
 */
export function expectBf16Error(ours: Float32Array, V: number): void {
  const [exact, theirs] = [bf16Expected.get('float32')!.data, bf16Expected.get('bfloat16')!.data]
  expect(ours.length).toBe(exact.length)
  const errors = (x: Float32Array) => x.map((v, i) => Math.abs(v - exact[i]!)).sort()
  const [a, b] = [errors(ours), errors(theirs)]
  const mean = (x: Float32Array) => x.reduce((s, v) => s + v, 0) / x.length
  const high = (x: Float32Array) => x[Math.floor(0.999 * x.length)]!
  const ratios = { mean: mean(a) / mean(b), high: high(a) / high(b) }
  const kl = divergence(exact, ours, V) / divergence(exact, theirs, V)
  process.stdout.write(
    `bfloat16 error over Transformers': mean ${ratios.mean.toFixed(3)}, 99.9% ${ratios.high.toFixed(3)}, KL ${kl.toFixed(3)}\n`,
  )
  expect(ratios.mean).toBeLessThanOrEqual(1.25)
  expect(ratios.high).toBeLessThanOrEqual(1.5)
  expect(kl).toBeLessThanOrEqual(1.6)
  // And an error there is: this is not float32 under another name.
  expect(ratios.mean).toBeGreaterThan(0.3)
}
