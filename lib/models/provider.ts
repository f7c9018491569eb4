// GPTModelProvider: a model's description and its parallel sizes, open for changes until `finalize`, and the factory of the model.
// Sealed: an unknown or snake_case key throws and names the one that was meant.
import type { DType } from '../base/dtype.js'
import { stopIfAborted, ViaductError } from '../base/errors.js'
import { sealed } from '../base/sealed.js'
import { defaultParallel, type ParallelConfig, refuseLayout, runProblems } from '../parallel/config.js'
import { Mesh, type MeshConfig } from '../parallel/mesh.js'
import { PipelineLinks } from '../parallel/pipelineLinks.js'
import { mostLayers, pipelineStages } from '../parallel/pipelineStages.js'
import { defaultSchedule, type ScheduleKind, type ScheduleSizes, scheduleProblems } from '../parallel/schedules.js'
import { initDistributed } from '../parallel/world.js'
import { Device, type DeviceKind } from '../tensor/device.js'
import { withScope } from '../tensor/scope.js'
import { DistributedModel } from './distributedModel.js'
import { fieldProblems } from './fieldValues.js'
import { GPTModel } from './gpt.js'
import { allocateParameter, initializeParameter } from './initialize.js'
import { latentExpertProblems } from './latentExperts.js'
import { rowCutter, runnableProblems } from './layoutShards.js'
import { defaultOffload, type OffloadSettings, offloadedLayers, offloadProblems } from './offloadSettings.js'
import { defaultRecompute, type RecomputeSettings, recomputeProblems } from './recomputeSettings.js'
import { routerProblems } from './routerSettings.js'
import { sharedExpertProblems } from './sharedExperts.js'
import {
  type ActivationName,
  plainDecoder,
  type QkLayernorm,
  type RopeScaling,
  type TransformerConfig,
  transformerFields,
} from './transformerConfig.js'

/** Settings of a provider besides the transformer and the parallel sizes. */
export interface ProviderSettings extends RecomputeSettings, OffloadSettings {
  /** The vocabulary is padded in memory to a multiple of this times tp. */
  makeVocabSizeDivisibleBy: number
  /** Tokens of a training sample. */
  seqLength: number
  /** In which order a pipeline stage works; null: `1f1b`, `interleaved` where stages have several chunks. */
  pipelineSchedule: ScheduleKind | null
  /** interleaved: micro-batches that pass a chunk before the next one begins; null: as many as there are stages. */
  microbatchGroupSizePerVpStage: number | null
}

type Fields = TransformerConfig & ParallelConfig & ProviderSettings
type Required = 'numLayers' | 'hiddenSize' | 'numAttentionHeads' | 'vocabSize'

/** What a provider is made of; what is left out has Megatron-Core's default. */
export type ProviderInit = Pick<Fields, Required> & Partial<Omit<Fields, Required>>

export interface ProvideOptions {
  /** Sum gradients over data-parallel ranks. Default true. */
  readonly wrapWithDdp?: boolean
  /** Default: one over all ranks of the launcher, owned by the model. */
  readonly mesh?: Mesh
  /** Run the weights loader where there is one; false: draw initial weights. Default true. */
  readonly loadWeights?: boolean
  /** Instead of paramsDtype. */
  readonly dtype?: DType
  readonly device?: DeviceKind
  /** Of the initial weights. Default 1234. */
  readonly seed?: number
  readonly signal?: AbortSignal
}

export type WeightsLoader = (model: DistributedModel) => Promise<void>
export type PreWrapHook = (model: DistributedModel) => Promise<void>

/** What is not configuration; kept outside of the object because methods run on its sealed view. */
interface State {
  final: boolean
  readonly hooks: PreWrapHook[]
}
const states = new WeakMap<object, State>()

function stateOf(provider: object): State {
  return states.get(provider) as State
}

