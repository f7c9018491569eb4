// What a pipeline stage sends to its neighbours and gets from them. Each direction of each pair has a communicator and each end of it a
// stream of its own, so that transfers keep their order, never wait for each other, and run beside the compute stream.
import type { DType } from '../base/dtype.js'
import type { Shape } from '../base/shape.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Device } from '../tensor/device.js'
import type { Stream } from '../tensor/stream.js'
import { Tensor } from '../tensor/tensor.js'
import { pointToPoint } from './collectives.js'
import type { CommGroup } from './group.js'
import type { Mesh } from './mesh.js'

/** Hidden states go forward, to the next stage; their gradients backward. */
export type Direction = 'forward' | 'backward'

/** One end of a pair: [the one that sends, the one that receives]. */
interface End {
  readonly group: CommGroup
  readonly stream: Stream
}

export class PipelineLinks {
  readonly #sends: ReadonlyMap<Direction, End>
  readonly #receives: ReadonlyMap<Direction, End>

  private constructor(sends: ReadonlyMap<Direction, End>, receives: ReadonlyMap<Direction, End>) {
    this.#sends = sends
    this.#receives = receives
  }

  /**
   * Links to the stages before and after this one; null without a pipeline. Every rank of the world calls it.
   * @param chunks - on each stage; with more than one the last stage's neighbour is the first.
   */
  static async create(mesh: Mesh, device: Device, chunks: number): Promise<PipelineLinks | null> {
    const { size: stages, rank: stage } = mesh.get('pp')
    if (stages === 1) return null
    const pipelines = mesh.pipelines()
    const count = chunks > 1 ? stages : stages - 1
    const sends = new Map<Direction, End>()
    const receives = new Map<Direction, End>()
    // A rank is in one part of a split: pairs that share a stage come in splits of their own.
    const splits = stages % 2 === 1 && count === stages ? 3 : 2
    const splitOf = (from: number) => (splits === 3 && from === stages - 1 ? 2 : from % 2)
    for (const direction of ['forward', 'backward'] as const) {
      for (let split = 0; split < splits; split++) {
        const firsts = Array.from({ length: count }, (_, i) => i).filter((from) => splitOf(from) === split)
        const pairs = firsts.map((from) => {
          const next = (from + 1) % stages
          return direction === 'forward' ? ([from, next] as const) : ([next, from] as const)
        })
        const groups = pipelines.flatMap((ranks) => pairs.map((pair) => pair.map((at) => ranks[at] as number)))
        if (groups.length === 0) continue
        const name = `pp_${direction}`
        const group = await mesh.world.part(name, groups, `${name}_${split}`)
        const pair = pairs.find((ends) => ends.includes(stage))
        if (pair === undefined) continue
        const isSender = pair[0] === stage
        const stream = device.createStream(`${name}_${isSender ? 'send' : 'receive'}`)
        const ends = isSender ? sends : receives
        ends.set(direction, { group, stream })
      }
    }
    return new PipelineLinks(sends, receives)
  }

  /** Sends a tensor to the neighbour as soon as it is computed. It may be freed at once, and must not be written to any more. */
  send(ctx: Ctx, direction: Direction, tensor: Tensor): void {
    const { group, stream } = this.#sends.get(direction) as End
    stream.wait(ctx.stream)
    pointToPoint(ctx.with({ stream }), group, [{ tensor, peer: 1 }], [])
  }

  /** The neighbour's next tensor, owned by the scope; later work on `ctx.stream` waits until it is here. */
  receive(ctx: Ctx, direction: Direction, shape: Shape, dtype: DType): Tensor {
    const { group, stream } = this.#receives.get(direction) as End
    // Memory of the receiving stream: it may be written before the compute stream has come this far.
    const at = ctx.with({ stream })
    const tensor = Tensor.empty(at, shape, dtype)
    pointToPoint(at, group, [], [{ tensor, peer: 0 }])
    ctx.stream.wait(stream)
    return tensor
  }

  /** Waits for what is under way. */
  dispose(): void {
    for (const { stream } of [...this.#sends.values(), ...this.#receives.values()]) stream.dispose()
  }
}
