// The gate on result files turns red for a change in any part of them.
import { expect, test } from 'vitest'
import type { HostTensor } from '../fixtures/safetensorsFile.js'
import { agreement } from './resultFile.js'

const tensor = (...values: number[]): HostTensor => ({ shape: [values.length], data: Float32Array.from(values) })
const good = new Map([
  ['logits', tensor(1, -4, 2)],
  ['loss', tensor(2.5)],
  ['grad.a', tensor(0.1, 0.2)],
  ['grad.b', tensor(0.3)],
])

test('equal results agree', () => {
  expect(agreement(good, good)).toEqual({ logits: 0, loss: 0, gradients: 0, red: [] })
})

test.each([
  ['logits', tensor(1, -4, 2.0001)],
  ['logits', tensor(1, -4)],
  ['logits', tensor(1, -4, Number.NaN)],
  ['loss', tensor(2.50001)],
  ['grad.a', tensor(0.1, 0.20003)],
  ['grad.b', tensor(-0.3)],
  ['grad.b', null],
  ['grad.c', tensor(0)],
] as const)('a changed %s does not', (name, changed) => {
  const bad = new Map(good)
  if (changed === null) bad.delete(name)
  else bad.set(name, changed)
  expect(agreement(bad, good).red.join()).toContain(name)
  expect(agreement(bad, good).red.length).toBeGreaterThan(0)
})
