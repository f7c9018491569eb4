// Parallel sizes, by Megatron's names in camelCase. Any layout converts (`parallelProblems`); what models in memory do not take is
// refused apart (`unrunnableProblems`). Which layers a stage has is in pipelineStages.ts, who a rank is in rankCoordinates.ts.
import { ViaductError } from '../base/errors.js'

/**
 * How attention sees the tokens of other ranks: keys and values travel round a ring; they are gathered; tokens are exchanged for heads
 * (Ulysses); exchanged among neighbours, whose groups form a ring.
 */
export type CpCommType = 'p2p' | 'all_gather' | 'a2a' | 'a2a+p2p'

export const cpCommTypes: readonly CpCommType[] = ['p2p', 'all_gather', 'a2a', 'a2a+p2p']

export interface ParallelConfig {
  /** Ranks that share each layer's matrices. Default 1. */
  tensorModelParallelSize: number
  /** Stages of layers. Default 1. */
  pipelineModelParallelSize: number
  /** Chunks of layers on each stage; null: one, or what pipelineModelParallelLayout says. */
  virtualPipelineModelParallelSize: number | null
  /** Ranks that share each sequence. Default 1. */
  contextParallelSize: number
  /** Where cp > 1. Default p2p. */
  cpCommType: CpCommType
  /** For a2a+p2p: ranks that exchange tokens for heads, and how many such groups form the ring; their product is cp. */
  hierarchicalContextParallelSizes: readonly number[] | null
  /** Ranks over which experts are distributed. Default 1. */
  expertModelParallelSize: number
  /** Ranks that share each expert's matrices. Default 1. */
  expertTensorParallelSize: number
  /** Where tp > 1: norms and dropout on a run of the tokens on each rank; zeros fill up what tp does not divide. Default false. */
  sequenceParallel: boolean
  /**
   * Where tp > 1: its gathers and sums run beside the matrix products of the linears, on a stream of their own. On CPUs the same bits
   * either way. Default null: where the ranks of tp do not share memory, since there nobody's core is free to copy meanwhile.
   */
  tpCommOverlap: boolean | null
  /** What each stage holds, in Megatron's form `Et|tt|tL`; null: blocks are spread evenly. See pipelineStages.ts. */
  pipelineModelParallelLayout: string | null
  /** Blocks of the first stage, over all its chunks; null: as many as the others. */
  numLayersInFirstPipelineStage: number | null
  /** Blocks of the last stage, over all its chunks; null: as many as the others. */
  numLayersInLastPipelineStage: number | null
  /** The embedding counts as a block when blocks are spread. */
  accountForEmbeddingInPipelineSplit: boolean
  /** The output layer and loss count as a block when blocks are spread. */
  accountForLossInPipelineSplit: boolean
}

export const defaultParallel: Readonly<ParallelConfig> = {
  tensorModelParallelSize: 1,
  pipelineModelParallelSize: 1,
  virtualPipelineModelParallelSize: null,
  contextParallelSize: 1,
  cpCommType: 'p2p',
  hierarchicalContextParallelSizes: null,
  expertModelParallelSize: 1,
  expertTensorParallelSize: 1,
  sequenceParallel: false,
  tpCommOverlap: null,
  pipelineModelParallelLayout: null,
  numLayersInFirstPipelineStage: null,
  numLayersInLastPipelineStage: null,
  accountForEmbeddingInPipelineSplit: false,
  accountForLossInPipelineSplit: false,
}

/** The parallel fields of an object that has more or fewer, with defaults for what it lacks. */
export function parallelOf(given: Partial<ParallelConfig>): ParallelConfig {
  const keys = Object.keys(defaultParallel) as (keyof ParallelConfig)[]
  return { ...defaultParallel, ...Object.fromEntries(keys.flatMap((key) => (key in given ? [[key, given[key]]] : []))) }
}

const sizes = [
  ['tp', 'tensorModelParallelSize'],
  ['pp', 'pipelineModelParallelSize'],
  ['vpp', 'virtualPipelineModelParallelSize'],
  ['cp', 'contextParallelSize'],
  ['ep', 'expertModelParallelSize'],
  ['etp', 'expertTensorParallelSize'],
] as const

/** A layout in few words, e.g. `tp 2, pp 4`; what is 1 is left out, but for tp. */
export function describeParallel(parallel: ParallelConfig): string {
  const named = sizes.filter(([name, key]) => name === 'tp' || (parallel[key] ?? 1) > 1)
  const stages = parallel.pipelineModelParallelLayout
  return [...named.map(([name, key]) => `${name} ${parallel[key]}`), ...(stages === null ? [] : [stages])].join(', ')
}

/** How many ranks of cp exchange tokens for heads, and how many a ring has; both 1: keys and values are gathered. */
export function contextSizes(parallel: ParallelConfig): { readonly heads: number; readonly ring: number } {
  const { contextParallelSize: cp, cpCommType, hierarchicalContextParallelSizes: both } = parallel
  if (cpCommType === 'a2a+p2p') return { heads: both?.[0] ?? 1, ring: both?.[1] ?? cp }
  return { heads: cpCommType === 'a2a' ? cp : 1, ring: cpCommType === 'p2p' ? cp : 1 }
}

