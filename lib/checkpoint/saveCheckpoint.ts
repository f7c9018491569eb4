// Saving: every rank writes the pieces that it owns into its own file; rank 0 adds the index and everything else, then the
// folder gets its name in one step and the tracker moves last. Killed at any instant, the old or the new checkpoint is complete.
import { join } from 'node:path'
import type { DType } from '../base/dtype.js'
import { stopIfAborted, ViaductError } from '../base/errors.js'
import { flush, writeFileAtomic, writeFlushed } from '../io/atomic.js'
import { createFile, type FileTensor, hashRange, settleAll, writeRegion } from '../io/blocks.js'
import { encodeHeader } from '../io/safetensorsHeader.js'
import { tilingFault, volume } from '../tensor/region.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import {
  cutBox,
  formatIndex,
  type IndexedTensor,
  indexName,
  iterationFolder,
  type Piece,
  pieceFile,
  pieceKey,
  trackerName,
} from './checkpointIndex.js'
import { growTogether, onFirst, type Ranks, solo, together } from './ranks.js'

/** A logical tensor of which this rank holds a shard. */
export interface SavedTensor {
  /** Megatron's name, or `optimizer.<slot>.<name>`. */
  readonly name: string
  /** Dtype in the file. */
  readonly dtype: DType
  readonly shard: ShardSpec
  /** The local shard. */
  readonly data: Tensor
}

export interface SaveOptions {
  readonly ranks?: Ranks
  /** Text files of the iter_* folder, e.g. `train_state.json`, `run_config.yaml`; rank 0's count. */
  readonly files?: Readonly<Record<string, string>>
  /** Writes more into the unfinished folder, on rank 0: the Hugging Face files. */
  readonly extras?: (folder: string) => Promise<void>
  readonly signal?: AbortSignal
}

/**
 * Saves a checkpoint `dir/iter_XXXXXXX`; every rank calls it with its shards. Replicas are written once. Tensors must not
 * change meanwhile, and their streams must have been waited for.
 * @returns the iter_* folder.
 * @throws ERR_NO_SPACE, ERR_IO: nothing new is left then, the former checkpoint is as it was. On all ranks.
 */
export async function saveCheckpoint(
  dir: string,
  iteration: number,
  tensors: Iterable<SavedTensor>,
  options: SaveOptions = {},
): Promise<string> {
  const ranks = options.ranks ?? solo
  const target = join(dir, iterationFolder(iteration))
  const anyTarget = async () => {}
  await growTogether(ranks, target, anyTarget, async (folder, commit) => {
    const index = await writePieces(folder, [...tensors], ranks, options.signal)
    await onFirst(ranks, async () => {
      for (const [name, text] of Object.entries(options.files ?? {})) await writeFlushed(join(folder, name), text)
      await options.extras?.(folder)
      await writeFlushed(join(folder, indexName), formatIndex(iteration, index))
      stopIfAborted(options.signal, 'checkpoint')
      await commit()
      await writeFileAtomic(join(dir, trackerName), `${iteration}\n`)
    })
  })
  return target
}

interface Claim {
  readonly name: string
  readonly dtype: DType
  readonly shape: readonly number[]
  readonly start: readonly number[]
  readonly size: readonly number[]
}

const claimKey = (c: Claim) => `${c.name}@${c.start.join()}`

/** Who writes what: the same answer on every rank. A box that several ranks own (data-parallel copies) goes to the one with least. */
function assign(claims: readonly (readonly Claim[])[]): Map<string, number> {
  const holders = new Map<string, { claim: Claim; ranks: number[] }>()
  claims.forEach((list, rank) => {
    for (const claim of list) {
      const key = claimKey(claim)
      const entry = holders.get(key)
      if (entry === undefined) holders.set(key, { claim, ranks: [rank] })
      else if (entry.claim.size.join() === claim.size.join()) entry.ranks.push(rank)
      else
        throw new ViaductError(
          'ERR_ASSERT',
          'checkpoint',
          `ranks ${entry.ranks[0]} and ${rank} own different boxes of ${claim.name} at [${claim.start}]`,
        )
    }
  })
  const load = claims.map(() => 0)
  const writers = new Map<string, number>()
  for (const [key, { claim, ranks }] of holders) {
    const writer = ranks.reduce((best, rank) => ((load[rank] as number) < (load[best] as number) ? rank : best))
    load[writer] = (load[writer] as number) + volume(claim.size)
    writers.set(key, writer)
  }
  return writers
}

