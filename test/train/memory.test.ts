// Memory of real ranks by the device's counters, beside what lib/plan predicts: what lies there between steps, and the most in a step,
// on every rank. Ranks of one size do their layouts one after the other.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { resolve } from '../../lib/config/resolve.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import type { RecomputeModule } from '../../lib/models/recomputeSettings.js'
import type { CpCommType } from '../../lib/parallel/config.js'
import { hiddenBytes } from '../../lib/plan/activations.js'
import { stageMemory } from '../../lib/plan/memory.js'
import { type MeasuredMemory, type MemoryTask, memoryConfig } from './memoryRank.js'
import { startScript } from './startRanks.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-memory-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

type Model = Partial<ProviderInit>
const tp = (size: number): Model => ({ tensorModelParallelSize: size })
const sp = (size: number): Model => ({ ...tp(size), sequenceParallel: true })
const pp = (size: number, schedule: Model['pipelineSchedule'] = null): Model => ({
  pipelineModelParallelSize: size,
  pipelineSchedule: schedule,
})
const vpp = (size: number, chunks: number): Model => ({ ...pp(size), virtualPipelineModelParallelSize: chunks })
const dropout: Model = { hiddenDropout: 0.1 }
const tied: Model = { shareEmbeddingsAndOutputWeights: true }
const gpt: Model = {
  normalization: 'LayerNorm',
  gatedLinearUnit: false,
  activation: 'gelu',
  addQkvBias: true,
  addProjBias: true,
  addMlpBias: true,
}
const full = (recomputeMethod: Model['recomputeMethod'] = null, recomputeNumLayers: number | null = null): Model => ({
  recomputeGranularity: 'full',
  recomputeMethod,
  recomputeNumLayers,
})
const selective = (...recomputeModules: RecomputeModule[]): Model => ({
  recomputeGranularity: 'selective',
  recomputeModules,
})
const cp = (contextParallelSize: number, cpCommType: CpCommType): Model => ({ contextParallelSize, cpCommType })
const bf16 = { mixedPrecision: 'bf16_mixed' } as const
const away = (cpuOffloadingNumLayers: number): Model => ({ cpuOffloading: true, cpuOffloadingNumLayers })
const hosted = { optimizer: { optimizerCpuOffload: true } }
const half = { optimizer: { optimizerCpuOffload: true, optimizerOffloadFraction: 0.5 } }
const fsdp = { ddp: { useMegatronFsdp: true } }
const kept = { ddp: { useMegatronFsdp: true, reshardAfterForward: false } }
const inTurn = { ddp: { useMegatronFsdp: true, overlapGradReduce: false, overlapParamGather: false } }
const whole = { ddp: { useDistributedOptimizer: false, overlapParamGather: false } }

const experts: Model = { numMoeExperts: 8, moeRouterTopk: 2, moeFfnHiddenSize: 96 }
const shared: Model = { ...experts, moeSharedExpertIntermediateSize: 224 }
const weighed: Model = { ...shared, moeSharedExpertGate: true }
const padded: Model = { ...experts, moeExpertCapacityFactor: 1.5, moePadExpertInputToCapacity: true }
const latent: Model = { ...experts, moeLatentSize: 48 }

type Row = readonly [name: string, ranks: number, model: Model, more?: Omit<MemoryTask, 'model'>]

/** Some of each kind, for every run of the tests. */
const few: readonly Row[] = [
  ['one rank', 1, {}],
  ['tp 2 with sp, dropout', 2, { ...sp(2), ...dropout }],
  ['pp 2, 1f1b', 2, pp(2)],
  ['dp 2, sharded, bf16', 2, {}, bf16],
  ['tp 2 with sp, full recompute', 2, { ...sp(2), ...full() }],
  ['one rank, bf16, optimizer on the host', 1, {}, { ...bf16, ...hosted }],
  ['one rank, experts', 1, experts],
  ['tp 2 with sp, experts', 2, { ...sp(2), ...experts }],
  ['cp 2', 2, { contextParallelSize: 2 }],
  ['cp 2, gathered', 2, cp(2, 'all_gather')],
  ['cp 2 by heads', 2, cp(2, 'a2a')],
  ['one rank, shared experts with a gate', 1, weighed],
  ['one rank, latent experts', 1, latent],
  ['tp 2 with sp, shared experts', 2, { ...sp(2), ...shared }],
  ['dp 2, ep 2', 2, { ...experts, expertModelParallelSize: 2 }],
  ['tp 2 with sp, etp 2', 2, { ...sp(2), ...experts, expertTensorParallelSize: 2 }],
  ['tp 2 with sp, activations of 2 layers on the host', 2, { ...sp(2), ...away(2) }],
  ['fsdp 2', 2, {}, fsdp],
  ['fsdp 2, weights stay, bf16', 2, {}, { ...bf16, ...kept }],
  ['fsdp 2, ep 2', 2, { ...experts, expertModelParallelSize: 2 }, fsdp],
]