export class GPTModelProvider implements TransformerConfig, ParallelConfig, ProviderSettings {
  numLayers: number
  hiddenSize: number
  ffnHiddenSize: number
  numAttentionHeads: number
  numQueryGroups: number
  kvChannels: number
  normalization: 'RMSNorm' | 'LayerNorm' = 'RMSNorm'
  layernormEpsilon = 1e-5
  activation: ActivationName = 'silu'
  gatedLinearUnit = true
  addQkvBias = false
  addProjBias = false
  addMlpBias = false
  rotaryBase = 10_000
  rotaryPercent = 1
  rotaryInterleaved = false
  ropeScaling: RopeScaling = { type: 'default' }
  maxPositionEmbeddings = 2048
  vocabSize: number
  shareEmbeddingsAndOutputWeights = false
  initMethodStd = 0.02
  attentionDropout = 0
  hiddenDropout = 0
  paramsDtype: DType = 'float32'
  qkLayernorm: QkLayernorm | null = plainDecoder.qkLayernorm
  clipQkv: number | null = plainDecoder.clipQkv
  softmaxType: TransformerConfig['softmaxType'] = plainDecoder.softmaxType
  windowSize: number | null = plainDecoder.windowSize
  numMoeExperts: number | null = plainDecoder.numMoeExperts
  moeRouterTopk: number = plainDecoder.moeRouterTopk
  moeFfnHiddenSize: number | null = plainDecoder.moeFfnHiddenSize
  moeLatentSize: number | null = plainDecoder.moeLatentSize
  moeSharedExpertIntermediateSize: number | null = plainDecoder.moeSharedExpertIntermediateSize
  moeSharedExpertGate: boolean = plainDecoder.moeSharedExpertGate
  moeLayerFreq: TransformerConfig['moeLayerFreq'] = plainDecoder.moeLayerFreq
  moeRouterPreSoftmax: boolean = plainDecoder.moeRouterPreSoftmax
  moeRouterLoadBalancingType: TransformerConfig['moeRouterLoadBalancingType'] = plainDecoder.moeRouterLoadBalancingType
  moeAuxLossCoeff: number = plainDecoder.moeAuxLossCoeff
  moeRouterScoreFunction: TransformerConfig['moeRouterScoreFunction'] = plainDecoder.moeRouterScoreFunction
  moeRouterTopkScalingFactor: TransformerConfig['moeRouterTopkScalingFactor'] = plainDecoder.moeRouterTopkScalingFactor
  moeRouterNumGroups: TransformerConfig['moeRouterNumGroups'] = plainDecoder.moeRouterNumGroups
  moeRouterGroupTopk: TransformerConfig['moeRouterGroupTopk'] = plainDecoder.moeRouterGroupTopk
  moeRouterEnableExpertBias: boolean = plainDecoder.moeRouterEnableExpertBias
  moeRouterBiasUpdateRate: number = plainDecoder.moeRouterBiasUpdateRate
  moeRouterDtype: TransformerConfig['moeRouterDtype'] = plainDecoder.moeRouterDtype
  moeZLossCoeff: TransformerConfig['moeZLossCoeff'] = plainDecoder.moeZLossCoeff
  moeInputJitterEps: TransformerConfig['moeInputJitterEps'] = plainDecoder.moeInputJitterEps
  moeExpertCapacityFactor: TransformerConfig['moeExpertCapacityFactor'] = plainDecoder.moeExpertCapacityFactor
  moePadExpertInputToCapacity: boolean = plainDecoder.moePadExpertInputToCapacity
  moeTokenDropPolicy: TransformerConfig['moeTokenDropPolicy'] = plainDecoder.moeTokenDropPolicy
  moeTokenDispatcherType: TransformerConfig['moeTokenDispatcherType'] = plainDecoder.moeTokenDispatcherType
  moeRouterForceLoadBalancing: TransformerConfig['moeRouterForceLoadBalancing'] =
    plainDecoder.moeRouterForceLoadBalancing

  tensorModelParallelSize = defaultParallel.tensorModelParallelSize
  pipelineModelParallelSize = defaultParallel.pipelineModelParallelSize
  virtualPipelineModelParallelSize = defaultParallel.virtualPipelineModelParallelSize
  contextParallelSize = defaultParallel.contextParallelSize
  cpCommType = defaultParallel.cpCommType
  hierarchicalContextParallelSizes = defaultParallel.hierarchicalContextParallelSizes
  expertModelParallelSize = defaultParallel.expertModelParallelSize
  expertTensorParallelSize = defaultParallel.expertTensorParallelSize
  sequenceParallel = defaultParallel.sequenceParallel
  tpCommOverlap: boolean | null = defaultParallel.tpCommOverlap
  pipelineModelParallelLayout = defaultParallel.pipelineModelParallelLayout
  numLayersInFirstPipelineStage = defaultParallel.numLayersInFirstPipelineStage
  numLayersInLastPipelineStage = defaultParallel.numLayersInLastPipelineStage
  accountForEmbeddingInPipelineSplit = defaultParallel.accountForEmbeddingInPipelineSplit
  accountForLossInPipelineSplit = defaultParallel.accountForLossInPipelineSplit

