// A checkpoint as a conversion's target: which rank of a layout writes which piece at which byte, from the table of parameters
// alone. Every process comes to the same answer. Where the bytes come from is the caller's.

import { join } from 'node:path'
import { type DType, dtypes } from '../../base/dtype.js'
import {
  cutBox,
  formatIndex,
  type IndexedTensor,
  indexName,
  type Piece,
  pieceFile,
  pieceKey,
} from '../../checkpoint/checkpointIndex.js'
import { writeFlushed } from '../../io/atomic.js'
import type { FileTensor } from '../../io/blocks.js'
import { encodeHeader, type SafetensorsHeader } from '../../io/safetensorsHeader.js'
import { layoutProblems, type RowCutter, rowCutter } from '../../models/layoutShards.js'
import type { ParameterRow } from '../../models/parameterTable.js'
import type { TransformerConfig } from '../../models/transformerConfig.js'
import { type ParallelConfig, parallelOf, refuseLayout, smallestWorld } from '../../parallel/config.js'
import { volume } from '../../tensor/region.js'

/** The layout of a checkpoint that is made without its ranks. */
export interface Layout {
  readonly parallel: ParallelConfig
  /** Ranks, each with a file of its own. */
  readonly worldSize: number
}

/** Layout options of a conversion: Megatron's sizes, each 1 by default. */
export interface LayoutOptions extends Partial<ParallelConfig> {
  /** Ranks of the layout. Default: the processes that take part where there are several, else the least that the sizes need. */
  readonly worldSize?: number
}

/** @throws ERR_LAYOUT_INVALID naming every problem. */
export function layoutOf(config: TransformerConfig, options: LayoutOptions, processes: number): Layout {
  const parallel = parallelOf(options)
  const given = options.worldSize ?? (processes > 1 ? processes : 0)
  refuseLayout(layoutProblems(config, parallel, given))
  return { parallel, worldSize: given === 0 ? smallestWorld(parallel) : given }
}

/** A tensor to be cut and written. */
export interface PieceTensor {
  readonly name: string
  readonly dtype: DType
  readonly row: ParameterRow
}

/** A piece with its place. */
export interface TargetPiece {
  readonly tensor: PieceTensor
  readonly rank: number
  readonly key: string
  readonly start: readonly number[]
  readonly size: readonly number[]
  readonly bytes: number
  /** In the unfinished folder. */
  readonly place: (output: string) => FileTensor
}

/** Files and pieces of a checkpoint; pieces by rank and place. */
export interface CheckpointTarget {
  readonly files: readonly { readonly name: string; readonly header: SafetensorsHeader }[]
  readonly pieces: readonly TargetPiece[]
}

type Claim = Omit<TargetPiece, 'place'>

/** Cuts tensors for a layout. A box that several ranks hold (data-parallel copies) goes to the one with least to write. */
export function planPieces(
  tensors: Iterable<PieceTensor>,
  config: TransformerConfig,
  layout: Layout,
): CheckpointTarget {
  const { parallel, worldSize } = layout
  const cutters = Array.from({ length: worldSize }, (_, rank) => rowCutter(config, parallel, worldSize, rank))
  const load = new Float64Array(worldSize)
  const claims = Array.from({ length: worldSize }, (): Claim[] => [])
  for (const tensor of tensors) {
    for (const { start, size, ranks } of boxesOf(tensor.row, cutters)) {
      for (const box of cutBox(tensor.dtype, start, size)) {
        const rank = ranks.reduce((best, r) => ((load[r] as number) < (load[best] as number) ? r : best))
        const bytes = (volume(box.size) * dtypes[tensor.dtype].bits) / 8
        load[rank] = (load[rank] as number) + bytes
        const key = pieceKey(tensor.name, tensor.row.shape, box.start, box.size)
        claims[rank]?.push({ tensor, rank, key, ...box, bytes })
      }
    }
  }
  const files: { name: string; header: SafetensorsHeader }[] = []
  const pieces: TargetPiece[] = []
  claims.forEach((list, rank) => {
    if (list.length === 0) return
    const name = pieceFile(rank, worldSize)
    const header = encodeHeader(list.map(({ tensor, key, size }) => ({ name: key, dtype: tensor.dtype, shape: size })))
    files.push({ name, header })
    const byKey = new Map(list.map((claim) => [claim.key, claim]))
    for (const { name: key, begin } of header.entries.values()) {
      const claim = byKey.get(key) as Claim
      const offset = header.bytes.length + begin
      pieces.push({
        ...claim,
        place: (output) => ({ path: join(output, name), offset, dtype: claim.tensor.dtype, shape: claim.size }),
      })
    }
  })
  return { files, pieces }
}

interface Box {
  readonly start: readonly number[]
  readonly size: readonly number[]
  readonly ranks: number[]
}

/** The boxes of a tensor that some rank owns, with all ranks that do. */
function boxesOf(row: ParameterRow, cutters: readonly RowCutter[]): Iterable<Box> {
  const boxes = new Map<string, Box>()
  cutters.forEach((cut, rank) => {
    for (const block of cut(row)?.blocks ?? []) {
      if (block.replica !== 0) continue
      const key = block.globalStart.join()
      const known = boxes.get(key)
      if (known) known.ranks.push(rank)
      else boxes.set(key, { start: block.globalStart, size: block.size, ranks: [rank] })
    }
  })
  return boxes.values()
}

/** Writes index.json. @param xxh3 - by piece. */
export async function writeIndex(
  output: string,
  iteration: number,
  { pieces }: CheckpointTarget,
  worldSize: number,
  xxh3: readonly string[],
): Promise<void> {
  const index = new Map<string, IndexedTensor & { pieces: Piece[] }>()
  pieces.forEach(({ tensor, rank, key, start, size }, i) => {
    const entry = index.get(tensor.name) ?? { dtype: tensor.dtype, shape: tensor.row.shape, pieces: [] }
    index.set(tensor.name, entry)
    entry.pieces.push({ file: pieceFile(rank, worldSize), key, start, size, xxh3: xxh3[i] as string })
  })
  await writeFlushed(join(output, indexName), formatIndex(iteration, index))
}
