// Rates of a step: the share of the measured matmul rate never passes what the machine was seen to do.
import { expect, it } from 'vitest'
import { throughputOf } from '../../lib/train/log.js'
import { pretrain } from '../../lib/train/pretrain.js'
import type { TrainState } from '../../lib/train/state.js'
import { fixtureConfig, fixtureData } from './fixtureRun.js'

it('a matmul rate that was measured on a stalled machine is measured again, and gives no share before', async () => {
  const peaks: number[] = []
  const shares: (number | null)[] = []
  const stalled = 1 // FLOP/s: any step is faster
  await pretrain(await fixtureConfig({ trainIters: 2 }), undefined, {
    data: fixtureData,
    log: () => {},
    callbacks: {
      onTrainStart(state: TrainState) {
        expect(state.peakFlops).toBe(state.price.peakFlops)
        state.peakFlops = stalled
        expect(throughputOf(state, 1).mfu).toBeNull()
      },
      onStepEnd(state, { ms }) {
        peaks.push(state.peakFlops)
        shares.push(throughputOf(state, ms).mfu)
      },
    },
  })
  for (const peak of peaks) expect(peak).toBeGreaterThan(1e6)
  // A step of this model is overhead more than products: far below the rate, however busy the machine.
  for (const share of shares) expect(share).toBeLessThan(1)
  expect(shares).not.toContain(null)
})