const all: readonly Row[] = [
  ...few,
  ['one rank, experts, bf16, dropout', 1, { ...experts, ...dropout }, bf16],
  ['one rank, experts, full recompute', 1, { ...experts, ...full() }],
  ['one rank, experts again', 1, { ...experts, ...selective('moe') }],
  ['one rank, shared experts, bf16, dropout', 1, { ...shared, ...dropout }, bf16],
  ['one rank, shared experts, full recompute', 1, { ...weighed, ...full() }],
  ['one rank, shared experts again', 1, { ...weighed, ...selective('moe') }],
  ['dp 2, ep 2, shared experts', 2, { ...shared, expertModelParallelSize: 2 }],
  ['tp 2 with sp, etp 2, shared experts, bf16', 2, { ...sp(2), ...weighed, expertTensorParallelSize: 2 }, bf16],
  ['one rank, latent and shared experts, bf16', 1, { ...weighed, ...latent }, bf16],
  ['tp 2 with sp, etp 2, latent experts', 2, { ...sp(2), ...latent, expertTensorParallelSize: 2 }],
  [
    'dp 2, ep 2, latent experts, gathered',
    2,
    { ...latent, expertModelParallelSize: 2, moeTokenDispatcherType: 'allgather' },
  ],
  ['fsdp 2, latent experts', 2, latent, fsdp],
  ['one rank, padded experts', 1, padded],
  ['dp 2, ep 2, padded experts, bf16', 2, { ...padded, expertModelParallelSize: 2 }, bf16],
  ['pp 2, shared experts', 2, { ...pp(2), ...weighed }],
  ['fsdp 2, shared experts', 2, weighed, fsdp],
  ['one rank, experts, layernorm again', 1, { ...experts, ...selective('layernorm') }],
  ['cp 2, bf16, core_attn again', 2, { contextParallelSize: 2, ...selective('core_attn') }, bf16],
  [
    'one rank, bf16, experts, routing in float32',
    1,
    { ...experts, moeRouterDtype: 'fp32', moeZLossCoeff: 0.01, moeInputJitterEps: 0.01 },
    bf16,
  ],
  ['dp 2, ep 2, gathered', 2, { ...experts, expertModelParallelSize: 2, moeTokenDispatcherType: 'allgather' }],
  [
    'tp 2 with sp, etp 2, gathered',
    2,
    { ...sp(2), ...experts, expertTensorParallelSize: 2, moeTokenDispatcherType: 'allgather' },
  ],
  ['cp 2, bf16, gathered', 2, cp(2, 'all_gather'), bf16],
  ['cp 2 by heads, bf16, core_attn again', 2, { ...cp(2, 'a2a'), ...selective('core_attn') }, bf16],
  ['cp 4 by heads and ring', 4, { ...cp(4, 'a2a+p2p'), hierarchicalContextParallelSizes: [2, 2] }],
  ['cp 4 by heads and ring, bf16', 4, { ...cp(4, 'a2a+p2p'), hierarchicalContextParallelSizes: [2, 2] }, bf16],
  ['cp 4, gathered, full recompute', 4, { ...cp(4, 'all_gather'), ...full() }],
  ['cp 2, pp 2', 4, { contextParallelSize: 2, ...pp(2) }],
  ['cp 4, full recompute', 4, { contextParallelSize: 4, ...full() }],
  ['tp 2 with sp, cp 2, experts', 4, { contextParallelSize: 2, ...sp(2), ...experts }],
  ['pp 2, experts', 2, { ...pp(2), ...experts }],
  ['tp 2 with sp, ep 2, bf16', 2, { ...sp(2), ...experts, expertModelParallelSize: 2 }, bf16],
  ['dp 4, ep 2, etp 2', 4, { ...experts, expertModelParallelSize: 2, expertTensorParallelSize: 2 }],
  ['one rank, LayerNorm, biases, not gated', 1, { ...gpt, ...tied }],
  ['one rank, bf16, dropout', 1, dropout, bf16],
  ['one rank, full recompute', 1, full()],
  ['one rank, full recompute of 3 and 1 layers, dropout', 1, { ...full('uniform', 3), ...dropout }],
  ['one rank, full recompute of 2 layers, bf16', 1, full('block', 2), bf16],
  ['one rank, core_attn again', 1, selective('core_attn')],
  ['one rank, core_attn and layernorm again', 1, selective('core_attn', 'layernorm')],
  ['one rank, layernorm and mlp_act again', 1, selective('layernorm', 'mlp_act')],
  ['tp 2 with sp, mlp_act again', 2, { ...sp(2), ...selective('mlp_act') }],
  ['one rank, mlp again, dropout', 1, { ...selective('mlp'), ...dropout }],
  ['tp 2', 2, tp(2)],
  ['tp 2 with sp, all modules again', 2, { ...sp(2), ...selective('core_attn', 'layernorm', 'mlp') }],
  ['tp 2, dropout, bf16', 2, { ...tp(2), ...dropout }, bf16],
  ['dp 2', 2, {}, whole],
  ['pp 2, gpipe', 2, pp(2, 'gpipe')],
  ['pp 2, zb-h1', 2, pp(2, 'zb-h1')],
  ['pp 2, zb-h1, dropout', 2, { ...pp(2, 'zb-h1'), ...dropout }],
  ['pp 2, vpp 2', 2, vpp(2, 2)],
  ['pp 2, full recompute', 2, { ...pp(2), ...full() }],
  ['pp 2, zb-h1, full recompute', 2, { ...pp(2, 'zb-h1'), ...full() }],
  ['pp 2, zb-h1, mlp again', 2, { ...pp(2, 'zb-h1'), ...selective('mlp') }],
  ['pp 2, vpp 2, full recompute of a layer', 2, { ...vpp(2, 2), ...full('block', 1) }],
  ['pp 2, tied, bf16', 2, { ...pp(2), ...tied }, bf16],
  ['one rank, activations of a layer on the host', 1, away(1)],
  ['one rank, bf16, activations of 3 layers and the optimizer on the host', 1, away(3), { ...bf16, ...hosted }],
  ['dp 2, LayerNorm, activations of 3 layers on the host, dropout', 2, { ...gpt, ...away(3), ...dropout }],
  ['one rank, half of the optimizer on the host', 1, {}, half],
  ['dp 2, sharded, bf16, half of the optimizer on the host', 2, {}, { ...bf16, ...half }],
  ['pp 2, optimizer on the host', 2, pp(2), hosted],
  ['tp 4', 4, tp(4)],
  ['tp 4 with sp', 4, sp(4)],
  ['tp 4 with sp, 2 kv heads', 4, { ...sp(4), numQueryGroups: 2 }],
  ['dp 4, sharded', 4, {}],
  ['pp 4, 1f1b', 4, pp(4)],
  ['pp 4, gpipe', 4, pp(4, 'gpipe')],
  ['pp 4, zb-h1', 4, pp(4, 'zb-h1')],
  ['pp 4, uneven', 4, { ...pp(4), pipelineModelParallelLayout: 'E|tt|t|tL' }],
  ['tp 2 with sp, pp 2', 4, { ...sp(2), ...pp(2) }],
  ['tp 2 with sp, pp 2, zb-h1', 4, { ...sp(2), ...pp(2, 'zb-h1') }],
  ['tp 2, pp 2, vpp 2, bf16', 4, { ...tp(2), ...vpp(2, 2) }, bf16],
  ['tp 2 with sp, dp 2, bf16', 4, sp(2), bf16],
  ['pp 2, dp 2', 4, pp(2)],
  ['fsdp 2, tied, bf16', 2, tied, { ...bf16, ...fsdp }],
  ['fsdp 2, nothing beside compute', 2, {}, inTurn],
  ['fsdp 2, full recompute', 2, full(), fsdp],
  ['fsdp 2, full recompute of 3 and 1 layers', 2, full('uniform', 3), fsdp],
  ['fsdp 2, mlp again, weights stay', 2, selective('mlp'), kept],
  ['fsdp 2, bf16, half of the optimizer on the host', 2, {}, { ...bf16, ...half, ...fsdp }],
  ['fsdp 2, activations of 3 layers on the host', 2, away(3), fsdp],
  ['fsdp over cp 2', 2, { contextParallelSize: 2 }, fsdp],
  ['fsdp 2, some layers of experts', 2, { ...experts, moeLayerFreq: [1, 0, 1, 0] }, fsdp],
  ['fsdp 4, bf16', 4, {}, { ...bf16, ...fsdp }],
  ['fsdp 4, 8 layers, tied, full recompute', 4, { ...tied, ...full(), numLayers: 8 }, fsdp],
  ['fsdp 2, tp 2 with sp', 4, sp(2), fsdp],
  ['fsdp 4, ep 2, etp 2', 4, { ...experts, expertModelParallelSize: 2, expertTensorParallelSize: 2 }, fsdp],
  ['tp 2 with sp, pp 2, dp 2', 8, { ...sp(2), ...pp(2) }],
]

