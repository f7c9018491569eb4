// Random models on the fixture's data, and random layouts of them, by a seed. What does not fit (lib/config/resolve.ts) is drawn again.
import { configProblems } from '../../lib/config/resolve.js'
import type { DdpSection, OptimizerSection } from '../../lib/config/sections.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import { cpCommTypes } from '../../lib/parallel/config.js'
import { configOf } from './pipelineRank.js'

/** Numbers in [0, 1) that depend on the seed alone. */
export type Random = () => number

/** What the model is, whatever ranks it is on: layouts of one variant have the same losses. */
export type Variant = Partial<ProviderInit> & Pick<ProviderInit, 'numLayers'>

export interface Layout {
  readonly ranks: number
  readonly model: Partial<ProviderInit>
  readonly microBatchSize: number
  readonly ddp: Partial<DdpSection>
  readonly optimizer?: Partial<OptimizerSection>
}

/** Mulberry32. */
export function randomOf(seed: number): Random {
  let state = seed | 0
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296
  }
}

function pick<T>(random: Random, values: readonly T[]): T {
  return values[Math.floor(random() * values.length)] as T
}

const coin = (random: Random) => random() < 0.5

/** [query heads, key and value heads] */
const heads = [
  [4, 1],
  [4, 2],
  [4, 4],
  [6, 1],
  [6, 3],
  [6, 6],
  [8, 2],
  [8, 4],
] as const

const activations = [
  { gatedLinearUnit: true, activation: 'silu' },
  { gatedLinearUnit: true, activation: 'gelu' },
  { gatedLinearUnit: false, activation: 'gelu_tanh' },
  { gatedLinearUnit: false, activation: 'quick_gelu' },
] as const

/** Heads are as wide as they are, whatever the hidden size; blocks and heads are odd numbers at times. */
export function drawVariant(random: Random): Variant {
  const [numAttentionHeads, numQueryGroups] = pick(random, heads)
  return {
    numLayers: pick(random, [3, 4, 4, 5]),
    numAttentionHeads,
    numQueryGroups,
    hiddenSize: pick(random, [48, 64, 72]),
    kvChannels: pick(random, [8, 12, 16]),
    ffnHiddenSize: pick(random, [96, 120]),
    ...pick(random, activations),
    normalization: pick(random, ['RMSNorm', 'RMSNorm', 'LayerNorm']),
    addQkvBias: coin(random),
    addProjBias: coin(random),
    addMlpBias: coin(random),
    rotaryPercent: pick(random, [1, 0.5]),
    rotaryInterleaved: coin(random),
    shareEmbeddingsAndOutputWeights: coin(random),
    hiddenDropout: pick(random, [0, 0.1]),
    qkLayernorm: pick(random, [null, null, 'perHead', 'allHeads']),
    clipQkv: pick(random, [null, null, 0.5]),
    windowSize: pick(random, [null, null, 3]),
    softmaxType: pick(random, ['vanilla', 'learnable']),
    ...(coin(random) ? drawExperts(random) : {}),
  }
}

/** The balance loss counts each sequence by itself: of a micro-batch it would depend on the layout. */
function drawExperts(random: Random): Partial<ProviderInit> {
  const numMoeExperts = pick(random, [4, 6, 8])
  const moeRouterTopk = pick(random, [1, 2, 3])
  const grouped = moeRouterTopk === 2 && coin(random)
  return {
    numMoeExperts,
    moeRouterTopk,
    ...pick(random, [
      { moeRouterScoreFunction: 'softmax' },
      { moeRouterScoreFunction: 'sigmoid' },
      { moeRouterScoreFunction: 'sigmoid', moeRouterEnableExpertBias: true, moeRouterBiasUpdateRate: 0.01 },
    ] as const),
    moeRouterTopkScalingFactor: pick(random, [null, 1.5]),
    ...(grouped ? { moeRouterNumGroups: 2, moeRouterGroupTopk: pick(random, [1, 2]) } : {}),
    moeTokenDispatcherType: pick(random, ['alltoall', 'allgather']),
    moeRouterDtype: pick(random, [null, 'fp32']),
    moeZLossCoeff: pick(random, [null, 0.02]),
    moeInputJitterEps: pick(random, [null, null, 0.05]),
    moeFfnHiddenSize: pick(random, [24, 48]),
    moeLatentSize: pick(random, [null, null, 32]),
    ...pick(random, [
      {},
      { moeSharedExpertIntermediateSize: 48 },
      { moeSharedExpertIntermediateSize: 24, moeSharedExpertGate: true },
    ]),
    moeLayerFreq: pick(random, [1, 1, 0] as const) === 1 ? 1 : [1, 0, 1, 0, 1],
    moeRouterPreSoftmax: coin(random),
    moeRouterLoadBalancingType: pick(random, ['none', 'seq_aux_loss']),
    moeAuxLossCoeff: 0.05,
  }
}

