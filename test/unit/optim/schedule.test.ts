// Learning rates against Megatron-Core's formulas, written out once more for chosen steps.
import { describe, expect, it } from 'vitest'
import { learningRate, type Schedule } from '../../../lib/optim/schedule.js'

const base: Schedule = {
  lr: 1,
  minLr: 0.1,
  lrDecayStyle: 'cosine',
  lrWarmupInit: 0.2,
  lrWarmupIters: 10,
  lrDecayIters: 110,
  lrWsdDecayIters: null,
  lrWsdDecayStyle: 'linear',
}
const at = (changes: Partial<Schedule>, done: number) => learningRate({ ...base, ...changes }, done)

describe('learning rate', () => {
  it('warms up linearly from lrWarmupInit, the first step being number 0', () => {
    expect(at({}, 0)).toBe(0.2)
    expect(at({}, 5)).toBeCloseTo(0.6, 15)
    expect(at({}, 10)).toBe(1)
    expect(at({ lrWarmupIters: 0 }, 0)).toBe(1)
  })

  it.each<[string, Partial<Schedule>, [number, number][]]>([
    [
      'constant',
      { lrDecayStyle: 'constant' },
      [
        [50, 1],
        [1000, 1],
      ],
    ],
    [
      'linear',
      { lrDecayStyle: 'linear' },
      [
        [60, 0.55],
        [110, 0.1],
        [111, 0.1],
      ],
    ],
    [
      'cosine',
      {},
      [
        [35, 0.1 + 0.9 * 0.5 * (1 + Math.SQRT1_2)],
        [60, 0.55],
        [110, 0.1],
        [500, 0.1],
      ],
    ],
    [
      'inverse-square-root',
      { lrDecayStyle: 'inverse-square-root' },
      [
        [40, 0.5],
        [90, 1 / 3],
        [1000, 0.1],
      ],
    ],
    [
      'WSD linear',
      { lrDecayStyle: 'WSD', lrWsdDecayIters: 20 },
      [
        [50, 1],
        [90, 1],
        [100, 0.55],
        [110, 0.1],
      ],
    ],
    [
      'WSD cosine',
      { lrDecayStyle: 'WSD', lrWsdDecayIters: 20, lrWsdDecayStyle: 'cosine' },
      [
        [95, 0.1 + 0.9 * 0.5 * (1 + Math.SQRT1_2)],
        [100, 0.55],
      ],
    ],
    [
      'WSD exponential',
      { lrDecayStyle: 'WSD', lrWsdDecayIters: 20, lrWsdDecayStyle: 'exponential' },
      [
        [100, 0.1 + 0.9 * (2 * 0.5 ** 0.5 - 1)],
        [110, 0.1],
      ],
    ],
    [
      'WSD minus_sqrt',
      { lrDecayStyle: 'WSD', lrWsdDecayIters: 20, lrWsdDecayStyle: 'minus_sqrt' },
      [
        [95, 0.55],
        [110, 0.1],
      ],
    ],
  ])('%s', (_, changes, expected) => {
    for (const [done, value] of expected) expect(at(changes, done)).toBeCloseTo(value, 14)
  })
})
