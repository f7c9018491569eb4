// Sequence parallelism over real processes: what it may not change, to the bit, and what it puts on the wire.
import { beforeAll, describe, expect, test } from 'vitest'
import { readFixture } from '../parity/llamaLayout.js'
import type { Case, Written } from './gptRank.js'
import { runCases, together } from './gptResults.js'

const settings = {
  float32: {},
  bfloat16: { dtype: 'bfloat16' },
  dropout: { hiddenDropout: 0.3 },
  'dropout, bfloat16': { hiddenDropout: 0.3, dtype: 'bfloat16' },
} as const satisfies Record<string, Partial<Case>>

const fixtures = ['plain', 'tied_bias']
const cases: Case[] = fixtures.flatMap((fixture) => [
  ...Object.entries(settings).flatMap(([name, setting]) => [
    { name: `${fixture} ${name}`, fixture, ...setting },
    { name: `${fixture} ${name} shared`, fixture, ...setting, sequenceParallel: true },
  ]),
  { name: `${fixture} recompute`, fixture, ...settings.dropout, sequenceParallel: true, recompute: true },
])

/** Of these each rank has a share of the gradient only where its tokens are. */
const isOfRows = (name: string) => /norm|linear_proj\.bias|linear_fc2\.bias/.test(name)

const norm = (x: Float32Array) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0))

let alone: Map<string, Written[]>
beforeAll(async () => {
  alone = await runCases(
    1,
    cases.filter(({ sequenceParallel }) => !sequenceParallel),
  )
}, 120_000)

describe.each([2, 4])('%i ranks', (size) => {
  let results: Map<string, Written[]>
  beforeAll(async () => {
    results = await runCases(size, cases)
  }, 120_000)

  describe.each(fixtures)('%s', (fixture) => {
    const read = readFixture(fixture)
    const get = (name: string) => together(results.get(`${fixture} ${name}`)!, read)

    test.each(Object.keys(settings))('%s: a sum whose rows are shared out is the sum, bit for bit', (name) => {
      const whole = get(name)
      const shared = get(`${name} shared`)
      expect(shared.loss).toBe(whole.loss)
      expect(shared.logits).toEqual(whole.logits)
      for (const [parameter, gradient] of whole.gradients) {
        const got = shared.gradients.get(parameter)!
        if (!isOfRows(parameter)) expect(got, parameter).toEqual(gradient)
        // Sums over tokens in another order, in float32: typical is 1e-7.
        else expect(norm(got.map((v, i) => v - gradient[i]!)) / norm(gradient), parameter).toBeLessThan(1e-6)
      }
    })

    test('dropout: logits, loss and gradients of one rank', () => {
      const one = together(alone.get(`${fixture} dropout`)!, read)
      const shared = get('dropout shared')
      const plain = together(alone.get(`${fixture} float32`)!, read)
      expect(Math.abs(plain.loss / one.loss - 1)).toBeGreaterThan(1e-3) // something was dropped
      const largest = one.logits.reduce((m, v) => Math.max(m, Math.abs(v)), 0)
      const difference = shared.logits.reduce((m, v, i) => Math.max(m, Math.abs(v - one.logits[i]!)), 0)
      expect(difference / largest).toBeLessThan(1e-5)
      expect(Math.abs(shared.loss / one.loss - 1)).toBeLessThan(1e-6)
      const global = Math.sqrt([...one.gradients.values()].reduce((sum, g) => sum + norm(g) ** 2, 0))
      for (const [parameter, gradient] of one.gradients) {
        const floor = (1e-3 * global) / Math.sqrt(one.gradients.size)
        const distance = norm(shared.gradients.get(parameter)!.map((v, i) => v - gradient[i]!))
        expect(distance / Math.max(norm(gradient), floor), parameter).toBeLessThan(1e-4)
      }
    })

    test('recompute gives the same bits', () => {
      expect(get('recompute')).toEqual(get('dropout shared'))
    })

    test('puts the textbook number of bytes on the wire', () => {
      const { numLayers: L, hiddenSize: H, addProjBias, addMlpBias } = read.config
      for (const [name, width] of [
        ['float32', 4],
        ['bfloat16', 2],
      ] as const) {
        const [{ tokens, traffic: whole }] = results.get(`${fixture} ${name}`) as [Written]
        const [{ traffic: shared }] = results.get(`${fixture} ${name} shared`) as [Written]
        const hidden = tokens * H * width
        // Runs of equal length; what tp does not divide is filled up.
        const filled = Math.ceil(tokens / size) * size * H * width
        const statistics = 3 * tokens * 4
        const normsAndBiases = (2 * L + 1 + (addProjBias ? L : 0) + (addMlpBias ? L : 0)) * H * 4
        // Embedding, two sums a layer; backward the input's gradient of two linears a layer and of the output layer.
        const sums = 2 * (2 * L + 1)
        expect(whole).toEqual({ allReduce: sums * hidden, allGather: statistics })
        // A gather counts this rank's part. Forward the input of those linears, backward the gradient of each sum, and the input again.
        const gathers = 3 * (2 * L + 1)
        expect(shared).toEqual({
          reduceScatter: sums * filled,
          allGather: (gathers * filled) / size + statistics,
          allReduce: normsAndBiases,
        })
      }
    })

    test('keeps its own rows only', () => {
      const { numLayers: L, hiddenSize: H } = read.config
      const [whole] = results.get(`${fixture} float32`) as [Written]
      const [shared] = results.get(`${fixture} float32 shared`) as [Written]
      const hidden = whole.tokens * H * 4
      // Input and output of each norm are kept; two whole ones may stand beside them while a linear computes.
      const less = (4 * L + 2) * hidden * (1 - 1 / size)
      expect(whole.activations - shared.activations).toBeGreaterThan(less - 2 * hidden)
    })
  })
})
