// Parallel sizes, by Megatron's names in camelCase. They are written once (on the provider), checked by `checkParallel`,
// and turned into groups by Mesh.create; nothing else reads them.
import { ViaductError } from '../base/errors.js'

export interface ParallelConfig {
  /** Ranks that share each layer's matrices. Default 1. */
  tensorModelParallelSize: number
  /** Stages of layers. Default 1. */
  pipelineModelParallelSize: number
  /** Chunks of layers on each stage; null: one. */
  virtualPipelineModelParallelSize: number | null
  /** Ranks that share each sequence. Default 1. */
  contextParallelSize: number
  /** Ranks over which experts are distributed. Default 1. */
  expertModelParallelSize: number
  /** Ranks that share each expert's matrices. Default 1. */
  expertTensorParallelSize: number
  /** Norms and dropout on sequence shards where tp > 1. */
  sequenceParallel: boolean
}

export const defaultParallel: Readonly<ParallelConfig> = {
  tensorModelParallelSize: 1,
  pipelineModelParallelSize: 1,
  virtualPipelineModelParallelSize: null,
  contextParallelSize: 1,
  expertModelParallelSize: 1,
  expertTensorParallelSize: 1,
  sequenceParallel: false,
}

/** Axes that are built. Others take 1 and refuse more by name. */
const unbuilt = {
  pipelineModelParallelSize: 'pipeline parallelism',
  virtualPipelineModelParallelSize: 'virtual pipeline stages',
  contextParallelSize: 'context parallelism',
  expertModelParallelSize: 'expert parallelism',
  expertTensorParallelSize: 'expert tensor parallelism',
} as const

/**
 * All problems of the sizes, in one list; empty when they are fine.
 * @param worldSize - ranks that run; 0 when not known yet.
 */
export function parallelProblems(config: ParallelConfig, worldSize = 0): string[] {
  const problems: string[] = []
  for (const key of Object.keys(defaultParallel) as (keyof ParallelConfig)[]) {
    const value = config[key]
    if (typeof value === 'boolean' || value === null) continue
    if (!Number.isInteger(value) || value < 1)
      problems.push(`${key} must be a whole number of at least 1, got ${value}`)
    else if (value > 1 && key in unbuilt) {
      problems.push(`${key}=${value}: ${unbuilt[key as keyof typeof unbuilt]} is not built yet, use 1`)
    }
  }
  if (config.sequenceParallel && config.tensorModelParallelSize > 1) {
    problems.push('sequenceParallel=true: sequence parallelism is not built yet, use false')
  }
  if (problems.length === 0 && worldSize > 0) {
    const model = config.tensorModelParallelSize * config.pipelineModelParallelSize * config.contextParallelSize
    if (worldSize < model) {
      problems.push(
        `tp·pp·cp = ${model} but ${worldSize} ${worldSize === 1 ? 'rank runs' : 'ranks run'}: ` +
          `viaduct run --nproc-per-node ${model} SCRIPT`,
      )
    } else if (worldSize % model !== 0) {
      problems.push(`the ${worldSize} ranks must be a multiple of tp·pp·cp = ${model}`)
    }
  }
  return problems
}

/** @throws ERR_LAYOUT_INVALID with all problems. */
export function checkParallel(config: ParallelConfig, worldSize = 0): void {
  const problems = parallelProblems(config, worldSize)
  if (problems.length > 0) throw new ViaductError('ERR_LAYOUT_INVALID', 'parallel', problems.join('; '), { problems })
}
