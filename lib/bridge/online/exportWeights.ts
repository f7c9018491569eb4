// Runs an online export: whole HF tensors one after the other, gathered in buckets, one collective a bucket, group and dtype. Which
// boxes go where is planned in conversionTasks.ts. Every rank takes the same steps; whoever fails tells the others at the next one.
import { createHash } from 'node:crypto'
import { native } from '../../addon/load.js'
import { type DType, dtypes } from '../../base/dtype.js'
import { stopIfAborted, ViaductError } from '../../base/errors.js'
import { contiguousStrides } from '../../base/shape.js'
import type { Ranks } from '../../checkpoint/ranks.js'
import type { DistributedModel } from '../../models/distributedModel.js'
import type { Parameter } from '../../nn/parameter.js'
import { allGather, pointToPoint } from '../../parallel/collectives.js'
import type { CommGroup } from '../../parallel/group.js'
import type { Ctx } from '../../tensor/ctx.js'
import { volume } from '../../tensor/region.js'
import { Tensor } from '../../tensor/tensor.js'
import { bucketsOf, type ConversionTask, type TaskOptions, type TaskPiece } from './conversionTasks.js'

export interface ExportWeightsOptions extends TaskOptions {
  /** A plan of `getConversionTasks`, or some of its tasks; it has its own weightDtype and what. */
  readonly tasks?: readonly ConversionTask[]
  /** Who gets tensors; other ranks get null for each name, and nothing is sent to them. Ranks of the world. Default all. */
  readonly to?: 'all' | 'rank0' | readonly number[]
  /** Tensors of together at most this many bytes are gathered at once; memory is about twice that. Default 64 MiB. */
  readonly bucketBytes?: number
  /** Tensors in host memory; on a CPU device they are. */
  readonly cpu?: boolean
  readonly signal?: AbortSignal
}

const defaultBucketBytes = 64 * 2 ** 20

/**
 * Whole HF tensors, the same names in the same order on every rank. A tensor is valid until the next step unless kept. A rank that
 * leaves early, throws or aborts ends the iteration on all ranks with ERR_ABORTED, at the latest where the next bucket begins.
 * @throws ERR_USAGE where ranks were given different tasks or options, ERR_COVERAGE for tasks of another model
 */
export async function* runTasks(
  model: DistributedModel,
  tasks: readonly ConversionTask[],
  ranks: Ranks,
  options: ExportWeightsOptions = {},
): AsyncGenerator<[string, Tensor | null]> {
  const { to = 'all', bucketBytes = defaultBucketBytes, signal } = options
  const parameters = new Map(model.namedParameters())
  const wants = (rank: number) => to === 'all' || (to === 'rank0' ? rank === 0 : to.includes(rank))
  const steps = new Steps(ranks, () => [to, bucketBytes, tasks.map(({ name, dtype, what }) => [name, dtype, what])])
  const mine = wants(ranks.rank)
  let left = tasks.length
  try {
    for (const bucketTasks of bucketsOf(tasks, bucketBytes)) {
      const ctx = model.ctx()
      try {
        stopIfAborted(signal, 'exportHfWeights')
        const bucket = new Bucket(ctx, model, parameters, bucketTasks, wants)
        await ctx.stream.sync()
        await steps.together()
        bucket.gather()
        await ctx.stream.sync()
        for (const task of bucketTasks) {
          stopIfAborted(signal, 'exportHfWeights')
          const inner = ctx.with({ scope: model.ctx().scope })
          try {
            const whole = mine ? bucket.assemble(inner, task) : null
            await ctx.stream.sync()
            left--
            yield [task.name, whole]
          } finally {
            inner.scope.close()
          }
        }
      } finally {
        ctx.scope.close()
      }
    }
    await steps.together()
    steps.end()
  } finally {
    await steps.leave(left === 0)
  }
}

interface Word {
  readonly left: boolean
  /** Of what this rank is about to do; on its first word only. */
  readonly plan: string | null
}

/** The points at which ranks tell each other that all go on. */
class Steps {
  readonly #ranks: Ranks
  #plan: string | null
  #open = true

  /** @param plan - what must be alike on all ranks */
  constructor(ranks: Ranks, plan: () => unknown) {
    this.#ranks = ranks
    this.#plan = ranks.size === 1 ? null : createHash('sha256').update(JSON.stringify(plan())).digest('hex')
  }

