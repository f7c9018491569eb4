// Token ids, labels, positions and masks that no model has (F32), and labels that are all masked (F33): refused with their place
// before anything reaches a kernel, in `viaduct logits` and in a training step; what is left counts right.
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, describe, expect, it } from 'vitest'
import { computeLogits } from '../../lib/inference/logits.js'
import { defaultParallel } from '../../lib/parallel/config.js'
import { forwardStep, setup, type TrainState, trainStep } from '../../lib/train/index.js'
import { copyFixture, writeInputs } from '../cli/commandLine.js'
import { fixtureBatches, fixtureConfig, fixtureData, peerLosses } from '../train/fixtureRun.js'
import { errorOf, temporaryFolder } from './temporary.js'

const home = temporaryFolder()
const model = join(home, 'model')
copyFixture('plain', model)
let count = 0

/** `viaduct logits` of named int64 rows, as the command calls it. */
async function logits(inputs: Record<string, number[][]>) {
  const [input, output] = ['in', 'out'].map((name) => join(home, `${name}${count++}.safetensors`)) as [string, string]
  const tensors = Object.entries(inputs).map(([name, rows]) => {
    const shape = [rows.length, rows[0]?.length ?? 0]
    return [name, { shape, data: rows.flat() as unknown as Float32Array }] as const
  })
  writeInputs(input, new Map(tensors))
  try {
    return await computeLogits(model, input, output, { parallel: defaultParallel, grads: true })
  } catch (error) {
    expect(existsSync(output)).toBe(false)
    throw error
  }
}
const ids = [[3, 1, 4, 1]]

describe('F32, F33: viaduct logits', () => {
  // 2^32 + 1 is 1 in 32 bits.
  it.each([
    ['input_ids', 97, 'ERR_TOKEN_ID'],
    ['input_ids', -1, 'ERR_TOKEN_ID'],
    ['input_ids', 2 ** 32 + 1, 'ERR_TOKEN_ID'],
    ['labels', 999, 'ERR_LABEL'],
    ['labels', -1, 'ERR_LABEL'],
    ['labels', 2 ** 32 + 1, 'ERR_LABEL'],
    ['position_ids', -1, 'ERR_DATA'],
    ['position_ids', 2 ** 40, 'ERR_DATA'],
    ['attention_mask', 2, 'ERR_DATA'],
    ['attention_mask', 257, 'ERR_DATA'],
    ['attention_mask', -1, 'ERR_DATA'],
  ] as const)('F32: %s of %i', async (name, value, code) => {
    const error = await errorOf(() => logits({ input_ids: ids, [name]: [[1, 1, value, 1]] }))
    expect(error.code).toBe(code)
    expect(error.message).toContain(`got ${value}`)
    expect(error.message).toMatch(/row 0.*position [12]/)
  })
  it('F33: all labels masked, in one row and in the whole batch', async () => {
    const masked = [-100, -100, -100, -100]
    expect(await errorOf(() => logits({ input_ids: ids, labels: [masked] }))).toMatchObject({ code: 'ERR_DATA' })
    // The first label has no predecessor, so it does not count.
    expect(await errorOf(() => logits({ input_ids: ids, labels: [[5, -100, -100, -100]] }))).toMatchObject({
      code: 'ERR_DATA',
    })
    const alone = await logits({ input_ids: ids, labels: ids })
    const both = await logits({ input_ids: [...ids, ...ids], labels: [masked, ...ids] })
    expect(both.loss).toBe(alone.loss)
    expect(alone.loss).toBeGreaterThan(1)
  })
})

let state: TrainState | null = null
afterEach(async () => {
  await state?.dispose()
  state = null
})

async function fixtureState(): Promise<TrainState> {
  state = await setup(await fixtureConfig(), { data: fixtureData, log: () => {} })
  return state
}
const relative = (a: number, b: number) => Math.abs(a / b - 1)

describe('F32, F33: a training step', () => {
  const masked = (microBatches: ReturnType<typeof fixtureBatches>, which: (m: number) => boolean) =>
    microBatches.map((batch, m) =>
      which(m) ? { ...batch, labels: new Int32Array(batch.tokens.length).fill(-100) } : batch,
    )

  it('F33: a micro-batch without labels counts 0 tokens, and the others count right', async () => {
    const run = await fixtureState()
    const half = await trainStep(
      run,
      masked(fixtureBatches(0, 4), (m) => m === 1),
      forwardStep,
    )
    await run.dispose()
    const again = await fixtureState()
    const alone = await trainStep(again, fixtureBatches(0, 4).slice(0, 1), forwardStep)
    expect(half.tokens).toBe(128)
    expect(half.loss).toBe(alone.loss)
    expect(half.gradNorm).toBe(alone.gradNorm)
  })

  it('tokens count one by one: unequal micro-batches give the mean over all', async () => {
    const cut = (batches: ReturnType<typeof fixtureBatches>) =>
      batches.map((batch, m) => {
        const labels = Int32Array.from(batch.labels as Int32Array, (label, t) => (t % 5 < m ? -100 : label))
        return { ...batch, labels }
      })
    const parts = cut(fixtureBatches(0, 2))
    const whole = {
      batchSize: 8,
      seqLength: 32,
      tokens: Int32Array.from(parts.flatMap(({ tokens }) => [...tokens])),
      labels: Int32Array.from(parts.flatMap(({ labels }) => [...labels])),
    }
    const run = await fixtureState()
    const cutReport = await trainStep(run, parts, forwardStep)
    await run.dispose()
    const again = await fixtureState()
    const wholeReport = await trainStep(again, [whole], forwardStep)
    expect(cutReport.tokens).toBe(wholeReport.tokens)
    // The order of float32 sums differs.
    expect(relative(cutReport.loss, wholeReport.loss)).toBeLessThan(1e-6)
    expect(relative(cutReport.gradNorm, wholeReport.gradNorm)).toBeLessThan(1e-5)
  })

  it('F33: a global batch without labels is an error that says so, and the run can go on', async () => {
    const run = await fixtureState()
    const nothing = masked(fixtureBatches(0, 4), () => true)
    await expect(trainStep(run, nothing, forwardStep)).rejects.toMatchObject({
      code: 'ERR_LABEL',
      message: expect.stringContaining('global batch of step 1'),
    })
    expect(run.step).toBe(0)
    expect(relative((await trainStep(run, fixtureBatches(0), forwardStep)).loss, peerLosses[0] as number)).toBeLessThan(
      1e-6,
    )
  })

  it.each([
    ['tokens', 131, 'ERR_TOKEN_ID'],
    ['tokens', -1, 'ERR_TOKEN_ID'],
    ['labels', 131, 'ERR_LABEL'],
    ['labels', -1, 'ERR_LABEL'],
  ] as const)('F32: %s of %i are refused with their place', async (field, value, code) => {
    const run = await fixtureState()
    const [batch] = fixtureBatches(0)
    const bad = { ...(batch as NonNullable<typeof batch>) }
    const changed = Int32Array.from(bad[field] as Int32Array)
    changed[2 * 32 + 7] = value
    await expect(trainStep(run, [{ ...bad, [field]: changed }], forwardStep)).rejects.toMatchObject({
      code,
      message: expect.stringContaining('row 2, position 7'),
    })
  })
})
