// Cuts logical parameters into the shards of a rank. Rows come from parameterTable.ts, sizes from ParallelConfig; no model, no
// group, no file is needed. The axes of gradient sums are explained in docs/runtime.md, section 7.
import { ViaductError } from '../base/errors.js'
import { replicated, rowRuns, type ShardSpec, splitDim } from '../tensor/shardSpec.js'
import type { ParameterRow } from './parameterTable.js'
import type { TransformerConfig } from './transformerConfig.js'

/** What about a tensor-parallel size does not fit this config; empty when it fits. */
export function tensorParallelProblems(config: TransformerConfig, tp: number): string[] {
  const problems: string[] = []
  const { numAttentionHeads: heads, numQueryGroups: groups, ffnHiddenSize } = config
  const divisors = (n: number) => Array.from({ length: n }, (_, i) => i + 1).filter((d) => n % d === 0)
  if (heads % tp !== 0)
    problems.push(
      `tensorModelParallelSize must divide numAttentionHeads=${heads}, got ${tp}: use ${divisors(heads).join(', ')}`,
    )
  if (groups % tp !== 0 && tp % groups !== 0) {
    problems.push(`tensorModelParallelSize must divide numQueryGroups=${groups} or be a multiple of it, got ${tp}`)
  }
  if (ffnHiddenSize % tp !== 0)
    problems.push(`tensorModelParallelSize must divide ffnHiddenSize=${ffnHiddenSize}, got ${tp}`)
  return problems
}

export interface CutOptions {
  /** Rows of the padded vocabulary in memory; default: the least multiple of tp. */
  readonly paddedVocab?: number | undefined
  /** Each rank sees a part of the sequence in norms and dropout. Default false. */
  readonly sequenceParallel?: boolean
}

/**
 * The shard of one tensor-parallel rank.
 * @param tp - the rank in its group, and the group's size.
 * @throws ERR_LAYOUT_INVALID when tp does not fit.
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
  const problems = tensorParallelProblems(config, tp)
  if (problems.length > 0) throw new ViaductError('ERR_LAYOUT_INVALID', 'parallel', problems.join('; '), { problems })
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
