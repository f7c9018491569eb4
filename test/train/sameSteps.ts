// When the steps of a layout count as those of one rank.
import { expect } from 'vitest'
import type { Step } from './startRanks.js'

/** Sums over ranks have another order: 1e-6 for ten steps, 1e-5 after; norms and losses of routers 1e-5 for five steps, then 1e-4. */
export function expectSame(got: readonly Step[], expected: readonly Step[]): void {
  expect(got.map(({ step }) => step)).toEqual(expected.map(({ step }) => step))
  got.forEach(({ step, loss, gradNorm, lr, metrics }, i) => {
    const peer = expected[i] as Step
    expect(Math.abs(loss / peer.loss - 1), `loss of step ${step}`).toBeLessThan(step <= 10 ? 1e-6 : 1e-5)
    expect(Math.abs(gradNorm / peer.gradNorm - 1), `norm of step ${step}`).toBeLessThan(step <= 5 ? 1e-5 : 1e-4)
    expect(lr).toBe(peer.lr)
    expect(Object.keys(metrics)).toEqual(Object.keys(peer.metrics))
    for (const [name, value] of Object.entries(metrics))
      expect(Math.abs(value / (peer.metrics[name] as number) - 1), `${name} of step ${step}`).toBeLessThan(
        step <= 5 ? 1e-5 : 1e-4,
      )
  })
}
