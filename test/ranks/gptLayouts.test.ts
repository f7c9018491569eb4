// Tensor parallelism over real processes, with and without sequence parallelism: the same fixtures, the same numbers as on one rank,
// at 2, 3 and 4 ranks, with fewer key-value heads than ranks and an odd vocabulary.
import { describe, expect, test } from 'vitest'
import { gate } from '../parity/gate.js'
import { readFixture } from '../parity/llamaLayout.js'
import { runCases, together } from './gptResults.js'

describe.each([
  [2, ['plain', 'tied_bias', 'full_heads', 'padded_left', 'yarn']],
  [3, ['wide_heads']],
  [4, ['plain', 'tied_bias']],
] as const)('tensor parallelism over %i ranks', (size, names) => {
  test(`${names.join(', ')} within the numbers of one rank`, async () => {
    const cases = names.flatMap((fixture) =>
      [false, true].map((sequenceParallel) => ({ name: `${fixture}-${sequenceParallel}`, fixture, sequenceParallel })),
    )
    const results = await runCases(size, cases)
    for (const { name, fixture } of cases) {
      const read = readFixture(fixture)
      expect(gate(read, together(results.get(name)!, read)).red, name).toEqual([])
    }
  }, 120_000)
})