const recomputeForms: readonly Partial<ProviderInit>[] = [
  { recomputeGranularity: 'full', recomputeMethod: 'uniform', recomputeNumLayers: 1 },
  { recomputeGranularity: 'full', recomputeMethod: 'uniform', recomputeNumLayers: 2 },
  { recomputeGranularity: 'full', recomputeMethod: 'block', recomputeNumLayers: 1 },
  { recomputeGranularity: 'selective' },
  { recomputeGranularity: 'selective', recomputeModules: ['core_attn', 'layernorm'] },
  { recomputeGranularity: 'selective', recomputeModules: ['layernorm', 'mlp'] },
  { recomputeGranularity: 'selective', recomputeModules: ['layernorm'] },
  { recomputeGranularity: 'selective', recomputeModules: ['layernorm', 'mlp_act'] },
  { recomputeGranularity: 'selective', recomputeModules: ['moe', 'mlp'] },
]

/** A layout string with so many slots, some of them empty. */
function layoutString(random: Random, blocks: number, slots: number): string {
  const counts = Array<number>(slots).fill(0)
  for (let block = 0; block < blocks; block++) {
    const slot = Math.floor(random() * slots)
    counts[slot] = (counts[slot] as number) + 1
  }
  return `E${counts.map((count) => (count > 1 ? `t*${count}` : 't'.repeat(count))).join('|')}L`
}

/** How a pipeline's blocks are spread. */
function drawStages(random: Random, blocks: number, pp: number): { chunks: number; model: Partial<ProviderInit> } {
  const chunks = pick(random, [1, 1, 2, 3])
  const even = chunks === 1 ? {} : { virtualPipelineModelParallelSize: chunks }
  const ends = {
    numLayersInFirstPipelineStage: chunks * pick(random, [1, 2]),
    numLayersInLastPipelineStage: chunks * pick(random, [1, 3]),
  }
  const accounted = { accountForEmbeddingInPipelineSplit: true, accountForLossInPipelineSplit: true }
  const string = { pipelineModelParallelLayout: layoutString(random, blocks, pp * chunks) }
  return { chunks, model: pick(random, [even, { ...even, ...ends }, { ...even, ...accounted }, string]) }
}

/** How the ranks of cp see each other's tokens. */
function drawContextForm(random: Random, cp: number): Partial<ProviderInit> {
  const cpCommType = cp === 1 ? 'p2p' : pick(random, cpCommTypes)
  return { cpCommType, hierarchicalContextParallelSizes: cpCommType === 'a2a+p2p' ? [2, cp / 2] : null }
}

/** How activations are kept until the backward pass. */
function drawKeeping(random: Random, numLayers: number, pp: number): Partial<ProviderInit> {
  const offload = { cpuOffloading: true, cpuOffloadingNumLayers: 1 + Math.floor(random() * (numLayers - 1)) }
  return pick(random, [{}, pick(random, recomputeForms), pp === 1 ? offload : pick(random, recomputeForms)])
}

