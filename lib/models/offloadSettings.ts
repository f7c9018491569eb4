// Which activations wait for the backward pass in the host's memory, by Megatron-Core's settings, and what these may be.
import type { ParallelConfig } from '../parallel/config.js'
import type { RecomputeSettings } from './recomputeSettings.js'

export interface OffloadSettings {
  /** Activations of the first cpuOffloadingNumLayers layers lie in the host's memory between their forward and their backward pass. */
  cpuOffloading: boolean
  /** At least 1 and less than numLayers. */
  cpuOffloadingNumLayers: number
  cpuOffloadingActivations: boolean
  /** Weights in the host's memory: not built. */
  cpuOffloadingWeights: boolean
}

export const defaultOffload: Readonly<OffloadSettings> = {
  cpuOffloading: false,
  cpuOffloadingNumLayers: 0,
  cpuOffloadingActivations: true,
  cpuOffloadingWeights: false,
}

/** Layers, from the first on, whose activations leave the device. */
export function offloadedLayers(settings: OffloadSettings): number {
  return settings.cpuOffloading && settings.cpuOffloadingActivations ? settings.cpuOffloadingNumLayers : 0
}

/** Everything that is wrong with the settings, each line beginning with its field. As in Megatron-Core, without pipelines and recompute. */
export function offloadProblems(
  settings: OffloadSettings & Pick<RecomputeSettings, 'recomputeGranularity'>,
  parallel: Pick<ParallelConfig, 'pipelineModelParallelSize'>,
  numLayers: number,
): string[] {
  const { cpuOffloading, cpuOffloadingNumLayers: count, cpuOffloadingActivations, cpuOffloadingWeights } = settings
  const { recomputeGranularity } = settings
  const { pipelineModelParallelSize: pp } = parallel
  const problems: string[] = []
  const say = (bad: boolean, text: string) => bad && problems.push(text)
  const flags = { cpuOffloading, cpuOffloadingActivations, cpuOffloadingWeights }
  for (const [name, value] of Object.entries(flags))
    say(typeof value !== 'boolean', `${name} must be true or false, got ${JSON.stringify(value)}`)
  const isCount = Number.isSafeInteger(count) && count >= 0
  say(!isCount, `cpuOffloadingNumLayers must be a whole number of at least 0, got ${JSON.stringify(count)}`)
  if (!cpuOffloading) {
    say(isCount && count > 0, `cpuOffloadingNumLayers=${count} needs cpuOffloading=true: set both or neither`)
    return problems
  }
  const most = numLayers - 1
  const range = most >= 1 ? `use 1 to ${most}` : 'a model of one layer has none to offload: set cpuOffloading=false'
  say(
    isCount && (count < 1 || count > most),
    `cpuOffloadingNumLayers must be at least 1 and less than numLayers=${numLayers}, got ${count}: ${range}`,
  )
  say(cpuOffloadingWeights === true, 'cpuOffloadingWeights=true is not built: set it to false')
  say(
    cpuOffloadingActivations === false,
    'cpuOffloading=true offloads nothing with cpuOffloadingActivations=false: set one of them the other way',
  )
  say(
    pp > 1,
    `cpuOffloading=true does not go with pipelineModelParallelSize=${pp}: use 1, or recomputeGranularity instead`,
  )
  say(
    recomputeGranularity !== null,
    `cpuOffloading=true does not go with recomputeGranularity=${JSON.stringify(recomputeGranularity)}: set one of them`,
  )
  return problems
}
