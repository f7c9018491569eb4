// From what a user wrote to what a run uses: every rule between fields, all problems in one error, then derived numbers, then
// frozen. Pure: no process starts, no file is read. F35 of the fault list is decided here, before any rank exists.
import type { DType } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { runnableProblems } from '../models/layoutShards.js'
import { offloadProblems } from '../models/offloadSettings.js'
import { recomputeProblems } from '../models/recomputeSettings.js'
import { parallelOf, runProblems } from '../parallel/config.js'
import { mostLayers } from '../parallel/pipelineStages.js'
import { freezeConfig, type RunConfig, sectionNames } from './runConfig.js'
import { schemas } from './sections.js'

/** A checked, frozen configuration with the numbers that follow from it. */
export interface ResolvedConfig {
  readonly config: RunConfig
  readonly worldSize: number
  /** Ranks with the same shard of the model and other data: worldSize / (tp·pp·cp). */
  readonly dataParallelSize: number
  /** Micro-batches that each rank runs in a step. */
  readonly numMicroBatches: number
  /** Tokens a sequence. */
  readonly seqLength: number
  /** Logical vocabulary. */
  readonly vocabSize: number
  /** Vocabulary in memory, over all tensor-parallel ranks. */
  readonly paddedVocabSize: number
  /** Dtype of parameters and activations: mixedPrecision's, else model.paramsDtype. */
  readonly paramsDtype: DType
  readonly lrWarmupIters: number
  readonly lrDecayIters: number
}

/**
 * All problems of a configuration, each naming its fields; empty when it is fine.
 * @param worldSize - ranks that will run.
 */
export function configProblems(config: RunConfig, worldSize: number): string[] {
  const problems: string[] = []
  for (const name of sectionNames) {
    const result = schemas[name].safeParse({ ...config[name] })
    for (const issue of result.error?.issues ?? []) {
      const key = issue.path.join('.')
      const value = (config[name] as unknown as Record<string, unknown>)[String(issue.path[0] ?? '')]
      problems.push(`${name}.${key}: ${issue.message.replace(/^Invalid input: /, '')}, got ${JSON.stringify(value)}`)
    }
  }
  if (!['bf16_mixed', 'fp32', null].includes(config.mixedPrecision)) {
    problems.push(`mixedPrecision: expected bf16_mixed, fp32 or null, got ${JSON.stringify(config.mixedPrecision)}`)
  }
  if (problems.length > 0) return problems
  return [
    ...modelAndLayoutProblems(config, worldSize),
    ...batchProblems(config, worldSize),
    ...scheduleProblems(config),
    ...sharingProblems(config),
    ...dataProblems(config),
  ]
}

function modelAndLayoutProblems(config: RunConfig, worldSize: number): string[] {
  const own = modelProblems(config)
  const batchWorks = (ranks: number) => batchProblems(config, ranks).length === 0
  // Shards are only looked at in a model whose sizes are sound.
  const layout =
    own.length > 0
      ? runProblems(config.model, worldSize, batchWorks)
      : runnableProblems(config.model, config.model, worldSize, batchWorks)
  const isField = (problem: string) => Object.keys(parallelOf({})).some((key) => problem.startsWith(key))
  const { model } = config
  const sizes = layout.length === 0 && Number.isInteger(model.numLayers) && model.numLayers > 0
  const largest = sizes ? mostLayers(model, model.numLayers) : null
  const recompute = recomputeProblems(model, largest).map((problem) => `model.${problem}`)
  const offload = sizes ? offloadProblems(model, model, model.numLayers).map((problem) => `model.${problem}`) : []
  return [
    ...layout.map((problem) => (isField(problem) ? `model.${problem}` : problem)),
    ...own,
    ...recompute,
    ...offload,
  ]
}

function modelProblems({ model, mixedPrecision }: RunConfig): string[] {
  const problems: string[] = []
  const say = (bad: boolean, text: string) => bad && problems.push(text)
  const heads = model.numAttentionHeads
  const groups = model.numQueryGroups
  for (const key of [
    'numLayers',
    'hiddenSize',
    'ffnHiddenSize',
    'numAttentionHeads',
    'numQueryGroups',
    'kvChannels',
    'vocabSize',
    'seqLength',
  ] as const) {
    const value: unknown = model[key]
    say(
      !Number.isInteger(value) || (value as number) < 1,
      `model.${key} must be a whole number of at least 1, got ${String(value)}`,
    )
  }
  if (problems.length > 0) return problems
  say(heads % groups !== 0, `model.numAttentionHeads=${heads} must be divisible by model.numQueryGroups=${groups}`)
  say(
    model.seqLength > model.maxPositionEmbeddings,
    `model.seqLength=${model.seqLength} is longer than model.maxPositionEmbeddings=${model.maxPositionEmbeddings}`,
  )
  say(
    !(model.hiddenDropout >= 0 && model.hiddenDropout < 1),
    `model.hiddenDropout must be at least 0 and less than 1, got ${model.hiddenDropout}`,
  )
  say(
    model.attentionDropout !== 0,
    `model.attentionDropout must be 0 in training, got ${model.attentionDropout}: use model.hiddenDropout`,
  )
  const dtype = dtypeOf(mixedPrecision, model.paramsDtype)
  say(dtype !== 'float32' && dtype !== 'bfloat16', `model.paramsDtype=${dtype}: training takes float32 or bfloat16`)
  return problems
}

