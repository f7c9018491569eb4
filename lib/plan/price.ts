// The price of a run, told before step 1: parameters, memory of a rank, time of a step and of the whole. The rate of arithmetic is
// measured on the spot with one matmul; what cannot fit is refused before memory is taken, with a way out.
import { readFileSync } from 'node:fs'
import { freemem } from 'node:os'
import { native } from '../addon/load.js'
import { ViaductError } from '../base/errors.js'
import type { ResolvedConfig } from '../config/resolve.js'
import { bubbleFormula } from '../parallel/schedules.js'
import { Ctx } from '../tensor/ctx.js'
import type { Device } from '../tensor/device.js'
import { Scope } from '../tensor/scope.js'
import { Tensor } from '../tensor/tensor.js'
import { parameterCount, trainingFlopsPerToken } from './cost.js'
import { type MemoryUse, memoryByStage, most } from './memory.js'

/** What a run will cost. */
export interface Price {
  /** Parameters of the logical model. */
  readonly parameters: number
  /** Bytes on one rank at the peak of a step, on each pipeline stage. */
  readonly memoryByStage: readonly MemoryUse[]
  /** The same on the stage that needs most. */
  readonly memory: MemoryUse
  /** Floating-point operations of a step, over all ranks. */
  readonly flopsPerStep: number
  /** Measured matmul rate of one rank in FLOP/s, in the run's dtype; null where it was not measured. */
  readonly peakFlops: number | null
  /** Predicted seconds a step; null without a measured rate. */
  readonly secondsPerStep: number | null
}

/** Share of the matmul rate that a whole training step reaches; norms, softmax and the optimizer take the rest. */
const stepShare = 0.6

/** Predicts memory, work and time. */
export function priceOf(resolved: ResolvedConfig, peakFlops: number | null): Price {
  const { model, train } = resolved.config
  const tokens = train.globalBatchSize * resolved.seqLength
  const flopsPerStep = tokens * trainingFlopsPerToken(model, resolved.seqLength, resolved.paddedVocabSize)
  // Backward costs twice the forward pass, a half for each gradient.
  const equal = { forward: 1, backwardInput: 1, backwardWeight: 1 }
  const bubble = bubbleFormula(model.scheduleSizes(resolved.numMicroBatches), equal)
  const stages = memoryByStage(resolved)
  return {
    parameters: parameterCount(model),
    memoryByStage: stages,
    memory: most(stages),
    flopsPerStep,
    peakFlops,
    secondsPerStep:
      peakFlops === null ? null : ((1 + bubble) * flopsPerStep) / (peakFlops * stepShare * resolved.worldSize),
  }
}

/** How often, and for how long at most, the matmul is timed: another program may hold the cores for a moment. */
const rounds = { least: 3, most: 12, milliseconds: 250 }

/** FLOP/s of a square matmul of 768 on this device, in the run's dtype: the best of several rounds after a first one. */
export async function measurePeakFlops(device: Device, dtype: 'float32' | 'bfloat16'): Promise<number> {
  const n = 768
  const scope = new Scope()
  try {
    const ctx = Ctx.create({ device, scope })
    const a = Tensor.full(ctx, [n, n], dtype, 0.5)
    const b = Tensor.full(ctx, [n, n], dtype, 0.25)
    const y = Tensor.empty(ctx, [n, n], dtype)
    let best = Number.POSITIVE_INFINITY
    const begun = performance.now()
    for (let i = 0; i <= rounds.most; i++) {
      if (i > rounds.least && performance.now() - begun > rounds.milliseconds) break
      await device.stream.sync()
      const started = performance.now()
      native.matmul(ctx.stream.id, y.handle, a.handle, b.handle, 0, false, true, false)
      await device.stream.sync()
      if (i > 0) best = Math.min(best, performance.now() - started)
    }
    return (2 * n ** 3) / (best / 1000)
  } finally {
    scope.close()
  }
}

/** Bytes that this machine can still give: MemAvailable where the system tells it. */
export function availableMemory(): number {
  try {
    const line = /^MemAvailable:\s+(\d+) kB$/m.exec(readFileSync('/proc/meminfo', 'utf8'))
    if (line !== null) return Number(line[1]) * 1024
  } catch {
    // No such file on this system: the free memory is all that is known.
  }
  return freemem()
}

