// Training of one rank against PyTorch and Transformers: losses and gradient norms of 20 steps from the same weights and batches.
// Masked labels, refused ids, gradients that are not finite, and memory that does not grow.
import { afterEach, describe, expect, it } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { runConfig } from '../../lib/config/runConfig.js'
import { GPTModelProvider } from '../../lib/models/provider.js'
import { type ForwardStep, forwardStep, setup, type TrainState, trainStep } from '../../lib/train/index.js'
import { fixtureBatches, fixtureConfig, fixtureData, peerLosses, peerNorms } from './fixtureRun.js'

let state: TrainState | null = null
afterEach(async () => {
  await state?.dispose()
  state = null
})

const lines: string[] = []
const quiet = { data: fixtureData, log: (line: string) => void lines.push(line) }
const relative = (a: number, b: number) => Math.abs(a / b - 1)

async function fixtureState(
  changes: Parameters<typeof fixtureConfig>[0] & { nonFiniteGrads?: 'skip' } = {},
): Promise<TrainState> {
  const config = await fixtureConfig(changes)
  if (changes.nonFiniteGrads) config.train.nonFiniteGrads = changes.nonFiniteGrads
  state = await setup(config, quiet)
  return state
}

describe('20 steps of a tiny Llama', () => {
  // Two correct float32 implementations agree to 1e-7 in the first ten losses and drift apart after: 1e-6, then 1e-5. Gradient
  // norms: 1e-5 for five steps, then 1e-4.
  it.each([8, 2])('are those of PyTorch, micro-batches of %i', async (microBatchSize) => {
    const run = await fixtureState({ microBatchSize })
    let slots = 0
    for (let step = 0; step < 20; step++) {
      const report = await trainStep(run, fixtureBatches(step, microBatchSize), forwardStep)
      expect(relative(report.loss, peerLosses[step] as number), `loss of step ${step + 1}`).toBeLessThan(
        step < 10 ? 1e-6 : 1e-5,
      )
      expect(relative(report.gradNorm, peerNorms[step] as number), `norm of step ${step + 1}`).toBeLessThan(
        step < 5 ? 1e-5 : 1e-4,
      )
      expect(report).toMatchObject({ step: step + 1, lr: 3e-4, tokens: 256, updated: true })
      if (step === 1) slots = native.liveSlots()
      else if (step > 1) expect(native.liveSlots()).toBe(slots)
    }
  })
})

describe('labels and ids', () => {
  const masked = (microBatches: ReturnType<typeof fixtureBatches>, which: (m: number) => boolean) =>
    microBatches.map((batch, m) =>
      which(m) ? { ...batch, labels: new Int32Array(batch.tokens.length).fill(-100) } : batch,
    )

  it('a micro-batch without labels counts 0 tokens, and the others count right', async () => {
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

  it('a global batch without labels is an error that says so, and the run can go on', async () => {
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
  ] as const)('%s of %i are refused with their place', async (field, value, code) => {
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

describe('gradients that are not finite', () => {
  /** Puts a NaN into one gradient at one step, between the backward pass and the sums. */
  const poison =
    (at: number, name: string): ForwardStep =>
    async (ctx, model, batch) => {
      const result = await forwardStep(ctx, model, batch)
      const parameter = [...model.namedParameters()].find(([key]) => key === name)?.[1]
      if (ctx.rng.step === at && parameter?.mainGrad)
        native.fill(ctx.stream.id, parameter.mainGrad.slice(ctx, 0, 0, 1).handle, Number.NaN)
      return result
    }
  const victim = 'decoder.layers.1.mlp.linear_fc1.weight'

  it('stop the run, naming step, parameter and rank; the weights stay', async () => {
    const run = await fixtureState()
    const forward = poison(2, victim)
    await trainStep(run, fixtureBatches(0), forward)
    const parameters = async () => {
      const values: Float32Array[] = []
      for (const [, parameter] of run.model.namedParameters()) values.push(await parameter.data.toFloat32Array())
      return values
    }
    const before = await parameters()
    await expect(trainStep(run, fixtureBatches(1), forward)).rejects.toMatchObject({
      code: 'ERR_NOT_FINITE',
      message: expect.stringMatching(
        /step 2: the gradient of decoder\.layers\.1\.mlp\.linear_fc1\.weight on rank 0 is not finite/,
      ),
    })
    expect(await parameters()).toEqual(before)
  })

  it('are skipped by policy; later steps go on from unchanged weights', async () => {
    const run = await fixtureState({ nonFiniteGrads: 'skip' })
    const report = await trainStep(run, fixtureBatches(0), poison(1, victim))
    expect(report.updated).toBe(false)
    expect(run.skippedSteps).toBe(1)
    expect(run.optimizer.updates).toBe(0)
    expect(relative((await trainStep(run, fixtureBatches(0), forwardStep)).loss, peerLosses[0] as number)).toBeLessThan(
      1e-6,
    )
  })
})

describe('what cannot run', () => {
  it('is refused with its price and a way out', async () => {
    const model = new GPTModelProvider({
      numLayers: 200,
      hiddenSize: 16384,
      numAttentionHeads: 128,
      vocabSize: 128256,
      maxPositionEmbeddings: 8192,
    })
    const config = runConfig({ model, scheduler: { lrWarmupIters: 0 } })
    await expect(setup(config, quiet)).rejects.toMatchObject({
      code: 'ERR_OUT_OF_MEMORY',
      message: expect.stringMatching(
        /this run needs .* on this machine .* a smaller recipe: llama_tiny_cpu_pretrain_config/s,
      ),
    })
  })
})