  makeVocabSizeDivisibleBy = 128
  seqLength: number
  recomputeGranularity = defaultRecompute.recomputeGranularity
  recomputeMethod = defaultRecompute.recomputeMethod
  recomputeNumLayers = defaultRecompute.recomputeNumLayers
  recomputeModules = defaultRecompute.recomputeModules && [...defaultRecompute.recomputeModules]
  cpuOffloading = defaultOffload.cpuOffloading
  cpuOffloadingNumLayers = defaultOffload.cpuOffloadingNumLayers
  cpuOffloadingActivations = defaultOffload.cpuOffloadingActivations
  cpuOffloadingWeights = defaultOffload.cpuOffloadingWeights
  pipelineSchedule: ScheduleKind | null = null
  microbatchGroupSizePerVpStage: number | null = null

  /** Fills the parameters instead of initial values; set by the bridge. */
  weightsLoader: WeightsLoader | null = null

  /** @throws ERR_CONFIG for an unknown key. */
  constructor(init: ProviderInit) {
    this.numLayers = init.numLayers
    this.hiddenSize = init.hiddenSize
    this.numAttentionHeads = init.numAttentionHeads
    this.vocabSize = init.vocabSize
    this.ffnHiddenSize = 4 * init.hiddenSize
    this.numQueryGroups = init.numAttentionHeads
    this.kvChannels = init.hiddenSize / init.numAttentionHeads
    this.seqLength = init.maxPositionEmbeddings ?? this.maxPositionEmbeddings
    const state: State = { final: false, hooks: [] }
    const view = sealed<GPTModelProvider>(this, 'model', { frozen: () => state.final })
    states.set(this, state)
    states.set(view, state)
    for (const [key, value] of Object.entries(init)) if (value !== undefined) Reflect.set(view, key, value)
    // biome-ignore lint/correctness/noConstructorReturn: the sealed view is the object that everybody uses.
    return view
  }

  /** Rows of the vocabulary in memory, over all tensor-parallel ranks. */
  get paddedVocabSize(): number {
    const multiple = this.makeVocabSizeDivisibleBy * this.tensorModelParallelSize
    return Math.ceil(this.vocabSize / multiple) * multiple
  }

  /** True after `finalize`. */
  get isFinal(): boolean {
    return stateOf(this).final
  }

  /**
   * Checks everything across fields and freezes the provider. A second call does nothing.
   * @throws ERR_LAYOUT_INVALID or ERR_CONFIG with all problems together.
   */
  finalize(): void {
    const state = stateOf(this)
    if (state.final) return
    const own = modelProblems(this)
    if (own.length === 0) {
      refuseLayout(runnableProblems(this, this))
      own.push(...scheduleProblems(this.scheduleSizes(1)), ...recomputeProblems(this, mostLayers(this, this.numLayers)))
      own.push(...offloadProblems(this, this, this.numLayers))
      if (own.length > 0) throw new ViaductError('ERR_CONFIG', 'model', own.join('; '), { problems: own })
    } else {
      const problems = [...own, ...runProblems(this), ...recomputeProblems(this, null)]
      throw new ViaductError('ERR_CONFIG', 'model', problems.join('; '), { problems })
    }
    state.final = true
  }

  /** What the schedule of a step with so many micro-batches is made from. The layout must fit. */
  scheduleSizes(microBatches: number): ScheduleSizes {
    const { chunks } = pipelineStages(this, this.numLayers)
    return {
      kind: this.pipelineSchedule ?? defaultSchedule(chunks),
      stages: this.pipelineModelParallelSize,
      chunks,
      microBatches,
      groupSize: this.microbatchGroupSizePerVpStage ?? undefined,
    }
  }

  /** Runs on the model before it is given out: to freeze parameters or put adapters in. */
  registerPreWrapHook(hook: PreWrapHook): void {
    stateOf(this).hooks.push(hook)
  }

