// Carries out a conversion: parts one after the other in each process, the steps of a part side by side. Finished parts stand in
// a journal in the unfinished folder, so that after a kill at most one part a process is done again. What a part does is planned
// elsewhere, from headers and options alone; every process plans the same.
import { createHash } from 'node:crypto'
import { mkdir } from 'node:fs/promises'
import { dirname, join } from 'node:path'

import { stopIfAborted, ViaductError } from '../../base/errors.js'
import { onFirst, type Ranks, together } from '../../checkpoint/ranks.js'
import { flush } from '../../io/atomic.js'
import { createFile, ioCounters, settleAll } from '../../io/blocks.js'
import type { RemoteBytes } from '../../io/hub/remoteBytes.js'
import type { SafetensorsHeader } from '../../io/safetensorsHeader.js'
import { keepOnly, thisWriter, UnfinishedFolder } from '../../io/unfinishedFolder.js'
import { bringHere, isDone, type Move, runMove, writtenPaths } from './moves.js'
import { Sha256Lane, type ShaTask } from './shaLane.js'

/** Written by one part, at least: what a kill costs. */
const partBytes = 64 * 2 ** 20
/** Changes when parts or their hashes come to mean something else. */
const planVersion = 2

/** Something to be made by one step; the step itself is made up when its part's turn comes. */
export interface Unit {
  /** Bytes that it writes. */
  readonly bytes: number
  /** Who does it, where as many processes take part as the layout has ranks. */
  readonly rank: number
  readonly move: (output: string) => Move
}

/** Units that are done, or done again, together. */
interface Part {
  readonly id: number
  readonly first: number
  readonly end: number
  readonly bytes: number
  readonly rank: number
}

/** Told how far this process is. Bytes that were found finished count from the first call on. */
export type OnProgress = (done: number, total: number) => void

export interface ConversionOptions {
  readonly ranks?: Ranks
  /** False: does not go on from what a killed process left. Default true. */
  readonly resume?: boolean
  /** Records the SHA-256 of each Hugging Face tensor in conversion.json. Default false. */
  readonly sha256?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: OnProgress
  /** Told what people should know: that earlier work is gone on with, or thrown away. */
  readonly onNotice?: (line: string) => void
}

/** A conversion as planned. */
export interface ConversionPlan {
  readonly where: 'import' | 'export'
  readonly target: string
  /** Everything that decides about parts and their bytes; another plan does not go on with this one's output. */
  readonly identity: unknown
  /** Refuses the target, on rank 0; not asked when the target is the very folder that a killed process has just named. */
  readonly admit: () => Promise<void>
  /** Ranks of the layout that the units name. */
  readonly layoutRanks: number
  readonly files: readonly { readonly name: string; readonly header: SafetensorsHeader }[]
  readonly units: readonly Unit[]
  readonly shaTasks: readonly ShaTask[]
  /** Where sources are addresses: brings what a step reads here while it runs. */
  readonly remote?: RemoteBytes | null
  /** Writes everything else, on rank 0. `xxh3` by unit; `sha256` by tensor. */
  readonly finish: (output: string, xxh3: readonly string[], sha256: ReadonlyMap<string, string>) => Promise<void>
  /** After the folder has its name, on rank 0; may be done twice. */
  readonly afterwards?: () => Promise<void>
}

/** What was done. */
export interface ConversionOutcome {
  readonly parts: number
  /** Parts that an earlier process had finished. */
  readonly resumedParts: number
  /** From and to files, by this call in all processes. */
  readonly bytesRead: number
  readonly bytesWritten: number
  readonly seconds: number
}

/** Consecutive units of a rank, together at least `partBytes`. */
export function cutParts(units: readonly Unit[]): Part[] {
  const parts: Part[] = []
  let first = 0
  let bytes = 0
  units.forEach((unit, i) => {
    bytes += unit.bytes
    const next = units[i + 1]
    if (next !== undefined && next.rank === unit.rank && bytes < partBytes) return
    parts.push({ id: parts.length, first, end: i + 1, bytes, rank: unit.rank })
    first = i + 1
    bytes = 0
  })
  return parts
}

/** The parts of one process: its rank's of the layout where that fits, else a run of about the same bytes for each. */
function partsOf(parts: readonly Part[], plan: ConversionPlan, ranks: Ranks): Part[] {
  if (ranks.size === plan.layoutRanks) return parts.filter((part) => part.rank === ranks.rank)
  const total = parts.reduce((n, part) => n + part.bytes, 0)
  let before = 0
  return parts.filter((part) => {
    const owner = Math.min(ranks.size - 1, Math.floor(((before + part.bytes / 2) / Math.max(total, 1)) * ranks.size))
    before += part.bytes
    return owner === ranks.rank
  })
}

type Note =
  | { readonly part: number; readonly xxh3: readonly string[] }
  | { readonly tensor: string; readonly sha256: string }