function dtypeOf(precision: RunConfig['mixedPrecision'], dtype: DType): DType {
  if (precision === null) return dtype
  return precision === 'fp32' ? 'float32' : 'bfloat16'
}

function batchProblems({ train, model }: RunConfig, worldSize: number): string[] {
  const { contextParallelSize: cp } = parallelOf(model)
  const ranks = model.tensorModelParallelSize * model.pipelineModelParallelSize * cp
  const dp = worldSize / ranks
  if (!Number.isInteger(dp) || dp < 1) return []
  const { globalBatchSize, microBatchSize } = train
  const unit = microBatchSize * dp
  if (globalBatchSize % unit === 0) return []
  const below = globalBatchSize - (globalBatchSize % unit)
  const batches = [below, below + unit].filter((size) => size > 0)
  const micro = Array.from({ length: microBatchSize - 1 }, (_, i) => i + 1).filter(
    (size) => globalBatchSize % (size * dp) === 0,
  )
  return [
    `train.globalBatchSize=${globalBatchSize} must be divisible by train.microBatchSize=${microBatchSize} times the ` +
      `data-parallel size ${dp} (${worldSize} ranks / tp·pp·cp = ${ranks}): use train.globalBatchSize=${batches.join(' or ')}` +
      `${micro.length === 0 ? '' : `, or train.microBatchSize=${micro.join(', ')}`}`,
  ]
}

function warmupOf({ scheduler, train }: RunConfig): { warmup: number; decay: number } {
  const decay = scheduler.lrDecayIters ?? train.trainIters
  const fraction = scheduler.lrWarmupFraction
  return { decay, warmup: fraction === null ? scheduler.lrWarmupIters : fraction * decay }
}

function scheduleProblems(config: RunConfig): string[] {
  const { optimizer, scheduler } = config
  const problems: string[] = []
  const say = (bad: boolean, text: string) => bad && problems.push(text)
  const { warmup, decay } = warmupOf(config)
  say(
    optimizer.minLr > optimizer.lr,
    `optimizer.minLr=${optimizer.minLr} is larger than optimizer.lr=${optimizer.lr}: use at most ${optimizer.lr}`,
  )
  say(
    scheduler.lrWarmupInit > optimizer.lr,
    `scheduler.lrWarmupInit=${scheduler.lrWarmupInit} is larger than optimizer.lr=${optimizer.lr}`,
  )
  say(
    scheduler.lrWarmupFraction !== null && scheduler.lrWarmupIters !== 0,
    `scheduler.lrWarmupFraction=${scheduler.lrWarmupFraction} and scheduler.lrWarmupIters=${scheduler.lrWarmupIters}: set one, the other to null or 0`,
  )
  say(
    warmup >= decay && scheduler.lrDecayStyle !== 'constant',
    `scheduler.lrWarmupIters=${warmup} must be less than scheduler.lrDecayIters=${decay}` +
      `${scheduler.lrDecayIters === null ? ' (train.trainIters)' : ''}: shorten the warm-up or set a longer decay`,
  )
  if (scheduler.lrDecayStyle === 'WSD') {
    const wsd = scheduler.lrWsdDecayIters
    say(wsd === null, 'scheduler.lrWsdDecayIters must be set for scheduler.lrDecayStyle=WSD')
    say(wsd !== null && wsd > decay, `scheduler.lrWsdDecayIters=${wsd} is more than scheduler.lrDecayIters=${decay}`)
  }
  return problems
}

