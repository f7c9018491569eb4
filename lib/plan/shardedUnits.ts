// Fully sharded parameters in the memory of a step: which units are whole while each unit of a pass runs, by playing what
// lib/optim/weightUnits.ts and unitGradients.ts do; with the activations of that moment. Without a pipeline, as they are.
import { dtypeBytes } from '../base/dtype.js'
import type { ResolvedConfig } from '../config/resolve.js'
import { rowCutter } from '../models/layoutShards.js'
import { parameterTable } from '../models/parameterTable.js'
import { layerRuns } from '../models/recomputeSettings.js'
import { backwardUnits, forwardUnits, type UnitStep, unitOf } from '../models/unitPasses.js'
import { pipelineStages } from '../parallel/pipelineStages.js'
import { volume } from '../tensor/region.js'
import type { ChunkActivations } from './activations.js'

/** Parameters that a rank computes with, by unit. */
function unitSizes({ config: { model }, worldSize, paddedVocabSize }: ResolvedConfig): Map<string, number> {
  const cut = rowCutter(model, model, worldSize, 0, { paddedVocab: paddedVocabSize })
  const sizes = new Map<string, number>()
  for (const row of parameterTable(model)) {
    const unit = unitOf(row.name, model.shareEmbeddingsAndOutputWeights)
    sizes.set(unit, (sizes.get(unit) ?? 0) + volume(cut(row)?.localShape ?? [0]))
  }
  return sizes
}

/** Units that are whole: their weights, and their gradients. */
class WholeUnits {
  readonly #weights = new Set<string>()
  #gradients: string[] = []
  /** Whose gradients are being summed. */
  #leaving: string[] = []
  #current: UnitStep | null = null

  constructor(
    readonly overlaps: { readonly weights: boolean; readonly gradients: boolean },
    readonly isShared: (unit: string) => boolean,
  ) {}

  /** @param next - whose weights are read behind it. */
  run(step: UnitStep, next: UnitStep | undefined): void {
    const { unit } = step
    if (step.weights) {
      if (this.#current !== null && this.#current.unit !== unit && !this.#current.stays)
        this.#weights.delete(this.#current.unit)
      this.#current = step
      this.#weights.add(unit)
      if (this.overlaps.weights && next !== undefined) this.#weights.add(next.unit)
    }
    if (!step.gradients || this.#gradients.includes(unit)) return
    const complete = this.#gradients.filter((other) => !this.isShared(other))
    this.#leaving = this.overlaps.gradients ? complete : []
    this.#gradients = [...this.#gradients.filter(this.isShared), unit]
  }

  endPass(): void {
    if (this.#gradients.length > 0) this.#leaving = this.overlaps.gradients ? this.#gradients.slice(-1) : []
    this.#gradients = []
  }

  bytes(size: (unit: string) => number, ofWeights: number): number {
    const sum = (units: Iterable<string>) => [...units].reduce((total, unit) => total + size(unit), 0)
    return ofWeights * sum(this.#weights) + 4 * (sum(this.#gradients) + sum(this.#leaving))
  }
}

/** The most in a step: activations of a micro-batch, and the units that are whole beside them. */
export function activationsAndUnits(resolved: ResolvedConfig, { moments }: ChunkActivations): number {
  const { model, ddp } = resolved.config
  const part = pipelineStages(model, model.numLayers).partOf(0, 0)
  const chunk = { part, runs: layerRuns(model, part), config: model }
  const sizes = unitSizes(resolved)
  const whole = new WholeUnits(
    { weights: ddp.overlapParamGather, gradients: ddp.overlapGradReduce },
    (unit) => model.shareEmbeddingsAndOutputWeights && unit === unitOf('output_layer.', true),
  )
  const stays = !ddp.reshardAfterForward
  const passes = [
    { units: forwardUnits(chunk, stays), activations: moments.forward },
    { units: backwardUnits(chunk, stays), activations: moments.backward },
  ]
  // The second micro-batch finds what the first one left; all others do too.
  const played = resolved.numMicroBatches > 1 ? [...passes, ...passes] : passes
  const reads = played.flatMap(({ units }) => units.filter(({ weights }) => weights))
  let read = 0
  let largest = 0
  for (const { units, activations } of played) {
    for (const [i, step] of units.entries()) {
      if (step.weights) read++
      const next = reads.slice(read).find(({ unit }) => unit !== step.unit)
      whole.run(step, next)
      const bytes = whole.bytes((unit) => sizes.get(unit) ?? 0, dtypeBytes(resolved.paramsDtype))
      largest = Math.max(largest, bytes + (activations[i] as number))
    }
    whole.endPass()
  }
  return largest
}