/** After these the output can be gone on with; after others nothing is left. */
function isResumable(error: unknown): boolean {
  if (!(error instanceof ViaductError)) return false
  const code = error.code === 'ERR_RANK_FAILED' ? error.details['code'] : error.code
  return code === 'ERR_ABORTED' || code === 'ERR_COMM' || code === 'ERR_TIMEOUT'
}

/**
 * Carries a plan out. Collective.
 * @throws ERR_TARGET_BUSY, ERR_NO_SPACE, ERR_IO and what steps throw: nothing is left then. ERR_ABORTED, ERR_COMM: the
 *   unfinished folder stays when a part was finished, and the same conversion goes on from it.
 */
export async function convert(
  plan: ConversionPlan,
  ranks: Ranks,
  options: ConversionOptions,
): Promise<ConversionOutcome> {
  const started = performance.now()
  const parts = cutParts(plan.units)
  const fingerprint = createHash('sha256')
    .update(JSON.stringify([planVersion, plan.where, plan.identity, parts.length]))
    .digest('hex')
  const writers = await ranks.gather(await thisWriter())
  const unfinished = new UnfinishedFolder(plan.target)
  const found = await onFirst(ranks, async () => {
    if (await unfinished.isCommitted(fingerprint)) return unfinished.claim(fingerprint, writers, true)
    await plan.admit()
    return unfinished.claim(fingerprint, writers, options.resume ?? true)
  })
  const before = ioCounters()
  try {
    if (found === 'restarted' && (options.resume ?? true))
      options.onNotice?.('the source or the options have changed since the unfinished conversion: starting over')
    let resumedParts = parts.length
    if (found !== 'committed') {
      const run = new Run(plan, unfinished, ranks, options, parts)
      if (found !== 'resumed') await onFirst(ranks, () => run.layOut(fingerprint))
      resumedParts = await run.all()
      await onFirst(ranks, async () => {
        stopIfAborted(options.signal, plan.where)
        await unfinished.commit()
      })
    }
    await onFirst(ranks, async () => {
      await plan.afterwards?.()
      await unfinished.remove()
    })
    const after = ioCounters()
    const moved = await ranks.gather([
      after.bytesRead - before.bytesRead,
      after.bytesWritten - before.bytesWritten,
    ] as const)
    return {
      parts: parts.length,
      resumedParts,
      bytesRead: moved.reduce((n, [read]) => n + read, 0),
      bytesWritten: moved.reduce((n, [, written]) => n + written, 0),
      seconds: (performance.now() - started) / 1000,
    }
  } catch (error) {
    if (ranks.rank === 0) {
      const keeps = isResumable(error) && (await unfinished.notes().catch(() => [])).length > 0
      if (keeps) {
        await unfinished.leave()
        throw resumableError(error as ViaductError)
      }
      await unfinished.abandon()
    }
    throw error
  }
}

function resumableError(error: ViaductError): ViaductError {
  return new ViaductError(
    error.code,
    error.where,
    `${error.message.replace(/^\[[^\]]*\] /, '')}; what is finished is kept: run the same command again to resume, with --no-resume to start over`,
    { ...error.details, resumable: true },
    { cause: error },
  )
}

/** One process's share of a conversion. */
class Run {
  private readonly mine: readonly Part[]
  private readonly total: number
  private done = 0
  private resumed = 0
  private readonly proved = new Map<string, Promise<void>>()
  private readonly written = new Set<string>()
  private readonly digests = new Map<string, string>()

  constructor(
    private readonly plan: ConversionPlan,
    private readonly unfinished: UnfinishedFolder,
    private readonly ranks: Ranks,
    private readonly options: ConversionOptions,
    private readonly parts: readonly Part[],
  ) {
    this.mine = partsOf(parts, plan, ranks)
    this.total = this.mine.reduce((n, part) => n + part.bytes, 0)
  }

  /** Files of the right size, so that a full disk is found first. */
  async layOut(fingerprint: string): Promise<void> {
    for (const { name, header } of this.plan.files) {
      await mkdir(dirname(join(this.unfinished.output, name)), { recursive: true })
      await createFile(join(this.unfinished.output, name), header.fileBytes, header.bytes)
    }
    await this.unfinished.begin(fingerprint)
  }

