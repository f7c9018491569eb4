// Training of one rank against PyTorch and Transformers: losses and gradient norms of 20 steps from the same weights and batches.
// Gradients that are not finite, and memory that does not grow. Masked labels and refused ids: test/hostile/batches.test.ts.
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
