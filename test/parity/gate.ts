// The numbers that logits, loss and gradients must keep against Transformers in float32.
import { type Fixture, pack, runsOf } from './llamaLayout.js'

export interface Result {
  /** [T, V], row-major, without padding. */
  readonly logits: Float32Array
  /** Mean over the labels that count. */
  readonly loss: number
  /** Of the mean loss, by Megatron name, whole logical tensors. */
  readonly gradients: ReadonlyMap<string, Float32Array>
}

const norm = (x: Float32Array) => Math.sqrt(x.reduce((s, v) => s + v * v, 0))

/** What of a result is outside the numbers that two correct float32 implementations reach (typical is 1e-6). */
export function gate(fixture: Fixture, got: Result): { red: string[]; logits: number; gradients: number } {
  const { expected, config } = fixture
  const red: string[] = []
  const wanted = expected.get('logits')!.data
  const largest = wanted.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
  let logits = 0
  for (let i = 0; i < wanted.length; i++) logits = Math.max(logits, Math.abs(got.logits[i]! - wanted[i]!) / largest)
  if (!(logits <= 1e-5) || got.logits.length !== wanted.length) red.push(`logits ${logits}`)
  const loss = expected.get('loss')!.data[0]!
  if (!(Math.abs(got.loss / loss - 1) <= 1e-6)) red.push(`loss ${got.loss} for ${loss}`)
  const grads = new Map([...expected].filter(([n]) => n.startsWith('grad.')).map(([n, t]) => [n.slice(5), t]))
  const global = Math.sqrt([...grads.values()].reduce((s, t) => s + norm(t.data) ** 2, 0))
  let gradients = 0
  for (const [name, ours] of got.gradients) {
    const want = pack(runsOf(name, config), grads)
    const difference =
      norm(want.map((v, i) => v - ours[i]!)) / Math.max(norm(want), (1e-3 * global) / Math.sqrt(got.gradients.size))
    gradients = Math.max(gradients, difference)
    if (!(difference <= 1e-4)) red.push(`gradient of ${name} ${difference}`)
  }
  return { red, logits, gradients }
}