function drawAny(random: Random, { numLayers, numMoeExperts = null }: Variant): Layout {
  const sizes = numMoeExperts === null ? [1] : [1, 1, 2, 3, 4]
  const [ep, etp] = [pick(random, sizes), pick(random, sizes)]
  const [tp, pp, dp] = [pick(random, [1, 2, 3, 4]), pick(random, [1, 2, 3, 4]), pick(random, [1, 2, 4])]
  const cp = pick(random, [1, 1, 2, 4])
  const { chunks, model: stages } = pp === 1 ? { chunks: 1, model: {} } : drawStages(random, numLayers, pp)
  const schedule: Partial<ProviderInit> =
    chunks > 1
      ? { microbatchGroupSizePerVpStage: pick(random, [null, pp, pp + 1]) }
      : { pipelineSchedule: pick(random, ['gpipe', '1f1b', 'zb-h1']) }
  const sharded = coin(random)
  const useMegatronFsdp = sharded && pp === 1 && coin(random)
  return {
    ranks: tp * cp * pp * dp,
    model: {
      tensorModelParallelSize: tp,
      sequenceParallel: tp > 1 && (numMoeExperts !== null || coin(random)),
      contextParallelSize: cp,
      ...drawContextForm(random, cp),
      expertModelParallelSize: ep,
      expertTensorParallelSize: etp,
      tpCommOverlap: coin(random),
      pipelineModelParallelSize: pp,
      ...(pp > 1 ? { ...stages, ...schedule } : {}),
      ...drawKeeping(random, numLayers, pp),
    },
    microBatchSize: pick(random, [1, 2, 4]),
    ddp: {
      useDistributedOptimizer: sharded,
      overlapParamGather: sharded && coin(random),
      overlapGradReduce: coin(random),
      useMegatronFsdp,
      reshardAfterForward: coin(random),
      bucketSize: pick(random, [null, 5000, 20_000]),
    },
    optimizer: pick(random, [{}, {}, { optimizerCpuOffload: true, optimizerOffloadFraction: pick(random, [0.4, 1]) }]),
  }
}

/** Whether training takes it. */
async function fits(variant: Variant, { ranks, model, microBatchSize, ddp, optimizer = {} }: Layout): Promise<boolean> {
  const config = await configOf({ trainIters: 20, model: { ...variant, ...model }, microBatchSize, ddp, optimizer })
  return configProblems(config, ranks).length === 0
}

/** A layout of at least two axes. */
export async function drawMixed(random: Random, variant: Variant, mostRanks: number): Promise<Layout> {
  for (;;) {
    const layout = drawAny(random, variant)
    const { tensorModelParallelSize: tp = 1, pipelineModelParallelSize: pp = 1 } = layout.model
    const {
      expertModelParallelSize: ep = 1,
      expertTensorParallelSize: etp = 1,
      contextParallelSize: cp = 1,
    } = layout.model
    const axes = [tp, cp, pp, layout.ranks / (tp * cp * pp), ep, etp].filter((size) => size > 1)
    if (axes.length > 1 && layout.ranks <= mostRanks && (await fits(variant, layout))) return layout
  }
}

/** A model that a layout fits. */
export async function drawVariantOf(random: Random, layout: Layout): Promise<Variant> {
  for (;;) {
    const variant = drawVariant(random)
    if (await fits(variant, layout)) return variant
  }
}

/** Each axis alone, at 2 and at 4, by name. */
export const alone: readonly (readonly [string, Layout])[] = [2, 4].flatMap((ranks) => {
  const of = (name: string, model: Partial<ProviderInit>, ddp: Partial<DdpSection> = {}) =>
    [`${name} ${ranks}`, { ranks, model, microBatchSize: 1, ddp }] as const
  const stages = { pipelineModelParallelSize: ranks }
  const whole = { useDistributedOptimizer: false, overlapParamGather: false, overlapGradReduce: false }
  return [
    of('tp', { tensorModelParallelSize: ranks }),
    of('cp', { contextParallelSize: ranks }),
    of('tp with sp', { tensorModelParallelSize: ranks, sequenceParallel: true }),
    of('gpipe', { ...stages, pipelineSchedule: 'gpipe' }),
    of('1f1b', stages),
    of('zb-h1', { ...stages, pipelineSchedule: 'zb-h1' }),
    of('interleaved', { ...stages, pipelineModelParallelLayout: ranks === 2 ? 'Et|t|t|tL' : 'Et|t||t||t||L' }),
    of('dp', {}, whole),
    of('dp, optimizer sharded,', {}, { bucketSize: 20_000 }),
    of('fsdp', {}, { useMegatronFsdp: true }),
    of('fsdp without resharding', {}, { useMegatronFsdp: true, reshardAfterForward: false }),
  ]
})
