// Cuts logical parameters into the shards of a rank, in any layout. Rows come from parameterTable.ts, sizes from ParallelConfig; no
// model, no group, no file is needed. The axes of gradient sums are explained in docs/runtime.md, section 7.
import {
  contextSizes,
  type ParallelConfig,
  parallelProblems,
  type RanksWork,
  refuseLayout,
  unrunnableProblems,
  withoutAxes,
} from '../parallel/config.js'
import { pipelineProblems, pipelineStages } from '../parallel/pipelineStages.js'
import { rankCoordinates } from '../parallel/rankCoordinates.js'
import { type CopiesAxis, replicated, rowRuns, type ShardSpec, splitDim } from '../tensor/shardSpec.js'
import { type ParameterRow, parameterTable } from './parameterTable.js'
import type { TransformerConfig } from './transformerConfig.js'

/** Fields of the config that are widths of matrices, for messages. */
const widths = ['ffnHiddenSize', 'moeSharedExpertIntermediateSize', 'moeFfnHiddenSize'] as const

/** What a cut divides evenly over the ranks, by matrices; heads are checked apart. */
function cutWidth({ cut, shape }: ParameterRow): number | null {
  if (cut === 'gated') return (shape[0] as number) / 2
  if (cut === 'column') return shape[0] as number
  return cut === 'row' ? (shape[1] as number) : null
}

const divisors = (n: number) => Array.from({ length: n }, (_, i) => i + 1).filter((d) => n % d === 0)

/** Widths of matrices that a size must divide, each with a name for it. */
function widthsOf(rows: readonly ParameterRow[], config: TransformerConfig): Map<number, string> {
  const found = new Map<number, string>()
  for (const row of rows) {
    const width = cutWidth(row)
    if (width === null || found.has(width)) continue
    const names = row.expert === null ? widths : widths.toReversed()
    found.set(width, names.find((name) => config[name] === width) ?? `the width of ${row.name}`)
  }
  return found
}

/** Sizes that work; of many the smallest. */
const choices = (sizes: readonly number[]) => `use ${sizes.slice(0, 12).join(', ')}`

/** What about a tensor-parallel size does not fit this config; empty when it fits. */
export function tensorParallelProblems(config: TransformerConfig, tp: number): string[] {
  const { numAttentionHeads: heads, numQueryGroups: groups } = config
  // What is as wide as the heads, which are looked at.
  const byHeads = /\.(?:linear_proj\.weight|softmax_offset)$/
  const dense = parameterTable(config).filter((row) => row.expert === null && !byHeads.test(row.name))
  const dividends = widthsOf(dense, config)
  const problemsOf = (size: number): string[] => [
    ...(heads % size === 0 ? [] : [`must divide numAttentionHeads=${heads}`]),
    ...(groups % size === 0 || size % groups === 0
      ? []
      : [`must divide numQueryGroups=${groups} or be a multiple of it`]),
    ...[...dividends].flatMap(([width, name]) => (width % size === 0 ? [] : [`must divide ${name}=${width}`])),
  ]
  const problems = problemsOf(tp)
  if (problems.length === 0) return []
  const works = choices(divisors(heads).filter((size) => problemsOf(size).length === 0))
  return problems.map((problem) => `tensorModelParallelSize ${problem}, got ${tp}: ${works}`)
}

function expertProblems(config: TransformerConfig, parallel: ParallelConfig): string[] {
  const { expertModelParallelSize: ep, expertTensorParallelSize: etp } = parallel
  const experts = parameterTable(config).filter((row) => row.expert !== null)
  if (experts.length === 0) {
    const given = [
      ['expertModelParallelSize', ep],
      ['expertTensorParallelSize', etp],
    ] as const
    return given.flatMap(([key, size]) => (size > 1 ? [`${key}=${size}: the model has no experts, use 1`] : []))
  }
  const count = expertCount(experts)
  const problems =
    count % ep === 0
      ? []
      : [`expertModelParallelSize must divide the ${count} experts, got ${ep}: use ${divisors(count).join(', ')}`]
  const dividends = widthsOf(experts, config)
  const works = divisors(Math.min(...dividends.keys())).filter((size) =>
    [...dividends.keys()].every((width) => width % size === 0),
  )
  for (const [width, name] of dividends)
    if (width % etp !== 0)
      problems.push(`expertTensorParallelSize must divide ${name}=${width}, got ${etp}: ${choices(works)}`)
  return problems
}

const expertCount = (rows: readonly ParameterRow[]) =>
  rows.reduce((most, { expert }) => Math.max(most, (expert ?? -1) + 1), 0)