  /** @throws where a rank has left or does something else; then nobody waits for this one any more */
  async together(): Promise<void> {
    if (this.#ranks.size === 1) return
    try {
      const words = await this.#say(false)
      const gone = words.findIndex(({ left }) => left)
      if (gone >= 0)
        throw new ViaductError(
          'ERR_ABORTED',
          'exportHfWeights',
          `rank ${gone} left the iteration early: no more tensors can be gathered`,
          { rank: gone },
        )
      const odd = words.findIndex(({ plan }) => plan !== words[0]?.plan)
      if (odd >= 0)
        throw new ViaductError(
          'ERR_USAGE',
          'exportHfWeights',
          `expected the same tasks and options on all ranks, got others on rank ${odd} than on rank 0: give filter, tasks, to, weightDtype and bucketBytes alike`,
          { rank: odd },
        )
    } catch (error) {
      this.#open = false
      throw error
    }
  }

  end(): void {
    this.#open = false
  }

  /** Tells the others, unless the iteration has ended on all. @param complete - this rank has had all tensors */
  async leave(complete: boolean): Promise<void> {
    if (!this.#open || this.#ranks.size === 1) return
    this.#open = false
    await this.#say(!complete).catch(() => [])
  }

  #say(left: boolean): Promise<Word[]> {
    const plan = this.#plan
    this.#plan = null
    return this.#ranks.gather<Word>({ left, plan })
  }
}

/** What is gathered at once: for each group and dtype one flat buffer of each rank's pieces, in the order of tasks. */
class Bucket {
  readonly #ctx: Ctx
  readonly #model: DistributedModel
  readonly #parameters: ReadonlyMap<string, Parameter>
  readonly #lanes = new Map<string, Lane>()
  /** First element of each piece in its rank's part of its lane. */
  readonly #places = new Map<ConversionTask, number[]>()
  readonly #zeros = new Map<string, Tensor>()

  /** Packs what this rank gives. */
  constructor(
    ctx: Ctx,
    model: DistributedModel,
    parameters: ReadonlyMap<string, Parameter>,
    tasks: readonly ConversionTask[],
    wants: (rank: number) => boolean,
  ) {
    this.#ctx = ctx
    this.#model = model
    this.#parameters = parameters
    for (const task of tasks) {
      const lane = this.#laneOf(task, wants)
      if (lane !== null)
        this.#places.set(
          task,
          task.pieces.map((piece) => lane.reserve(piece)),
        )
    }
    for (const lane of this.#lanes.values()) lane.allocate(ctx)
    for (const task of tasks) {
      const lane = this.#laneOf(task, wants)
      for (const [i, piece] of task.pieces.entries()) {
        if (lane === null || lane.send === null || piece.at !== lane.group.rank) continue
        let at = (this.#places.get(task) as number[])[i] as number
        for (const { from, size } of piece.regions) {
          copyBox(ctx, this.#held(task, piece), from, lane.send, at, size)
          at += volume(size)
        }
      }
    }
  }

  gather(): void {
    for (const lane of this.#lanes.values()) lane.gather(this.#ctx)
  }

  /** A whole tensor, owned by `ctx.scope`. */
  assemble(ctx: Ctx, task: ConversionTask): Tensor {
    const out = Tensor.empty(ctx, task.shape, task.dtype)
    const places = this.#places.get(task)
    for (const [i, piece] of task.pieces.entries()) {
      const target = { tensor: out, strides: contiguousStrides(piece.shape), base: piece.slice * volume(piece.shape) }
      let at = places?.[i] ?? 0
      for (const { from, to, size } of piece.regions) {
        const begin = target.base + offsetOf(to, target.strides)
        using into = out.view(ctx, size, target.strides, begin)
        if (places === undefined) {
          const held = this.#held(task, piece)
          using source = held.view(ctx, size, held.strides, offsetOf(from, held.strides))
          native.copy(ctx.stream.id, into.handle, source.handle)
        } else {
          using source = this.#lane(task).partOf(ctx, piece.at, at, size)
          native.copy(ctx.stream.id, into.handle, source.handle)
          at += volume(size)
        }
      }
    }
    return out
  }

  #lane(task: ConversionTask): Lane {
    return this.#lanes.get(laneKey(task)) as Lane
  }

  #laneOf(task: ConversionTask, wants: (rank: number) => boolean): Lane | null {
    if (task.axes.length === 0) return null
    const key = laneKey(task)
    const lane = this.#lanes.get(key) ?? new Lane(groupOf(this.#model, task), wireDtype(task), wants)
    this.#lanes.set(key, lane)
    return lane
  }

  /** This rank's shard of a piece's parameter, or its gradient. */
  #held({ what }: ConversionTask, { ours, localShape }: TaskPiece): Tensor {
    const parameter = this.#parameters.get(ours)
    if (parameter?.shard.localShape.some((n, d) => n !== localShape[d]) !== false)
      throw new ViaductError(
        'ERR_COVERAGE',
        'exportHfWeights',
        `expected tasks of this model, got one that takes [${localShape}] of ${ours}, where the model has ${parameter === undefined ? 'no such parameter' : `[${parameter.shard.localShape}]`}: plan again with getConversionTasks`,
        { parameter: ours },
      )
    if (what === 'weights') return parameter.data
    if (parameter.mainGrad !== null) return parameter.mainGrad
    const zeros = this.#zeros.get(ours) ?? Tensor.zeros(this.#ctx, localShape, 'float32')
    this.#zeros.set(ours, zeros)
    return zeros
  }
}

const laneKey = (task: ConversionTask) => `${task.axes} ${wireDtype(task)}`

/** What is sent: the smaller of what ranks hold and what is yielded. Either order of cast and gather gives the same bits. */
function wireDtype({ held, dtype }: ConversionTask): DType {
  return dtypes[dtype].bits < dtypes[held].bits ? dtype : held
}

/** Groups along several axes have the axes' names in the order in which tasks have them. */
const groupOf = ({ mesh }: DistributedModel, { axes }: ConversionTask): CommGroup => mesh.get(axes.join('_'))

/** One collective: pieces of one dtype within one group. */
class Lane {
  /** This rank's part; null where it gives nothing or nobody of the group wants it. */
  send: Tensor | null = null
  /** The parts of all, or of the others, one after the other; null where this rank gets nothing. */
  #received: Tensor | null = null
  /** First element of each rank's part in `#received`. */
  #begins: readonly number[] = []
  readonly #lengths: number[]
  readonly #wanting: readonly number[]

