// Bytes on one rank: weights, gradients and optimizer state from the shards that it holds, activations from its schedule, played with
// what each chunk saves and needs (activations.ts). What is left out: some small tables, rounding, working memory of kernels.
import { dtypeBytes } from '../base/dtype.js'
import type { ResolvedConfig } from '../config/resolve.js'
import { rowCutter } from '../models/layoutShards.js'
import { parameterTable } from '../models/parameterTable.js'
import { pipelineStages } from '../parallel/pipelineStages.js'
import { type PipelineAction, pipelineSchedule } from '../parallel/schedules.js'
import { volume } from '../tensor/region.js'
import { type ChunkActivations, chunkActivations, hiddenBytes } from './activations.js'
import { activationsAndUnits } from './shardedUnits.js'

/** Bytes on one rank, by use. */
export interface MemoryUse {
  readonly weights: number
  /** Main gradients, float32. */
  readonly gradients: number
  /** Moments, and float32 masters of bfloat16 weights, but for what the host has. */
  readonly optimizer: number
  /** The most in a step beside the others; fully sharded, with the units that are whole then. */
  readonly activations: number
  /** Of the device: all of the above. */
  readonly total: number
  /** Of the host's memory: what is offloaded there, and what travels. */
  readonly host: number
}

/** Bytes that a training step needs at its peak on a rank of each pipeline stage. */
export function memoryByStage(resolved: ResolvedConfig): MemoryUse[] {
  const { model } = resolved.config
  return Array.from({ length: model.pipelineModelParallelSize }, (_, stage) => stageMemory(resolved, stage))
}

/** What the stage that needs most needs. */
export function most(stages: readonly MemoryUse[]): MemoryUse {
  return stages.reduce((largest, use) => (use.total > largest.total ? use : largest))
}

/** As memoryByStage, of one stage. */
export function stageMemory(resolved: ResolvedConfig, stage: number): MemoryUse {
  const { ddp, optimizer: settings } = resolved.config
  const { dense, experts } = localParameters(resolved, stage)
  const parameters = dense + experts
  // Parameters whose state the rank has; of experts fewer ranks have copies, or more.
  const owned = ddp.useDistributedOptimizer
    ? dense / (resolved.dataParallelSize * resolved.config.model.contextParallelSize) + experts / expertCopies(resolved)
    : parameters
  // Fully sharded, weights and gradients are those of the ranges that the rank updates. Alone it has all, as without that.
  const isFullySharded = ddp.useMegatronFsdp && owned < parameters
  const held = isFullySharded ? owned : parameters
  const weights = held * dtypeBytes(resolved.paramsDtype)
  const gradients = held * 4
  const hosted = settings.optimizerCpuOffload ? settings.optimizerOffloadFraction : 0
  const state = owned * (resolved.paramsDtype === 'float32' ? 2 * 4 : 3 * 4)
  const optimizer = (1 - hosted) * state
  const costs = chunkCosts(resolved, stage)
  const activations = isFullySharded
    ? activationsAndUnits(resolved, costs[0] as ChunkActivations)
    : stageActivations(resolved, stage, costs)
  const total = weights + gradients + optimizer + activations
  // Of the optimizer also gradients that come down and weights that go up. Activations are offloaded without a pipeline alone: one pass.
  const waiting = costs.reduce((sum, { onHost }) => sum + onHost, 0)
  const host = waiting + hosted * (state + owned * (4 + dtypeBytes(resolved.paramsDtype)))
  return { weights, gradients, optimizer, activations, total, host }
}

/** Ranks that hold the same experts: the axis edp. */
function expertCopies({ config: { model }, worldSize }: ResolvedConfig): number {
  const holders = model.expertModelParallelSize * model.expertTensorParallelSize
  return worldSize / model.pipelineModelParallelSize / holders
}

/** Parameters that a rank of the stage holds; ranks of one stage hold equally many. */
function localParameters(
  { config, worldSize, paddedVocabSize }: ResolvedConfig,
  stage: number,
): { dense: number; experts: number } {
  const { model } = config
  const rank = (stage * worldSize) / model.pipelineModelParallelSize
  const cut = rowCutter(model, model, worldSize, rank, { paddedVocab: paddedVocabSize })
  let [dense, experts] = [0, 0]
  for (const row of parameterTable(model)) {
    const count = volume(cut(row)?.localShape ?? [0])
    if (row.expert === null) dense += count
    else experts += count
  }
  return { dense, experts }
}

/** What each chunk of the stage needs for a micro-batch. */
function chunkCosts(resolved: ResolvedConfig, stage: number): ChunkActivations[] {
  const { model } = resolved.config
  const { chunks, partOf } = pipelineStages(model, model.numLayers)
  return Array.from({ length: chunks }, (_, chunk) => chunkActivations(resolved, partOf(stage, chunk)))
}

/** The most activations at any moment of the stage's part of the schedule. */
function stageActivations(resolved: ResolvedConfig, stage: number, costs: readonly ChunkActivations[]): number {
  const { model } = resolved.config
  const actions = pipelineSchedule(model.scheduleSizes(resolved.numMicroBatches))[stage] as PipelineAction[]
  let held = inFlight(resolved)
  let largest = 0
  for (const { kind, chunk } of actions) {
    const { during, change } = effect(kind, costs[chunk] as ChunkActivations)
    largest = Math.max(largest, held + during)
    held += change
  }
  return largest
}

/** Hidden states between stages: what was sent last, and what was received last, wait for their streams. */
function inFlight(resolved: ResolvedConfig): number {
  const { kind, stages } = resolved.config.model.scheduleSizes(resolved.numMicroBatches)
  if (stages === 1) return 0
  // What was received goes with its pass: where weights have one of their own, that is long after it came.
  return hiddenBytes(resolved) * (kind === 'zb-h1' ? 1 : 2)
}

/** What an action needs beside what is held before it, and what is held more after it. */
function effect(kind: PipelineAction['kind'], chunk: ChunkActivations): { during: number; change: number } {
  const { saved, deferred, forward, backward, deferring, weights } = chunk
  switch (kind) {
    case 'forward':
      return { during: saved + forward, change: saved }
    case 'backward':
      return { during: backward, change: -saved }
    case 'backwardInput':
      return { during: Math.max(backward, deferred - saved + deferring), change: deferred - saved }
    case 'backwardWeight':
      return { during: weights, change: -deferred }
  }
}