async function writePieces(
  folder: string,
  tensors: readonly SavedTensor[],
  ranks: Ranks,
  signal: AbortSignal | undefined,
): Promise<Map<string, IndexedTensor>> {
  const owned = tensors.flatMap((tensor) =>
    tensor.shard.blocks
      .filter((block) => block.replica === 0)
      .flatMap((block) =>
        cutBox(tensor.dtype, block.globalStart, block.size).map(({ start, size }) => ({
          tensor,
          local: block.localStart.map((at, d) => at + (start[d] as number) - (block.globalStart[d] as number)),
          claim: { name: tensor.name, dtype: tensor.dtype, shape: tensor.shard.logicalShape, start, size },
        })),
      ),
  )
  const claims = await together(ranks, async () => owned.map((o) => o.claim))
  const writers = assign(claims)
  const mine = owned.filter((o) => writers.get(claimKey(o.claim)) === ranks.rank)

  const hashes = await together(ranks, async () => {
    if (mine.length === 0) return {}
    const header = encodeHeader(
      mine.map(({ claim }) => ({ name: keyOf(claim), dtype: claim.dtype, shape: claim.size })),
    )
    const path = join(folder, pieceFile(ranks.rank, ranks.size))
    await createFile(path, header.fileBytes, header.bytes)
    const found: Record<string, string> = {}
    const start = header.bytes.length
    await settleAll(
      mine.map(async ({ tensor, local, claim }) => {
        stopIfAborted(signal, 'checkpoint')
        const entry = header.entries.get(keyOf(claim)) as { begin: number; end: number }
        const place: FileTensor = { path, offset: start + entry.begin, dtype: claim.dtype, shape: claim.size }
        await writeRegion(tensor.data, place, { from: local, to: claim.size.map(() => 0), size: claim.size })
        found[claimKey(claim)] = await hashRange(path, place.offset, entry.end - entry.begin, signal)
      }),
    )
    await flush(path)
    return found
  })

  const index = new Map<string, IndexedTensor & { pieces: Piece[] }>()
  claims.forEach((list, rank) => {
    for (const claim of list) {
      if (writers.get(claimKey(claim)) !== rank) continue
      const entry = index.get(claim.name) ?? { dtype: claim.dtype, shape: claim.shape, pieces: [] }
      index.set(claim.name, entry)
      if (entry.dtype !== claim.dtype || entry.shape.join() !== claim.shape.join()) {
        throw new ViaductError(
          'ERR_ASSERT',
          'checkpoint',
          `ranks disagree on ${claim.name}: ${entry.dtype} [${entry.shape}] and ${claim.dtype} [${claim.shape}]`,
        )
      }
      const xxh3 = hashes[rank]?.[claimKey(claim)]
      if (xxh3 === undefined)
        throw new ViaductError('ERR_ASSERT', 'checkpoint', `rank ${rank} has not written ${claim.name}`)
      entry.pieces.push({
        file: pieceFile(rank, ranks.size),
        key: keyOf(claim),
        start: claim.start,
        size: claim.size,
        xxh3,
      })
    }
  })
  for (const [name, { shape, pieces }] of index) {
    const fault = tilingFault(shape, pieces)
    if (fault !== null)
      throw new ViaductError('ERR_ASSERT', 'checkpoint', `the ranks' shards of ${name} do not tile it: ${fault}`)
  }
  return index
}

function keyOf({ name, shape, start, size }: Claim): string {
  return pieceKey(name, shape, start, size)
}