/**
 * Everything about a layout that does not fit a model, all together, each with what would; empty when it fits.
 * @param worldSize - ranks that run; 0 when not known yet.
 */
export function layoutProblems(
  config: TransformerConfig,
  parallel: ParallelConfig,
  worldSize = 0,
  works?: RanksWork,
): string[] {
  const sizes = parallelProblems(parallel, worldSize, works)
  if (parallelProblems(parallel).length > 0) return sizes
  return [
    ...sizes,
    ...tensorParallelProblems(config, parallel.tensorModelParallelSize),
    ...expertProblems(config, parallel),
    ...pipelineProblems(parallel, config.numLayers),
  ]
}

/** As layoutProblems, for a model that is to run. */
export function runnableProblems(
  config: TransformerConfig,
  parallel: ParallelConfig,
  worldSize = 0,
  works?: RanksWork,
): string[] {
  const dense = parameterTable(config).every((row) => row.expert === null)
  const noExperts = dense ? expertProblems(config, parallel) : trainingProblems(config, parallel)
  const rest = dense ? withoutAxes(parallel, ['expertModelParallelSize', 'expertTensorParallelSize']) : parallel
  return [
    ...layoutProblems(config, rest, worldSize, works),
    ...noExperts,
    ...headExchangeProblems(config, rest),
    ...unrunnableProblems(rest),
  ]
}

/** Ranks of cp that exchange tokens for heads need heads to share out. */
function headExchangeProblems(config: TransformerConfig, parallel: ParallelConfig): string[] {
  const { heads } = contextSizes(parallel)
  const groups = Math.max(1, config.numQueryGroups / parallel.tensorModelParallelSize)
  if (!Number.isInteger(groups) || groups % heads === 0) return []
  const { contextParallelSize: cp, cpCommType } = parallel
  const what = `must share out the ${groups} key and value heads that a rank of tp has, got ${heads} ranks`
  const most = divisors(groups).findLast((size) => cp % size === 0) as number
  return cpCommType === 'a2a'
    ? [`cpCommType=a2a ${what}: use p2p`]
    : [`hierarchicalContextParallelSizes ${what}: use ${most},${cp / most}`]
}

/** What a model with experts cannot be run in, though it converts. */
function trainingProblems(config: TransformerConfig, parallel: ParallelConfig): string[] {
  const { tensorModelParallelSize: tp, sequenceParallel } = parallel
  const spans = config.qkLayernorm === 'allHeads' && tp > config.numQueryGroups
  return [
    ...(tp > 1 && !sequenceParallel
      ? [
          `sequenceParallel must be true where tensorModelParallelSize=${tp} and the model has experts: each rank routes its own tokens`,
        ]
      : []),
    ...(spans
      ? [
          `tensorModelParallelSize=${tp} must be at most numQueryGroups=${config.numQueryGroups}: the norms of queries and keys span all heads`,
        ]
      : []),
  ]
}

/** A parameter and the part of it that a rank holds. */
export interface RankShard {
  readonly row: ParameterRow
  readonly shard: ShardSpec
}

/**
 * The part of a parameter that one rank of a world holds; null where it holds none. Of copies along tp (of an expert: etp) and of
 * a tied embedding's copy on the last stage, one has replica 0; copies along dp, cp and edp all have, and are shared out by who
 * saves.
 * @throws ERR_LAYOUT_INVALID when the layout does not fit; see layoutProblems.
 */
export function shardOn(
  row: ParameterRow,
  config: TransformerConfig,
  parallel: ParallelConfig,
  worldSize: number,
  rank: number,
): ShardSpec | null {
  return rowCutter(config, parallel, worldSize, rank)(row)
}

/** All parts that one rank of a world holds, in the order of the model. @throws as shardOn */
export function rankShards(
  config: TransformerConfig,
  parallel: ParallelConfig,
  worldSize: number,
  rank: number,
): RankShard[] {
  const cut = rowCutter(config, parallel, worldSize, rank)
  return parameterTable(config).flatMap((row) => {
    const shard = cut(row)
    return shard === null ? [] : [{ row, shard }]
  })
}

/** Axes along which copies of the model's parameters lie. */
export function copiesAxes({ numMoeExperts }: TransformerConfig): CopiesAxis[] {
  return numMoeExperts === null ? ['dp_cp'] : ['dp_cp', 'edp']
}

/** The part of a parameter that a certain rank holds. */
export type RowCutter = (row: ParameterRow) => ShardSpec | null

