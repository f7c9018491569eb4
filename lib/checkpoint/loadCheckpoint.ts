// Loading: any layout from any layout. A rank reads the pieces that its shards touch, checks their hashes, and fills its shards.
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { stopIfAborted, ViaductError } from '../base/errors.js'
import { hashRange, readHashed, readRegion, settleAll } from '../io/blocks.js'
import { exists } from '../io/paths.js'
import { tensorBytes } from '../io/safetensorsHeader.js'
import type { DistributedModel } from '../models/distributedModel.js'
import { composeRegions, type Region, volume } from '../tensor/region.js'
import { loadRegions, type ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'
import { type IndexedTensor, type OpenCheckpoint, openCheckpoint, type Piece } from './checkpointIndex.js'
import { fillOnce, type Sharers } from './hostCopies.js'

/** A local shard to fill. Padding outside of its blocks is not touched. */
export interface WantedTensor {
  readonly name: string
  readonly tensor: Tensor
  readonly shard: ShardSpec
}

export interface LoadOptions {
  /** Checks the XXH3 of each piece on the way into the tensors: one rank of a host reads it whole. Default true. */
  readonly verify?: boolean
  /** The ranks of this model load together: what several of a host hold is read, and checked, by one of them. */
  readonly model?: DistributedModel
  readonly signal?: AbortSignal
}

/** The region of a piece's file tensor onto the logical tensor. */
export function pieceRegion(piece: Piece): Region {
  return { from: piece.size.map(() => 0), to: piece.start, size: piece.size }
}

/** @throws ERR_CHECKPOINT_HASH naming tensor, file and both hashes. */
export async function checkPiece(
  checkpoint: OpenCheckpoint,
  name: string,
  tensor: IndexedTensor,
  piece: Piece,
  signal?: AbortSignal,
): Promise<void> {
  const place = checkpoint.locate(piece, tensor)
  checkHash(name, piece, await hashRange(place.path, place.offset, tensorBytes(tensor.dtype, piece.size), signal))
}

/** Compares what was read of a piece with what the index says. @throws ERR_CHECKPOINT_HASH */
export function checkHash(name: string, piece: Piece, actual: string): void {
  if (actual === piece.xxh3) return
  throw new ViaductError(
    'ERR_CHECKPOINT_HASH',
    'checkpoint',
    `expected XXH3 ${piece.xxh3} for ${piece.key}, got ${actual}: ${piece.file} was changed or damaged, take another checkpoint`,
    { tensor: name, file: piece.file, key: piece.key, expected: piece.xxh3, actual },
  )
}

/**
 * Fills local shards from a checkpoint (a root or an iter_* folder), whatever layout saved it. Casts floats where dtypes
 * differ. Waits for the tensors' streams first. After a failure the tensors hold anything, also what was read of damaged pieces.
 * @throws ERR_CHECKPOINT listing every absent or differently shaped tensor, before anything is read; ERR_CHECKPOINT_HASH.
 */
export async function loadCheckpoint(
  dir: string | OpenCheckpoint,
  wanted: Iterable<WantedTensor>,
  options: LoadOptions = {},
): Promise<OpenCheckpoint> {
  const checkpoint = typeof dir === 'string' ? await openCheckpoint(dir) : dir
  const list = [...wanted]
  const problems: string[] = []
  for (const { name, shard } of list) {
    const found = checkpoint.tensors.get(name)
    if (found === undefined) problems.push(`${name} is missing`)
    else if (found.shape.join() !== shard.logicalShape.join())
      problems.push(`${name}: expected [${shard.logicalShape}], got [${found.shape}]`)
  }
  if (problems.length > 0) {
    throw new ViaductError(
      'ERR_CHECKPOINT',
      'checkpoint',
      `expected the checkpoint's tensors to fit the model, got in ${checkpoint.folder}: ${problems.slice(0, 50).join('; ')}${problems.length > 50 ? ` and ${problems.length - 50} more` : ''}`,
      { problems },
    )
  }
  await fillOnce(list, options.model ?? null, async (index, blocks, sharers) => {
    const { name, tensor, shard } = list[index] as WantedTensor
    const found = checkpoint.tensors.get(name) as IndexedTensor
    const local = loadRegions({ ...shard, blocks })
    stopIfAborted(options.signal, 'checkpoint')
    await settleAll(
      found.pieces.map(async (piece, i) => {
        const regions = composeRegions([pieceRegion(piece)], local)
        if (regions.length === 0) return
        const place = checkpoint.locate(piece, found)
        if (options.verify === false || checkerOf(piece, sharers, index + i) !== sharers.rank)
          return settleAll(regions.map((region) => readRegion(place, tensor, region, options.signal)))
        checkHash(name, piece, (await readHashed(place, tensor, regions, options)).xxh3)
      }),
    )
  })
  return checkpoint
}

/** Who reads a piece whole and checks it: of the ranks that want most of it, the one whose turn it is. */
function checkerOf(piece: Piece, sharers: Sharers, turn: number): number {
  const wanted = sharers.blocks.map((blocks) => {
    const boxes = blocks.map(({ globalStart, size }) => ({ from: globalStart, to: globalStart, size }))
    return composeRegions([pieceRegion(piece)], boxes).reduce((sum, { size }) => sum + volume(size), 0)
  })
  const most = Math.max(...wanted)
  const ranks = wanted.flatMap((count, rank) => (count === most ? [rank] : []))
  return ranks[turn % ranks.length] as number
}

/** A text file of a checkpoint, e.g. `train_state.json`; null when it has none. */
export async function readCheckpointFile(checkpoint: OpenCheckpoint, name: string): Promise<string | null> {
  const path = join(checkpoint.folder, name)
  return (await exists(path)) ? readFile(path, 'utf8') : null
}
