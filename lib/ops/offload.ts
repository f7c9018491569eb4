// Activations that wait for their backward pass in the host's memory. A stretch of a forward pass is carried down while the next
// stretch runs, and up again one stretch before it is needed, on streams of their own; at most two stretches lie on the device.
import { native } from '../addon/load.js'
import { dtypeBytes } from '../base/dtype.js'
import type { Ctx } from '../tensor/ctx.js'
import { Device } from '../tensor/device.js'
import type { Event } from '../tensor/stream.js'
import { Tensor } from '../tensor/tensor.js'
import type { Absence, Tape } from './tape.js'

const copiesOwner = () => Device.host().communication('activations')

/** A storage that only the tape holds: its saved tensors, where they lie in it, and its copy on the host. */
interface Parcel {
  readonly tensors: readonly Tensor[]
  /** In elements, from the beginning of the storage. */
  readonly offsets: readonly number[]
  readonly copy: Tensor
}

/** The forward pass of one micro-batch in one chunk: call `leave` behind each stretch whose activations are to go, `end` behind the next. */
export class ActivationOffload {
  readonly #tape: Tape
  #leaving: { readonly stretch: Stretch; readonly passed: Event } | null = null

  constructor(tape: Tape) {
    this.#tape = tape
  }

  /** What has been saved so far and nobody else holds begins its way to the host. */
  leave(ctx: Ctx): void {
    this.end(ctx)
    const down = ctx.device.communication('activations down')
    down.wait(ctx.stream)
    // Owns the copies and runs nothing: it only waits for what used them, so that their memory serves the next ones at once.
    const owner = copiesOwner()
    down.wait(owner)
    const home = ctx.with({ device: Device.host(), stream: owner })
    const parcels = this.#tape.ownStorages().map((tensors) => {
      const [first] = tensors as [Tensor]
      const infos = tensors.map((t) => native.tensorInfo(t.handle))
      const offsets = infos.map(({ offset }) => offset)
      const elements = (infos[0]?.storageBytes as number) / dtypeBytes(first.dtype)
      using all = first.view(ctx, [elements], [1], -(offsets[0] as number))
      const copy = Tensor.empty(home, [elements], first.dtype).keep()
      native.copyBetween(down.id, copy.handle, all.handle)
      return { tensors, offsets, copy }
    })
    if (parcels.length > 0) this.#leaving = { stretch: new Stretch(parcels), passed: down.record() }
  }

  /** The memory of what left is the device's again, behind its copy. */
  end(ctx: Ctx): void {
    if (this.#leaving === null) return
    const { stretch, passed } = this.#leaving
    this.#leaving = null
    ctx.stream.wait(passed)
    copiesOwner().wait(passed)
    passed.dispose()
    this.#tape.takeAway(stretch.tensors, stretch)
  }

  /** What has not left yet, because the pass failed, stays. */
  [Symbol.dispose](): void {
    this.#leaving?.passed.dispose()
    this.#leaving?.stretch.dispose()
    this.#leaving = null
  }
}

/** Memory of the device that a stretch comes back to. */
interface Coming {
  readonly storages: readonly Tensor[]
  readonly arrived: Event
}

/** What left together comes back together. */
class Stretch implements Absence {
  #parcels: readonly Parcel[]
  #coming: Coming | null = null

  constructor(parcels: readonly Parcel[]) {
    this.#parcels = parcels
  }

  get tensors(): Tensor[] {
    return this.#parcels.flatMap(({ tensors }) => tensors)
  }

  /** Starts the way back, beside compute. */
  prepare(ctx: Ctx): void {
    if (this.#coming !== null) return
    const storages = this.#parcels.map(({ copy }) => Tensor.empty(ctx, copy.shape, copy.dtype).keep())
    const up = ctx.device.communication('activations up')
    up.wait(ctx.stream)
    for (const [i, { copy }] of this.#parcels.entries())
      native.copyBetween(up.id, (storages[i] as Tensor).handle, copy.handle)
    this.#coming = { storages, arrived: up.record() }
  }

  restore(ctx: Ctx): void {
    this.prepare(ctx)
    const { storages, arrived } = this.#coming as Coming
    ctx.stream.wait(arrived)
    copiesOwner().wait(arrived)
    for (const [i, { tensors, offsets }] of this.#parcels.entries())
      for (const [k, t] of tensors.entries())
        t.refill((storages[i] as Tensor).view(ctx, t.shape, t.strides, offsets[k] as number))
    this.dispose()
  }

  dispose(): void {
    this.#coming?.arrived.dispose()
    for (const storage of this.#coming?.storages ?? []) storage.dispose()
    for (const { copy } of this.#parcels) copy.dispose()
    this.#parcels = []
    this.#coming = null
  }
}