  constructor(
    readonly group: CommGroup,
    readonly dtype: DType,
    wants: (rank: number) => boolean,
  ) {
    this.#lengths = Array.from({ length: group.size }, () => 0)
    this.#wanting = group.ranks.flatMap((rank, place) => (wants(rank) ? [place] : []))
  }

  /** Room for a piece in its rank's part. */
  reserve({ at, regions }: TaskPiece): number {
    const begin = this.#lengths[at] as number
    this.#lengths[at] = regions.reduce((sum, { size }) => sum + volume(size), begin)
    return begin
  }

  allocate(ctx: Ctx): void {
    const own = this.#lengths[this.group.rank] as number
    if (this.#wanting.length > 0 && own > 0) this.send = Tensor.empty(ctx, [own], this.dtype)
    if (this.#isEven || !this.#wanting.includes(this.group.rank)) return
    let total = 0
    this.#begins = this.#lengths.map((length, place) => {
      const begin = total
      if (place !== this.group.rank) total += length
      return begin
    })
    if (total > 0) this.#received = Tensor.empty(ctx, [total], this.dtype)
  }

  gather(ctx: Ctx): void {
    const { send } = this
    const { rank, size } = this.group
    if (this.#isEven && send !== null) {
      const [length] = this.#lengths as [number]
      this.#begins = this.#lengths.map((_, place) => place * length)
      this.#received = ctx.view(allGather(ctx, send, this.group), [size * length])
      return
    }
    const sends = send === null ? [] : this.#wanting.flatMap((peer) => (peer === rank ? [] : [{ tensor: send, peer }]))
    const recvs = this.#lengths.flatMap((length, peer) =>
      this.#received === null || peer === rank || length === 0
        ? []
        : [{ tensor: this.partOf(ctx, peer, 0, [length]), peer }],
    )
    pointToPoint(ctx, this.group, sends, recvs)
  }

  /** A packed box of a rank's part, as a view. */
  partOf(ctx: Ctx, at: number, begin: number, size: readonly number[]): Tensor {
    const own = at === this.group.rank
    const source = (own ? this.send : this.#received) as Tensor
    return source.view(ctx, size, contiguousStrides(size), (own ? 0 : (this.#begins[at] as number)) + begin)
  }

  /** All want it and all give as much: what a single all-gather does. */
  get #isEven(): boolean {
    const isAlike = this.#lengths.every((length) => length > 0 && length === this.#lengths[0])
    return isAlike && this.#wanting.length === this.group.size
  }
}

const offsetOf = (start: readonly number[], strides: readonly number[]) =>
  start.reduce((sum, at, d) => sum + at * (strides[d] as number), 0)

/** A box of a tensor to a run of a flat one, cast. */
function copyBox(
  ctx: Ctx,
  tensor: Tensor,
  start: readonly number[],
  flat: Tensor,
  begin: number,
  size: readonly number[],
): void {
  using source = tensor.view(ctx, size, tensor.strides, offsetOf(start, tensor.strides))
  using target = flat.view(ctx, size, contiguousStrides(size), begin)
  native.copy(ctx.stream.id, target.handle, source.handle)
}
