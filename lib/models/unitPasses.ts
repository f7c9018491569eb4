// Units of fully sharded parameters: what is gathered, and whose gradients are summed, together: each layer, and what stands before
// and behind them. Which units a pass needs, in which order, is known before it runs, and is the same on all ranks of a stage.
import type { PipelinePart } from '../parallel/pipelineStages.js'
import type { LayerRun } from './recomputeSettings.js'

/** What a pass does next with a unit. */
export interface UnitStep {
  readonly unit: string
  /** Its weights are read. */
  readonly weights: boolean
  /** Its gradients are added to. */
  readonly gradients: boolean
  /** They are needed again soon: weights that are here stay until a later step lets them go. */
  readonly stays: boolean
}

/** The weights of a model whose ranks have a part of each only, as those see them who run passes. */
export interface ShardedWeights {
  /** Weights stay from the forward pass to the backward pass. */
  readonly keepsForBackward: boolean
  /** Passes will run, in this order. */
  begin(passes: readonly (readonly UnitStep[])[]): void
  /** A pass has been enqueued. */
  endPass(): void
  /** Takes part in the next pass of the other ranks, without a micro-batch. */
  skipPass(): void
  /** All passes have been enqueued, or one has failed: nothing is whole any more. */
  end(): void
}

/** The unit of a parameter by its name. Where embeddings are tied, both ends of the model are one. */
export function unitOf(name: string, tied: boolean): string {
  const layer = /^decoder\.layers\.\d+/.exec(name)
  if (layer !== null) return layer[0]
  return tied || !name.startsWith('embedding.') ? 'output_layer' : 'embedding'
}

/** The units of a model, as the optimizer takes them. */
export const shardingUnits = (tied: boolean) => ({
  unitOf: ({ name }: { readonly name: string }) => unitOf(name, tied),
  isShared: (unit: string) => tied && unit === 'output_layer',
})

/** What a chunk of a model runs, as GPTModel says it. */
export interface PassedChunk {
  readonly part: PipelinePart
  readonly runs: readonly LayerRun[]
  readonly config: { readonly shareEmbeddingsAndOutputWeights: boolean }
}

const layerUnit = (layer: number) => `decoder.layers.${layer}`

/** Units of a chunk's forward pass. */
export function forwardUnits({ part, runs, config }: PassedChunk, stays: boolean): UnitStep[] {
  const step = (unit: string): UnitStep => ({ unit, weights: true, gradients: false, stays })
  const tied = config.shareEmbeddingsAndOutputWeights
  return [
    ...(part.hasEmbedding ? [step(unitOf('embedding.', tied))] : []),
    ...runs.flatMap(({ layers }) => layers.map((layer) => step(layerUnit(layer)))),
    ...(part.hasHead ? [step(unitOf('output_layer.', tied))] : []),
  ]
}

/** Units of its backward pass. Layers that run again are needed once more for that; the embedding's weights are not. */
export function backwardUnits({ part, runs, config }: PassedChunk, stays: boolean): UnitStep[] {
  const tied = config.shareEmbeddingsAndOutputWeights
  const step = (unit: string): UnitStep => ({ unit, weights: true, gradients: true, stays: false })
  const again = (unit: string): UnitStep => ({ unit, weights: true, gradients: false, stays })
  return [
    ...(part.hasHead ? [step(unitOf('output_layer.', tied))] : []),
    ...runs
      .toReversed()
      .flatMap((run) => [
        ...(run.again ? run.layers.map((layer) => again(layerUnit(layer))) : []),
        ...run.layers.toReversed().map((layer) => step(layerUnit(layer))),
      ]),
    ...(part.hasEmbedding ? [{ unit: unitOf('embedding.', tied), weights: false, gradients: true, stays: false }] : []),
  ]
}
