// What goes first into every forward, op and collective. Nothing in Viaduct is ambient: who needs a stream, a scope or a
// group gets it from here. Only types of what higher layers implement (tape, groups) stand here.
import type { DType } from '../base/dtype.js'
import type { Shape } from '../base/shape.js'
import { Device, type DeviceKind } from './device.js'
import { Scope } from './scope.js'
import type { Stream } from './stream.js'
import { Tensor } from './tensor.js'

/** What an op tells the tape, as far as lower layers need it. The tape in lib/ops adds the backward functions. */
export interface TapeRecord {
  /** The op's name, for errors and profiles. */
  readonly name: string
  /** Where gradients go; null where an optional input was absent. */
  readonly inputs: readonly (Tensor | null)[]
  /** Where gradients come from. */
  readonly outputs: readonly (Tensor | null)[]
  /** What backward reads; the tape retains these and checks that their versions did not change. */
  readonly saved: readonly Tensor[]
}

/** Records the backward pass; implemented by the tape in lib/ops. */
export interface Recorder {
  record(entry: TapeRecord): void
}

/** The ranks along one axis of the mesh, as lower layers see them. */
export interface Group {
  readonly name: string
  readonly rank: number
  readonly size: number
  /** Native communicator id, 0 when size is 1. */
  readonly comm: number
}

/** The mesh as lower layers see it. */
export interface Groups {
  get(axis: string): Group
}

/** Key of randomness by place; see docs/runtime.md, section 9. */
export interface Rng {
  readonly seed: number
  readonly step: number
  /** int64 [2] on the device: seed and step, which dropout reads; null where nothing draws. */
  readonly rngSlot: Tensor | null
}

/** Coordinates of the rows of hidden states, for randomness by place. int32 or int64, one a row, on the device. */
export interface BatchCoordinates {
  readonly sampleIds: Tensor
  readonly positions: Tensor
  /**
   * Sequence parallelism: the batch's tokens, of whose rows each rank of tp has a run between the linears (parallel/sharedRows.ts).
   * Default: each rank has the rows of all tokens.
   */
  readonly sharedTokens?: number
}

/** The fields of a Ctx. */
export interface CtxFields {
  readonly device: Device
  /** Where ops are enqueued. */
  readonly stream: Stream
  /** Owner of new tensors. */
  readonly scope: Scope
  /** Recorder of the backward pass, or null. */
  readonly tape: Recorder | null
  readonly rng: Rng
  readonly batch: BatchCoordinates | null
  readonly groups: Groups
}

/** The groups of a program with one rank: every axis has size 1. */
export const soloGroups: Groups = {
  get: (axis) => ({ name: axis, rank: 0, size: 1, comm: 0 }),
}

export class Ctx implements CtxFields {
  readonly device: Device
  readonly stream: Stream
  readonly scope: Scope
  readonly tape: Recorder | null
  readonly rng: Rng
  readonly batch: BatchCoordinates | null
  readonly groups: Groups

  constructor(fields: CtxFields) {
    this.device = fields.device
    this.stream = fields.stream
    this.scope = fields.scope
    this.tape = fields.tape
    this.rng = fields.rng
    this.batch = fields.batch
    this.groups = fields.groups
  }

  /** A Ctx on a device's compute stream with a new scope, one rank, no tape; `fields` replace what differs. */
  static create(fields: Partial<Omit<CtxFields, 'device'>> & { readonly device?: Device | DeviceKind } = {}): Ctx {
    const device = fields.device instanceof Device ? fields.device : Device.open(fields.device ?? 'auto')
    return new Ctx({
      stream: device.stream,
      scope: new Scope(),
      tape: null,
      rng: { seed: 0, step: 0, rngSlot: null },
      batch: null,
      groups: soloGroups,
      ...fields,
      device,
    })
  }

  /** Memory without content, contiguous, owned by the scope: the output of an op. @throws ERR_OUT_OF_MEMORY */
  empty(shape: Shape, dtype: DType): Tensor {
    return Tensor.empty(this, shape, dtype)
  }

  /** Another tensor on the same memory, owned by the scope: the output of an op that works in place. */
  alias(tensor: Tensor): Tensor {
    return tensor.view(this, tensor.shape, tensor.strides)
  }

  /** A contiguous tensor with another shape, on the same memory; owned by the scope. @throws ERR_LAYOUT */
  view(tensor: Tensor, shape: Shape): Tensor {
    return tensor.reshape(this, shape)
  }

  /** A copy with some fields changed. */
  with(changes: Partial<CtxFields>): Ctx {
    return new Ctx({ ...(this as CtxFields), ...changes })
  }

  /**
   * This Ctx on the communication stream of a mesh axis, which goes on behind all that was enqueued here so far. What reads its
   * results here waits first: `ctx.stream.wait(comm.stream)`.
   */
  comm(axis: string): Ctx {
    const stream = this.device.communication(axis)
    stream.wait(this.stream)
    return this.with({ stream })
  }
}