const rows = process.env['VIADUCT_TEST_FULL'] === '1' ? all : few
const taskOf = ([, , model, more]: Row): MemoryTask => ({ ...more, model })

const measured = new Map<string, readonly MeasuredMemory[]>()
beforeAll(async () => {
  for (const ranks of new Set(rows.map(([, size]) => size))) {
    const mine = rows.filter(([, size]) => size === ranks)
    const path = join(folder, `${ranks}.json`)
    const started = startScript('memoryRank.ts', [JSON.stringify(mine.map(taskOf)), path], ranks)
    const code = await started.end
    if (code !== 0) throw new Error(`${ranks} ranks ended with ${code}:\n${started.lines.join('\n')}`)
    const found = JSON.parse(readFileSync(path, 'utf8')) as MeasuredMemory[][]
    for (const [i, [name]] of mine.entries()) measured.set(name, found[i] as MeasuredMemory[])
  }
}, 300_000)

describe('memory is as planned', () => {
  // Blocks of 512 bytes and buckets that are filled up: part by part below 1%; a chunk's tables of positions are 16 KiB. The most in a
  // step within 10%, and so what is left of it without weights, gradients and optimizer state, where no hidden states are on their way
  // between stages: how many depends on who is ahead, and two of them are counted.
  it.each(rows.map((row) => [row[0], row] as const))('%s', (name, row) => {
    const [, ranks] = row
    const resolved = resolve(memoryConfig(taskOf(row)), ranks)
    const { chunks } = resolved.config.model.scheduleSizes(1)
    for (const { stage, weights, resting, peaks, host } of measured.get(name) as MeasuredMemory[]) {
      const planned = stageMemory(resolved, stage)
      const near = (got: number, expected: number, share: number, what: string) =>
        expect(Math.abs(expected / got - 1), `stage ${stage}, ${what}: ${got}, planned ${expected}`).toBeLessThan(share)
      // Fully sharded, a rank has them whole until the optimizer takes them.
      if (!resolved.config.ddp.useMegatronFsdp) near(weights, planned.weights, 0.01, 'weights')
      near(resting - chunks * 16_384, planned.total - planned.activations, 0.01, 'between steps')
      if (planned.host === 0) expect(host).toBe(0)
      else near(host, planned.host, 0.02, 'host')
      for (const peak of peaks) {
        near(peak, planned.total, 0.1, 'peak')
        const activations = peak - resting
        const onTheWay = Math.abs(activations - planned.activations) <= 2 * hiddenBytes(resolved)
        if (resolved.config.model.pipelineModelParallelSize === 1 || !onTheWay)
          near(activations, planned.activations, 0.1, 'activations')
      }
    }
  })
})
