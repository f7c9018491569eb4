// Training on the GPU of gpu.ts, alone and on several ranks over NCCL (the emulated GPU: over its twin): losses and norms of the CPU,
// checkpoints that go on there, memory that does not grow.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { forwardStep, setup, trainStep } from '../../lib/train/index.js'
import { fixtureBatches, fixtureConfig, fixtureData, peerLosses, peerNorms } from '../train/fixtureRun.js'
import { type PipelineTask, pipelineWork } from '../train/pipelineRank.js'
import { expectSame } from '../train/sameSteps.js'
import { SavedRuns } from '../train/savedRuns.js'
import { run, startScript, steps } from '../train/startRanks.js'
import { type Work, work } from '../train/worker.js'
import { gpuSetupTimeout, mostRanks, realGpu, useGpu } from './gpu.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-gpu-training-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const runs = new SavedRuns(folder)
const full = realGpu || process.env['VIADUCT_TEST_FULL'] === '1'
/** Steps of a run: an emulated step takes a second. */
const alone = full ? 20 : 6
const together = full ? 8 : 4
let ranksHere = Number.POSITIVE_INFINITY

beforeAll(async () => {
  await useGpu()
  ranksHere = mostRanks()
}, gpuSetupTimeout)

const relative = (a: number, b: number) => Math.abs(a / b - 1)

describe('one rank', () => {
  it('has the losses and norms of PyTorch, and memory that does not grow', async () => {
    const state = await setup(await fixtureConfig({ microBatchSize: 4 }), {
      data: fixtureData,
      log: () => {},
      device: 'cuda',
    })
    const { device } = state.model
    expect(device.kind).toBe('cuda')
    let after = { slots: 0, live: 0, peak: 0, reserved: 0 }
    for (let step = 0; step < alone; step++) {
      const report = await trainStep(state, fixtureBatches(step, 4), forwardStep)
      // The bounds of the CPU (test/train/parity.test.ts).
      expect(relative(report.loss, peerLosses[step] as number)).toBeLessThan(step < 10 ? 1e-6 : 1e-5)
      expect(relative(report.gradNorm, peerNorms[step] as number)).toBeLessThan(step < 5 ? 1e-5 : 1e-4)
      const { liveBytes, reservedBytes } = device.memory()
      const now = { slots: device.liveSlots(), live: liveBytes, peak: report.peakMemory, reserved: reservedBytes }
      if (step < 2) after = now
      else expect(now, `after step ${step + 1}`).toEqual(after)
    }
    await state.dispose()
  }, 120_000)

  it("is held to the GPU's memory, not to the host's", async () => {
    const config = await fixtureConfig({ microBatchSize: 4 })
    config.model.weightsLoader = null
    Object.assign(config.model, { vocabSize: 2 ** 30, hiddenSize: 256 })
    await expect(setup(config, { data: fixtureData, log: () => {}, device: 'cuda' })).rejects.toMatchObject({
      code: 'ERR_OUT_OF_MEMORY',
      message: expect.stringContaining('[allocator]'),
    })
  })

  it.runIf(realGpu)(
    '1000 steps leave memory as it was',
    async () => {
      const config = await fixtureConfig({ microBatchSize: 4 })
      const state = await setup(config, { data: fixtureData, log: () => {}, device: 'cuda' })
      const seen = new Set<string>()
      for (let step = 0; step < 1000; step++) {
        await trainStep(state, fixtureBatches(step % 20, 4), forwardStep)
        const { liveBytes, reservedBytes } = state.model.device.memory()
        if (step >= 2) seen.add(`${liveBytes} ${reservedBytes} ${state.model.device.liveSlots()}`)
      }
      expect([...seen]).toHaveLength(1)
      await state.dispose()
    },
    600_000,
  )
})

const base = { trainIters: together, microBatchSize: 2, hiddenDropout: 0.1, lr: 3e-4 } as const
const sp: Partial<Work> = { tp: 2, sequenceParallel: true }
const pp = { pipelineModelParallelSize: 2 }
const offload = { optimizerCpuOffload: true, optimizerOffloadFraction: 0.5 }
/** Ranks, what a run differs in, and whether it is part of every run of the tests. */
const layouts: readonly (readonly [name: string, ranks: number, work: Partial<Work>, always: boolean])[] = [
  ['alone', 1, {}, true],
  ['alone, recomputed', 1, { recompute: true }, false],
  [
    'alone, optimizer and activations on the host',
    1,
    { optimizer: offload, model: { cpuOffloading: true, cpuOffloadingNumLayers: 1 } },
    true,
  ],
  ['tp 2 with sp', 2, sp, true],
  ['tp 2', 2, { tp: 2 }, false],
  ['pp 2', 2, { model: pp }, true],
  ['pp 2, zb-h1', 2, { model: { ...pp, pipelineSchedule: 'zb-h1' } }, false],
  ['dp 2, sharded', 2, { ddp: { bucketSize: 20_000 } }, true],
  ['dp 2', 2, { ddp: { useDistributedOptimizer: false, overlapParamGather: false } }, false],
  ['fsdp 2', 2, { ddp: { useMegatronFsdp: true } }, true],
  [
    'fsdp 2, tp 2 with sp, weights stay',
    4,
    { ...sp, ddp: { useMegatronFsdp: true, reshardAfterForward: false } },
    false,
  ],
  ['tp 2 with sp, pp 2', 4, { ...sp, model: pp }, false],
  ['tp 2 with sp, dp 2, optimizer on the host', 4, { ...sp, optimizer: offload }, false],
]