const gigabytes = (bytes: number) =>
  bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(bytes < 1e10 ? 2 : 1)} GB`

const offloaded = ({ host }: MemoryUse) => (host > 0 ? `; offloaded to the host ${gigabytes(host)}` : '')

/**
 * Refuses a run that cannot fit.
 * @param ranks - how many run on this machine.
 * @param available - bytes that they have together.
 * @throws ERR_OUT_OF_MEMORY with what is wanted, what is there and what to do.
 */
export function checkFits(resolved: ResolvedConfig, price: Price, ranks: number, available: number): void {
  const { memory, memoryByStage } = price
  // On CPUs what is offloaded lies in the same memory. Of a part of the ranks it is not known which stages they are.
  const needs = ({ total, host }: MemoryUse) => total + host
  const wanted =
    ranks === resolved.worldSize
      ? memoryByStage.reduce((sum, use) => sum + needs(use), 0) * (ranks / memoryByStage.length)
      : needs(memory) * ranks
  if (wanted <= available) return
  const { model, train, ddp } = resolved.config
  const advice: string[] = []
  if (resolved.dataParallelSize > 1 && !ddp.useDistributedOptimizer) advice.push('ddp.useDistributedOptimizer=true')
  else if (resolved.dataParallelSize > 1 && !ddp.useMegatronFsdp && model.pipelineModelParallelSize === 1)
    advice.push('ddp.useMegatronFsdp=true')
  if (memory.activations > memory.total / 3) {
    if (model.recomputeGranularity === null) advice.push('model.recomputeGranularity=full')
    if (train.microBatchSize > 1) advice.push('a smaller train.microBatchSize')
    advice.push('a smaller model.seqLength')
  }
  advice.push('more tensor-parallel ranks on more machines', 'a smaller recipe: llama_tiny_cpu_pretrain_config')
  throw new ViaductError(
    'ERR_OUT_OF_MEMORY',
    'plan',
    `expected at most ${gigabytes(available)}, this run needs ${gigabytes(wanted)} on this machine (${ranks} ${ranks === 1 ? 'rank' : 'ranks'} of up to ` +
      `${gigabytes(needs(memory))}: weights ${gigabytes(memory.weights)}, gradients ${gigabytes(memory.gradients)}, optimizer ` +
      `${gigabytes(memory.optimizer)}, activations ${gigabytes(memory.activations)}${offloaded(memory)}): use ${advice.join(', ')}`,
    { wanted, available, ranks, memory },
  )
}

/** The price as lines for people. */
export function describePrice(resolved: ResolvedConfig, price: Price, stepsLeft: number, now = new Date()): string[] {
  const { config, worldSize, dataParallelSize, numMicroBatches, seqLength } = resolved
  const { train, model, ddp } = config
  const { memory, memoryByStage } = price
  const millions = (price.parameters / 1e6).toFixed(price.parameters < 1e7 ? 2 : 0)
  const replaced =
    model.paramsDtype === resolved.paramsDtype
      ? []
      : [
          `note        mixedPrecision=${config.mixedPrecision} computes in ${resolved.paramsDtype}, not in model.paramsDtype=${model.paramsDtype}`,
        ]
  const { kind, stages, chunks } = model.scheduleSizes(numMicroBatches)
  const pipeline = stages === 1 ? '' : `pp ${stages} (${kind}${chunks > 1 ? `, ${chunks} chunks each` : ''}), `
  const { contextParallelSize: cp, expertModelParallelSize: ep, expertTensorParallelSize: etp } = model
  const sizes = model.cpCommType === 'a2a+p2p' ? ` ${model.hierarchicalContextParallelSizes}` : ''
  const context = cp > 1 ? `cp ${cp} (${model.cpCommType}${sizes}), ` : ''
  const experts = `${ep > 1 ? `, ep ${ep}` : ''}${etp > 1 ? `, etp ${etp}` : ''}`
  const ofStage = stages === 1 ? '' : ` of stage ${memoryByStage.indexOf(memory)}, which needs most`
  const lines = [
    ...replaced,
    `model       ${millions} M parameters, ${resolved.paramsDtype}, ${model.numLayers} layers of ${model.hiddenSize}, vocabulary ${model.vocabSize} (${resolved.paddedVocabSize} in memory)`,
    `layout      ${worldSize} ${worldSize === 1 ? 'rank' : 'ranks'}: tp ${model.tensorModelParallelSize}, ${context}${pipeline}dp ${dataParallelSize}${experts}${model.sequenceParallel && model.tensorModelParallelSize > 1 ? ', sequence parallelism' : ''}${ddp.useMegatronFsdp ? ', fully sharded' : ''}`,
    `batch       ${train.globalBatchSize} × ${seqLength} tokens a step: ${numMicroBatches} micro-${numMicroBatches === 1 ? 'batch' : 'batches'} of ${train.microBatchSize} a rank`,
    `memory      ${gigabytes(memory.total)} a rank${ofStage}: weights ${gigabytes(memory.weights)}, gradients ${gigabytes(memory.gradients)}, optimizer ${gigabytes(memory.optimizer)}, activations ${gigabytes(memory.activations)}${offloaded(memory)}`,
  ]
  if (price.secondsPerStep !== null && price.peakFlops !== null) {
    const left = price.secondsPerStep * stepsLeft
    const end = new Date(now.getTime() + left * 1000)
    const at = Number.isFinite(end.getTime())
      ? `, end about ${end.toISOString().slice(0, 16).replace('T', ' ')} UTC`
      : ''
    lines.push(
      `time        about ${duration(price.secondsPerStep)} a step at ${(price.peakFlops / 1e9).toFixed(0)} GFLOP/s measured a rank, ${duration(left)} for ${stepsLeft} steps${at}`,
    )
  }
  return lines
}

function duration(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(0)} days`
}