/** shardOn for many parameters: what depends on the rank alone is worked out once. @throws as shardOn */
export function rowCutter(
  config: TransformerConfig,
  parallel: ParallelConfig,
  worldSize: number,
  rank: number,
  options: Pick<CutOptions, 'paddedVocab'> = {},
): RowCutter {
  refuseLayout(layoutProblems(config, parallel, worldSize))
  const at = rankCoordinates(parallel, worldSize, rank)
  const stages = pipelineStages(parallel, config.numLayers)
  const tp = { rank: at.tp, size: parallel.tensorModelParallelSize }
  const etp = { rank: at.etp, size: parallel.expertTensorParallelSize }
  const perRank = expertCount(parameterTable(config)) / parallel.expertModelParallelSize
  const last = stages.placeOf('final').stage
  const tied = config.shareEmbeddingsAndOutputWeights && last !== 0
  return (row) => {
    const isHere = stages.placeOf(row.layer).stage === at.pp
    if (row.expert !== null) {
      const isOurs = isHere && Math.floor(row.expert / perRank) === at.ep
      return isOurs ? { ...shardOf(row, config, etp), copies: 'edp' } : null
    }
    const isTied = tied && row.layer === 'embedding'
    if (!isHere && !(isTied && at.pp === last)) return null
    const shard = shardOf(row, config, tp, { ...options, sequenceParallel: parallel.sequenceParallel })
    return isTied ? onBothEnds(shard, isHere ? 0 : 1) : shard
  }
}

/** A tied embedding: the first stage owns it, the last computes logits with a copy, both see a part of the gradient. */
function onBothEnds(shard: ShardSpec, copy: 0 | 1): ShardSpec {
  const blocks = shard.blocks.map((block) => ({
    ...block,
    replica: block.replica + copy,
    gradSum: [...block.gradSum, 'embd'],
  }))
  return { ...shard, blocks }
}

export interface CutOptions {
  /** Rows of the padded vocabulary in memory; default: the least multiple of tp. */
  readonly paddedVocab?: number | undefined
  /** Each rank sees a part of the sequence in norms and dropout. Default false. */
  readonly sequenceParallel?: boolean
}

/**
 * The shard of one tensor-parallel rank (of an expert: of one expert-tensor-parallel rank). The size must fit; see
 * tensorParallelProblems.
 * @param tp - the rank in its group, and the group's size.
 */
export function shardOf(
  row: ParameterRow,
  config: TransformerConfig,
  { rank, size: tp }: { readonly rank: number; readonly size: number },
  options: CutOptions = {},
): ShardSpec {
  const { shape } = row
  switch (row.cut) {
    case 'vocab':
      return splitDim(shape, 0, rank, tp, options.paddedVocab ?? Math.ceil((shape[0] as number) / tp) * tp)
    case 'column':
      return splitDim(shape, 0, rank, tp)
    case 'row':
      return splitDim(shape, 1, rank, tp)
    case 'gated': {
      const half = (shape[0] as number) / 2
      const count = half / tp
      return rowRuns(shape, [
        { start: rank * count, count },
        { start: half + rank * count, count },
      ])
    }
    case 'qkv':
      return qkvShard(shape, config, rank, tp)
    case 'heads':
      return splitDim(shape, 0, rank, tp)
    case 'kvHeads':
      return kvHeadsShard(shape, config, rank, tp)
    case 'replicated':
      return replicated(shape, { replica: rank, gradSum: options.sequenceParallel && tp > 1 ? ['tp'] : [] })
    case 'perHead':
      return replicated(shape, { replica: rank, gradSum: tp > 1 ? ['tp'] : [] })
  }
}

function qkvShard(shape: readonly number[], config: TransformerConfig, rank: number, tp: number): ShardSpec {
  const { numQueryGroups: groups, kvChannels: D } = config
  const heads = config.numAttentionHeads / groups
  const groupRows = (heads + 2) * D
  if (groups % tp === 0) {
    const count = (groups / tp) * groupRows
    return rowRuns(shape, [{ start: rank * count, count }])
  }
  // Fewer groups than ranks: each rank has a part of one group's queries and a copy of its key and value.
  const copies = tp / groups
  const start = Math.floor(rank / copies) * groupRows
  const replica = rank % copies
  const queries = (heads / copies) * D
  return rowRuns(shape, [
    { start: start + replica * queries, count: queries },
    { start: start + heads * D, count: 2 * D, replica, gradSum: ['tp_kv'] },
  ])
}

function kvHeadsShard(shape: readonly number[], config: TransformerConfig, rank: number, tp: number): ShardSpec {
  const { numQueryGroups: groups } = config
  if (groups % tp === 0) return splitDim(shape, 0, rank, tp)
  const copies = tp / groups
  const count = (shape[0] as number) / groups
  return rowRuns(shape, [
    { start: Math.floor(rank / copies) * count, count, replica: rank % copies, gradSum: ['tp_kv'] },
  ])
}