function sharingProblems({ ddp, model }: RunConfig): string[] {
  const problems: string[] = []
  const say = (bad: boolean, text: string) => bad && problems.push(text)
  const { useDistributedOptimizer: isSharded, useMegatronFsdp: isFully, dataParallelShardingStrategy: strategy } = ddp
  say(
    !isSharded && ddp.overlapParamGather,
    'ddp.overlapParamGather=true needs ddp.useDistributedOptimizer=true: set both or neither',
  )
  if (!isFully) return problems
  say(
    !isSharded,
    'ddp.useMegatronFsdp=true needs ddp.useDistributedOptimizer=true: use ddp.useDistributedOptimizer=true, or ddp.useMegatronFsdp=false',
  )
  say(
    strategy !== 'optim_grads_params',
    `ddp.dataParallelShardingStrategy=${strategy} is not what ddp.useMegatronFsdp=true does: use optim_grads_params, or ddp.useMegatronFsdp=false`,
  )
  const { pipelineModelParallelSize: pp } = parallelOf(model)
  say(
    pp > 1,
    `ddp.useMegatronFsdp=true needs model.pipelineModelParallelSize=1, got ${pp}: use model.pipelineModelParallelSize=1, or ddp.useMegatronFsdp=false`,
  )
  return problems
}

function dataProblems({ dataset, tokenizer, model, checkpoint, validation, dist }: RunConfig): string[] {
  const problems: string[] = []
  const say = (bad: boolean, text: string) => bad && problems.push(text)
  say(
    dataset.seqLength !== null && dataset.seqLength !== model.seqLength,
    `dataset.seqLength=${dataset.seqLength} must equal model.seqLength=${model.seqLength}: leave it null`,
  )
  say(
    tokenizer.vocabSize !== null && tokenizer.vocabSize > model.vocabSize,
    `tokenizer.vocabSize=${tokenizer.vocabSize} is more than model.vocabSize=${model.vocabSize}: tokens would have no embedding`,
  )
  say(dataset.kind !== 'mock' && dataset.path === null, `dataset.path must be set for dataset.kind=${dataset.kind}`)
  say(
    dataset.kind === 'text' && tokenizer.tokenizerType !== 'HuggingFaceTokenizer',
    'dataset.kind=text needs tokenizer.tokenizerType=HuggingFaceTokenizer and tokenizer.tokenizerModel (--tokenizer DIR)',
  )
  say(
    tokenizer.tokenizerType === 'HuggingFaceTokenizer' && tokenizer.tokenizerModel === null,
    'tokenizer.tokenizerModel must name a folder for tokenizer.tokenizerType=HuggingFaceTokenizer',
  )
  const shares = dataset.split.split(',').map(Number)
  say(!((shares[0] as number) > 0), `dataset.split=${dataset.split}: the share of training data must be more than 0`)
  say(
    validation.evalIters > 0 && validation.evalInterval !== null && !((shares[1] ?? 0) > 0),
    `dataset.split=${dataset.split} leaves no validation data, but validation.evalIters=${validation.evalIters}`,
  )
  say(
    checkpoint.saveInterval !== null && checkpoint.save === null,
    'checkpoint.saveInterval is set but checkpoint.save is null',
  )
  say(
    checkpoint.exitOnMissingCheckpoint && checkpoint.load === null,
    'checkpoint.exitOnMissingCheckpoint=true but checkpoint.load is null',
  )
  say(dist.backend === 'nccl', 'dist.backend=nccl needs a build with CUDA, this one has gloo')
  return problems
}

/**
 * Checks a configuration across all fields, finalises its model and freezes it.
 * @param worldSize - ranks that run.
 * @throws ERR_CONFIG with every problem; `details.problems` is the list.
 */
export function resolve(config: RunConfig, worldSize: number): ResolvedConfig {
  const problems = configProblems(config, worldSize)
  refuseConfig(problems)
  const { model, train } = config
  const paramsDtype = dtypeOf(config.mixedPrecision, model.paramsDtype)
  try {
    model.finalize()
  } catch (error) {
    if (error instanceof ViaductError) refuseConfig([error.message])
    throw error
  }
  freezeConfig(config)
  const tp = model.tensorModelParallelSize
  const dataParallelSize = worldSize / (tp * model.pipelineModelParallelSize * model.contextParallelSize)
  const multiple = model.makeVocabSizeDivisibleBy * tp
  const { warmup, decay } = warmupOf(config)
  return {
    config,
    worldSize,
    dataParallelSize,
    numMicroBatches: train.globalBatchSize / (train.microBatchSize * dataParallelSize),
    seqLength: model.seqLength,
    vocabSize: model.vocabSize,
    paddedVocabSize: Math.ceil(model.vocabSize / multiple) * multiple,
    paramsDtype,
    lrWarmupIters: warmup,
    lrDecayIters: decay,
  }
}

/** @throws ERR_CONFIG with all problems, when there are any. */
export function refuseConfig(problems: readonly string[]): void {
  if (problems.length === 0) return
  const text =
    problems.length === 1 ? (problems[0] as string) : `${problems.length} problems:\n  ${problems.join('\n  ')}`
  throw new ViaductError('ERR_CONFIG', 'config', text as string, { problems })
}