  /**
   * This rank's part of the model, with memory and weights. Every rank of the mesh calls it. Finalizes the provider.
   * @throws ERR_LAYOUT_INVALID when the mesh does not fit, ERR_OUT_OF_MEMORY.
   */
  async provideDistributedModel(options: ProvideOptions = {}): Promise<DistributedModel> {
    this.finalize()
    const { signal } = options
    stopIfAborted(signal, 'model')
    const device = Device.open(options.device ?? 'auto')
    const mesh = options.mesh ?? (await meshOn(device, this))
    await mesh.kvReplicas(this.numQueryGroups)
    const config = { ...transformerFields(this), paramsDtype: options.dtype ?? this.paramsDtype }
    const { paddedVocabSize, sequenceParallel } = this
    const sharesMemory = device.kind === 'cpu' && mesh.get('tp').info()?.transport === 'shm'
    const tpCommOverlap = this.tpCommOverlap ?? !sharesMemory
    const { rank, size } = mesh.world
    const cut = rowCutter(config, this, size, rank, { paddedVocab: paddedVocabSize })
    const stages = pipelineStages(this, this.numLayers)
    const chunks = Array.from({ length: stages.chunks }, (_, chunk) => {
      const part = stages.partOf(mesh.get('pp').rank, chunk)
      return new GPTModel(config, {
        groups: mesh,
        paddedVocabSize,
        recompute: this,
        offloadedLayers: offloadedLayers(this),
        sequenceParallel,
        tpCommOverlap,
        part,
        cut,
      })
    })
    const links = await PipelineLinks.create(mesh, device, stages.chunks)
    const { wrapWithDdp = true } = options
    const model = new DistributedModel({
      chunks,
      links,
      mesh,
      config: this,
      device,
      wrapWithDdp,
      ownsMesh: options.mesh === undefined,
    })
    try {
      const loads = this.weightsLoader !== null && options.loadWeights !== false
      await withScope(model.ctx(), (ctx) => {
        for (const [, parameter] of model.namedParameters()) {
          allocateParameter(ctx, parameter)
          if (!loads) initializeParameter(ctx, parameter, options.seed ?? 1234)
        }
      })
      stopIfAborted(signal, 'model')
      if (loads) await this.weightsLoader?.(model)
      for (const hook of stateOf(this).hooks) await hook(model)
      stopIfAborted(signal, 'model')
      return model
    } catch (error) {
      await model.dispose()
      throw error
    }
  }
}

/** All ranks, with groups for tensors of the device. */
async function meshOn(device: Device, sizes: MeshConfig): Promise<Mesh> {
  const world = await initDistributed()
  world.useDevice(device)
  return await Mesh.create(sizes, world)
}

const counts = [
  'numLayers',
  'hiddenSize',
  'ffnHiddenSize',
  'numAttentionHeads',
  'numQueryGroups',
  'kvChannels',
  'maxPositionEmbeddings',
  'vocabSize',
  'makeVocabSizeDivisibleBy',
  'seqLength',
] as const

function modelProblems(model: GPTModelProvider): string[] {
  const problems: string[] = []
  for (const key of counts) {
    if (!Number.isSafeInteger(model[key]) || model[key] < 1)
      problems.push(`${key} must be a whole number of at least 1, got ${model[key]}`)
  }
  const { numAttentionHeads: heads, numQueryGroups: groups, kvChannels, rotaryPercent, paramsDtype } = model
  if (heads % groups !== 0) problems.push(`numQueryGroups must divide numAttentionHeads=${heads}, got ${groups}`)
  if (!(rotaryPercent > 0 && rotaryPercent <= 1))
    problems.push(`rotaryPercent must be above 0 and at most 1, got ${rotaryPercent}`)
  else if (Math.floor(kvChannels * rotaryPercent) % 2 !== 0) {
    problems.push(`kvChannels times rotaryPercent must be even, got ${Math.floor(kvChannels * rotaryPercent)}`)
  }
  if (!(model.layernormEpsilon >= 0 && Number.isFinite(model.layernormEpsilon)))
    problems.push(`layernormEpsilon must be at least 0, got ${model.layernormEpsilon}`)
  for (const key of ['rotaryBase', 'initMethodStd'] as const) {
    if (!(model[key] > 0 && Number.isFinite(model[key]))) problems.push(`${key} must be positive, got ${model[key]}`)
  }
  for (const key of ['hiddenDropout', 'attentionDropout'] as const) {
    if (!(model[key] >= 0 && model[key] < 1)) problems.push(`${key} must be from 0 to below 1, got ${model[key]}`)
  }
  if (!['float32', 'bfloat16', 'float16'].includes(paramsDtype))
    problems.push(`paramsDtype must be float32, bfloat16 or float16, got ${paramsDtype}`)
  problems.push(...fieldProblems(model), ...routerProblems(model))
  problems.push(...sharedExpertProblems(model), ...latentExpertProblems(model))
  if (![true, false, null].includes(model.tpCommOverlap))
    problems.push(`tpCommOverlap must be true, false or null, got ${JSON.stringify(model.tpCommOverlap)}`)
  return problems
}