/** What is wrong with how the ranks of cp are to work together. */
function contextProblems({
  contextParallelSize: cp,
  cpCommType,
  hierarchicalContextParallelSizes: both,
}: ParallelConfig): string[] {
  if (!cpCommTypes.includes(cpCommType))
    return [`cpCommType must be one of ${cpCommTypes.join(', ')}, got ${JSON.stringify(cpCommType)}: use p2p`]
  if (cpCommType !== 'a2a+p2p')
    return both === null
      ? []
      : [`hierarchicalContextParallelSizes=${both} needs cpCommType=a2a+p2p, got ${cpCommType}: leave it out`]
  const [heads = 0, ring = 0, ...more] = both ?? []
  if (heads >= 1 && Number.isInteger(heads) && heads * ring === cp && more.length === 0) return []
  const least = Array.from({ length: cp }, (_, i) => i + 1).find((size) => size > 1 && cp % size === 0) ?? 1
  return [
    `hierarchicalContextParallelSizes must be two sizes with the product contextParallelSize=${cp} for cpCommType=a2a+p2p, ` +
      `got ${both ?? 'none'}: use ${least},${cp / least}`,
  ]
}

/** The smallest world of a layout: tp·pp·cp times the least dp that lets ep·etp divide tp·cp·dp. The sizes must be fine. */
export function smallestWorld(parallel: ParallelConfig): number {
  const inner = parallel.tensorModelParallelSize * parallel.contextParallelSize
  const experts = parallel.expertModelParallelSize * parallel.expertTensorParallelSize
  let dp = 1
  while ((inner * dp) % experts !== 0) dp++
  return inner * dp * parallel.pipelineModelParallelSize
}

/** Whether so many ranks will do. */
export type RanksWork = (worldSize: number) => boolean

/**
 * All problems of the sizes, in one list; empty when they are fine. What depends on the model is in layoutShards.ts.
 * @param worldSize - ranks that run; 0 when not known yet.
 * @param works - whether other numbers of ranks, named as a way out, suit what else is asked of them.
 */
export function parallelProblems(config: ParallelConfig, worldSize = 0, works: RanksWork = () => true): string[] {
  const problems: string[] = []
  for (const [, key] of sizes) {
    const value = config[key]
    if (value !== null && (!Number.isInteger(value) || value < 1))
      problems.push(`${key} must be a whole number of at least 1, got ${value}: use 1`)
  }
  problems.push(...contextProblems(config))
  if (problems.length > 0 || worldSize === 0) return problems
  const model = config.tensorModelParallelSize * config.pipelineModelParallelSize * config.contextParallelSize
  const experts = config.expertModelParallelSize * config.expertTensorParallelSize
  if (worldSize < model) {
    problems.push(
      `tp·pp·cp = ${model} but ${worldSize} ${worldSize === 1 ? 'rank runs' : 'ranks run'}: ` +
        `viaduct run --nproc-per-node ${model} SCRIPT; of another command --nproc-per-node ${model}`,
    )
  } else if (worldSize % model !== 0) {
    const below = worldSize - (worldSize % model)
    const near = [below, below + model].filter(works)
    const ranks = near.length > 0 ? near : [model]
    problems.push(`the ${worldSize} ranks must be a multiple of tp·pp·cp = ${model}: use ${ranks.join(' or ')} ranks`)
  } else if ((worldSize / config.pipelineModelParallelSize) % experts !== 0) {
    problems.push(
      `ep·etp = ${experts} must divide tp·cp·dp = ${worldSize / config.pipelineModelParallelSize}: ` +
        `use ${smallestWorld(config)} ranks (dp ${smallestWorld(config) / model}) or a multiple`,
    )
  }
  return problems
}

/** The layout with 1 on axes that are more. */
export function withoutAxes(config: ParallelConfig, axes: readonly (keyof ParallelConfig)[]): ParallelConfig {
  const more = axes.filter((key) => Number(config[key]) > 1)
  return { ...config, ...Object.fromEntries(more.map((key) => [key, 1])) }
}

/** What a model in memory cannot be cut into, though it converts. */
export function unrunnableProblems(config: ParallelConfig): string[] {
  const problems: string[] = []
  if (config.sequenceParallel && config.tensorModelParallelSize === 1)
    problems.push(
      'sequenceParallel=true needs tensorModelParallelSize of at least 2, got 1: it cuts the sequence over these ranks, use false',
    )
  return problems
}

/** As parallelProblems, and what training and inference do not take. */
export function runProblems(config: ParallelConfig, worldSize = 0, works?: RanksWork): string[] {
  return [...parallelProblems(config, worldSize, works), ...unrunnableProblems(config)]
}

/** @throws ERR_LAYOUT_INVALID with all problems, when there are any. */
export function refuseLayout(problems: readonly string[]): void {
  if (problems.length === 0) return
  const text = problems.length === 1 ? problems[0] : `${problems.length} problems:\n  ${problems.join('\n  ')}`
  throw new ViaductError('ERR_LAYOUT_INVALID', 'parallel', text as string, { problems })
}

/** @throws ERR_LAYOUT_INVALID with all reasons why a model cannot run like this. */
export function checkRunnable(config: ParallelConfig, worldSize = 0): void {
  refuseLayout(runProblems(config, worldSize))
}