  /** Everything up to the last step. @returns parts found finished, of all processes. */
  async all(): Promise<number> {
    const { plan, ranks, unfinished } = this
    const noted = new Map<number, readonly string[]>()
    for (const note of (await unfinished.notes()) as Note[]) {
      if ('part' in note) noted.set(note.part, note.xxh3)
      else this.digests.set(note.tensor, note.sha256)
    }
    const later: ShaTask[] = []
    const results = await together(ranks, async () => {
      const lane = this.lane()
      try {
        const hashes = await this.carry(noted, lane, later)
        await lane.end()
        await settleAll([...this.written].map(flush))
        return { hashes, resumed: this.resumed }
      } finally {
        await lane.stop()
      }
    })
    const digests = await together(ranks, async () => {
      const lane = this.lane()
      later.filter((_, i) => i % ranks.size === ranks.rank).forEach((task) => void lane.add(task))
      await lane.end().finally(() => lane.stop())
      return [...this.digests]
    })
    const xxh3: string[] = []
    for (const { hashes } of results) {
      for (const [id, list] of hashes) {
        list.forEach((hash, i) => {
          xxh3[(this.parts[id] as Part).first + i] = hash
        })
      }
    }
    await onFirst(ranks, async () => {
      stopIfAborted(this.options.signal, plan.where)
      await keepOnly(unfinished.output, new Set(plan.files.map(({ name }) => name)))
      await plan.finish(unfinished.output, xxh3, new Map(this.options.sha256 ? digests.flat() : []))
    })
    return results.reduce((n, result) => n + result.resumed, 0)
  }

  private lane(): Sha256Lane {
    return new Sha256Lane(this.unfinished.output, this.plan.remote ?? null, async (tensor, sha256) => {
      this.digests.set(tensor, sha256)
      await this.unfinished.note(this.ranks.rank, { tensor, sha256 } satisfies Note)
    })
  }

  /** Does this process's parts. @param later - gets the tensors that no process has written alone. */
  private async carry(
    noted: ReadonlyMap<number, readonly string[]>,
    lane: Sha256Lane,
    later: ShaTask[],
  ): Promise<[number, readonly string[]][]> {
    const waiting = this.queueDigests(lane, later)
    const hashes: [number, readonly string[]][] = []
    // Finished parts first: what is missing then goes on where it stopped.
    const found = this.mine.filter((part) => noted.has(part.id))
    const missing = this.mine.filter((part) => !noted.has(part.id))
    const finish = (part: Part, list: readonly string[]) => {
      hashes.push([part.id, list])
      for (const task of waiting.get(part.id) ?? []) lane.add(task)
    }
    for (const part of found) {
      const list = noted.get(part.id) as readonly string[]
      if (await this.isFinished(part, list)) finish(part, list)
      else missing.push(part)
    }
    for (const part of missing.sort((a, b) => a.id - b.id)) {
      const list = await this.carryPart(part)
      await this.unfinished.note(this.ranks.rank, { part: part.id, xxh3: list } satisfies Note)
      finish(part, list)
    }
    return hashes
  }

  /** Source tensors are hashed at once, dealt out; written ones when their last part is done, by part. */
  private queueDigests(lane: Sha256Lane, later: ShaTask[]): Map<number, ShaTask[]> {
    const waiting = new Map<number, ShaTask[]>()
    if (!this.options.sha256) return waiting
    const mine = new Set(this.mine.map((part) => part.id))
    const partOf = new Uint32Array(this.plan.units.length)
    for (const part of this.parts) partOf.fill(part.id, part.first, part.end)
    this.plan.shaTasks
      .filter(({ name }) => !this.digests.has(name))
      .forEach((task, i) => {
        if (task.units === null) {
          if (i % this.ranks.size === this.ranks.rank) lane.add(task)
          return
        }
        const [first, end] = task.units
        const holding = [...partOf.subarray(first, end)]
        const last = holding.at(-1) as number
        if (holding.every((id) => mine.has(id))) waiting.set(last, [...(waiting.get(last) ?? []), task])
        else later.push(task)
      })
    return waiting
  }

  private movesOf(part: Part): Move[] {
    const moves = this.plan.units.slice(part.first, part.end).map((unit) => unit.move(this.unfinished.output))
    for (const path of moves.flatMap(writtenPaths)) this.written.add(path)
    return moves
  }

  private async isFinished(part: Part, list: readonly string[]): Promise<boolean> {
    stopIfAborted(this.options.signal, this.plan.where)
    const moves = this.movesOf(part)
    const good = await Promise.all(moves.map((move, i) => isDone(move, list[i] ?? '')))
    if (!good.every((ok) => ok)) return false
    this.resumed++
    this.tell(part.bytes)
    return true
  }

  private async carryPart(part: Part): Promise<string[]> {
    stopIfAborted(this.options.signal, this.plan.where)
    const list: string[] = []
    await settleAll(
      this.movesOf(part).map(async (move, i) => {
        if (move.kind === 'gather') for (const { name, prove } of move.proofs ?? []) await this.prove(name, prove)
        const here = await bringHere(this.plan.remote ?? null, move)
        list[i] = await runMove(here.move, this.options.signal).finally(here.release)
        this.tell(move.bytes)
      }),
    )
    return list
  }

  private prove(name: string, prove: () => Promise<void>): Promise<void> {
    const known = this.proved.get(name) ?? prove()
    this.proved.set(name, known)
    return known
  }

  private tell(bytes: number): void {
    this.done += bytes
    this.options.onProgress?.(this.done, this.total)
  }
}