describe('steps with dropout have the losses and norms of the CPU', () => {
  beforeAll(() => work(runs.named('cpu', base), () => {}))

  it.for(layouts.filter(([, , , always]) => always || full))(
    '%s',
    { timeout: 240_000 },
    async ([name, ranks, changes], { skip }) => {
      skip(ranks > ranksHere, `${ranks} ranks where ${ranksHere} can run`)
      const task = runs.named(name, { ...base, ...changes, device: 'cuda' })
      if (ranks === 1) await work(task, () => {})
      else await run(task, ranks)
      expectSame(steps(runs.place(`${name}.jsonl`)), steps(runs.place('cpu.jsonl')))
    },
  )

  it('a checkpoint of the GPU goes on on the CPU', async () => {
    await work(runs.named('half', { ...base, trainIters: together / 2, device: 'cuda' }), () => {})
    await work(runs.named('rest', { ...base, load: runs.place('half') }), () => {})
    expectSame(steps(runs.place('rest.jsonl')), steps(runs.place('cpu.jsonl')).slice(together / 2))
  }, 120_000)
})

describe('steps of experts have the losses and norms of the CPU', () => {
  const experts = { numMoeExperts: 4, moeRouterTopk: 2, moeFfnHiddenSize: 24, hiddenDropout: 0, numLayers: 2 }
  const task = (name: string, changes: Partial<PipelineTask>): PipelineTask => ({
    trainIters: together,
    microBatchSize: 2,
    metrics: runs.place(`${name}.jsonl`),
    ...changes,
    model: { ...experts, ...changes.model },
  })

  const tp = { tensorModelParallelSize: 2, sequenceParallel: true }
  const sigmoid = {
    moeRouterScoreFunction: 'sigmoid',
    moeRouterEnableExpertBias: true,
    moeRouterBiasUpdateRate: 0.01,
    moeRouterNumGroups: 2,
    moeRouterGroupTopk: 1,
    moeRouterDtype: 'fp32',
    moeZLossCoeff: 0.02,
    moeInputJitterEps: 0.05,
    moeRouterLoadBalancingType: 'seq_aux_loss',
    moeAuxLossCoeff: 0.05,
  } as const
  const beside = {
    moeLatentSize: 32,
    moeSharedExpertIntermediateSize: 48,
    moeSharedExpertGate: true,
    moeRouterLoadBalancingType: ['aux_loss', 'seq_aux_loss'],
    moeAuxLossCoeff: [0.02, 0.05],
  } as const
  /** Ranks, the model, its layout, and whether it is part of every run of the tests. */
  const mixtures: readonly (readonly [
    name: string,
    ranks: number,
    model: NonNullable<PipelineTask['model']>,
    layout: NonNullable<PipelineTask['model']>,
    always: boolean,
  ])[] = [
    ['alone, sigmoid router with all that it has', 1, sigmoid, {}, true],
    ['alone, capacity with drop', 1, { moeExpertCapacityFactor: 1 }, {}, false],
    ['ep 2', 2, {}, { expertModelParallelSize: 2 }, true],
    ['ep 2, latent experts beside shared ones', 2, beside, { expertModelParallelSize: 2 }, true],
    [
      'tp 2 with sp, etp 2, latent experts beside shared ones',
      2,
      beside,
      { ...tp, expertTensorParallelSize: 2 },
      false,
    ],
    ['alone, filled up to a capacity', 1, { moeExpertCapacityFactor: 1, moePadExpertInputToCapacity: true }, {}, false],
    ['ep 2, rows gathered', 2, { moeTokenDispatcherType: 'allgather' }, { expertModelParallelSize: 2 }, false],
    ['tp 2 with sp, etp 2', 2, sigmoid, { ...tp, expertTensorParallelSize: 2 }, false],
    ['cp 2 in a ring, sinks', 2, { softmaxType: 'learnable' }, { contextParallelSize: 2 }, true],
    [
      'cp 2, heads exchanged, sinks',
      2,
      { softmaxType: 'learnable' },
      { contextParallelSize: 2, cpCommType: 'a2a' },
      false,
    ],
    ['cp 2, keys gathered', 2, {}, { contextParallelSize: 2, cpCommType: 'all_gather' }, false],
    ['ep 2, tp 2 with sp', 4, sigmoid, { ...tp, expertModelParallelSize: 2 }, false],
    ['pp 2, ep 2', 4, {}, { pipelineModelParallelSize: 2, expertModelParallelSize: 2 }, false],
    ['cp 2, ep 2, tp 2 with sp', 4, {}, { ...tp, contextParallelSize: 2, expertModelParallelSize: 2 }, false],
  ]

  it.for(mixtures.filter(([, , , , always]) => always || full))(
    '%s',
    { timeout: 240_000 },
    async ([name, ranks, model, layout], { skip }) => {
      skip(ranks > ranksHere, `${ranks} ranks where ${ranksHere} can run`)
      await pipelineWork(task(`cpu, ${name}`, { model }))
      const started = startScript(
        'pipelineRank.ts',
        [JSON.stringify(task(name, { model: { ...model, ...layout }, device: 'cuda' }))],
        ranks,
      )
      if ((await started.end) !== 0) throw new Error(started.lines.join('\n'))
      expectSame(steps(runs.place(`${name}.jsonl`)), steps(runs.place(`cpu, ${name}.jsonl`)))
    },
  )
})
