// The recorder of the backward pass. A tape belongs to one micro-batch of one chunk; many may be alive. It retains what its
// records save, checks that nobody changed it, and frees as the backward pass goes. A gradient whose only reference is
// the tape's may be overwritten (`isExclusive`); parameters accumulate into their main gradients, activations never do.

import { native } from '../addon/load.js'
import { dtypeBytes } from '../base/dtype.js'
import { assert, ViaductError } from '../base/errors.js'
import type { Ctx } from '../tensor/ctx.js'
import { Scope } from '../tensor/scope.js'
import type { Tensor } from '../tensor/tensor.js'
import type { TrainableWeight } from './weight.js'

/** One step of a forward pass, as the tape holds it. Made by `defineOp` and `recompute`. */
export interface TapeRecord {
  readonly name: string
  /** Where gradients go; null where an optional input was absent. */
  readonly inputs: readonly (Tensor | null)[]
  /** Where gradients come from. */
  readonly outputs: readonly (Tensor | null)[]
  /** Retained until the record's last backward action ran, and checked against changes. */
  readonly saved: readonly Tensor[]
  readonly weights: readonly TrainableWeight[]
  /** True if weights below this record want gradients though `weights` does not list them. */
  readonly hidesWeights?: boolean
  /**
   * Gradients of the inputs, null where not wanted. New tensors belong to `ctx.scope`; a result may be one of `dOutputs`.
   * @param wanted - which inputs need a gradient.
   * @param options - for records that run a tape of their own.
   */
  backwardInput(
    ctx: Ctx,
    dOutputs: readonly (Tensor | null)[],
    wanted: readonly boolean[],
    options: BackwardOptions,
  ): readonly (Tensor | null)[] | Promise<readonly (Tensor | null)[]>
  /** Adds to the main gradients of the weights. Called once, after backwardInput, at once or later. */
  backwardWeight?(ctx: Ctx, dOutputs: readonly (Tensor | null)[], options: BackwardOptions): void | Promise<void>
  /** Both at once: called instead where some weight wants its gradient now. */
  backward?(ctx: Ctx, dOutputs: readonly (Tensor | null)[], wanted: readonly boolean[]): readonly (Tensor | null)[]
  /** Outputs that `remake` makes again from the other saved tensors. */
  readonly remade?: readonly Tensor[]
  /** Enqueues the work that writes the same values into other tensors of the same shapes, in the order of `remade`. */
  remake?(ctx: Ctx, into: readonly Tensor[]): void
  /** Frees what the record itself holds, when it is dropped. */
  dispose?(): void
}

interface Entry {
  readonly record: TapeRecord
  readonly wanted: readonly boolean[]
  readonly versions: readonly number[]
}

/** Why saved tensors have no memory, and how they get it back. */
export interface Absence {
  /** Gives them memory and bytes again, enqueued in `ctx`. Called once, unless the tape is disposed before. */
  restore(ctx: Ctx): void
  /** Begins that beside compute, when the backward pass comes to what had been recorded last when they went. */
  prepare?(ctx: Ctx): void
  /** Drops what it holds: they are not needed any more. */
  dispose?(): void
}

interface Deferred {
  readonly entry: Entry
  readonly dOutputs: readonly (Tensor | null)[]
}

/** When weight gradients are computed: beside the input gradients, or in `backwardWeight`. */
export type WeightSchedule = 'now' | 'defer'

export interface BackwardOptions {
  readonly weights?: WeightSchedule
  /** Told of each weight that wants a gradient whenever a record has added to it (enqueued). */
  readonly onWeight?: ((weight: TrainableWeight) => void) | undefined
}

/** True if nobody but the caller holds the tensor or a view of its memory: it may be overwritten. */
export function isExclusive(t: Tensor): boolean {
  return t.references === 1 && native.sharers(t.handle) === 1
}

export class Tape {
  #entries: Entry[] = []
  #deferred: Deferred[] = []
  /** Tensors that a gradient may reach. */
  readonly #active = new Set<Tensor>()
  readonly #watched = new Set<Tensor>()
  /** Saved tensors without memory. */
  readonly #absent = new Map<Tensor, Absence>()
  /** Absences that are prepared before they are needed, with the number of records at which that begins; the last one is the first. */
  #ahead: { readonly at: number; readonly absence: Absence }[] = []
  #disposed = false

  /** Number of records that still hold something. */
  get length(): number {
    return this.#entries.length + this.#deferred.length
  }

  /** Marks a leaf whose gradient is wanted. */
  watch(t: Tensor): void {
    this.#watched.add(t)
    this.#active.add(t)
  }

  /** True if a gradient may reach this tensor: some input or weight before it wants one. */
  isActive(t: Tensor): boolean {
    return this.#active.has(t)
  }

  /** Takes a step; one that no gradient needs is dropped and saves nothing. */
  record(record: TapeRecord): void {
    assert(!this.#disposed, `record ${record.name} came after the tape was disposed`)
    const wanted: boolean[] = []
    let needed = record.hidesWeights === true
    for (const t of record.inputs) {
      const want = t ? this.#active.has(t) : false
      wanted.push(want)
      needed ||= want
    }
    if (!needed) needed = wantsWeights(record)
    if (!needed) {
      record.dispose?.()
      return
    }
    const versions: number[] = []
    for (const t of record.saved) {
      t.retain()
      versions.push(t.version)
    }
    for (const t of record.outputs) if (t !== null) this.#active.add(t)
    this.#entries.push({ record, wanted, versions })
  }

  /**
   * Gives up the memory of an output whose readers have run, and of what else its record makes with it: they are made again when the
   * backward pass comes to the first record that saved one of them. Views of the output that records saved are given up as well.
   * @param output - of a record that has `remake`; nothing happens when no gradient needs that record.
   */
  giveUp(output: Tensor): void {
    const at = this.#entries.findLastIndex(({ record }) => record.outputs.includes(output))
    const maker = this.#entries[at]
    if (maker === undefined) return
    const { remade = [] } = maker.record
    assert(remade.includes(output), `${maker.record.name} cannot make its output again`)
    const readers = this.#entries.slice(at)
    const saved = [...new Set(readers.flatMap(({ record }) => record.saved))].filter((t) => !t.isEvicted)
    const holders = remade.map((made) => saved.filter((t) => addressOf(t) === addressOf(made)))
    const evicted = holders.flat()
    const restore = (ctx: Ctx) => {
      this.#bring(ctx, maker.record.saved)
      checkVersions(maker)
      const again = remade.map((t) => ctx.empty(t.shape, t.dtype))
      maker.record.remake?.(ctx, again)
      again.forEach((source, i) => {
        for (const t of holders[i] as Tensor[]) t.refill(source.view(ctx, t.shape, t.strides))
        source.dispose()
      })
    }
    this.takeAway(evicted, { restore })
  }

  /** Saved tensors that have memory and that nobody but the tape holds, by the memory that they share. */
  ownStorages(): Tensor[][] {
    const held = new Map<Tensor, number>()
    for (const { record } of this.#entries)
      for (const t of record.saved) if (!t.isEvicted) held.set(t, (held.get(t) ?? 0) + 1)
    const storages = new Map<number, Tensor[]>()
    for (const t of held.keys()) {
      const { address, offset } = native.tensorInfo(t.handle)
      const begin = address - offset * dtypeBytes(t.dtype)
      const sharing = storages.get(begin)
      if (sharing === undefined) storages.set(begin, [t])
      else sharing.push(t)
    }
    return [...storages.values()].filter(
      (tensors) =>
        tensors.every((t) => t.numel > 0 && t.references === held.get(t)) &&
        native.sharers((tensors[0] as Tensor).handle) === tensors.length,
    )
  }

  /** Gives up the memory of saved tensors; they get it back from `absence` when the backward pass comes to the first of them. */
  takeAway(tensors: readonly Tensor[], absence: Absence): void {
    for (const t of tensors) {
      t.evict()
      this.#absent.set(t, absence)
    }
    if (absence.prepare !== undefined) this.#ahead.push({ at: this.#entries.length, absence })
  }

  /** Memory and bytes for those of the tensors that were given up, here or by their owner. */
  #bring(ctx: Ctx, tensors: readonly Tensor[]): void {
    for (const t of tensors) {
      if (!t.isEvicted) continue
      const absence = this.#absent.get(t)
      if (absence === undefined) {
        t.comeBack()
        continue
      }
      for (const [absent, its] of this.#absent) if (its === absence) this.#absent.delete(absent)
      absence.restore(ctx)
    }
  }

  /** Begins to bring back what is needed soon. */
  #prepare(ctx: Ctx): void {
    for (let next = this.#ahead.at(-1); next && next.at > this.#entries.length; next = this.#ahead.at(-1)) {
      this.#ahead.pop()
      next.absence.prepare?.(ctx)
    }
  }

  #forget(): void {
    for (const absence of new Set(this.#absent.values())) absence.dispose?.()
    this.#absent.clear()
    this.#ahead = []
    this.#active.clear()
    this.#watched.clear()
  }

  /**
   * Runs backward from `outputs`, seeded with `dOutputs` of the same shapes, and consumes the tape.
   * @returns gradients of the watched leaves that were reached, owned by `ctx.scope`.
   * @throws ERR_VERSION when a saved tensor was changed after it was recorded.
   */
  async backward(
    ctx: Ctx,
    outputs: readonly Tensor[],
    dOutputs: readonly Tensor[],
    options: BackwardOptions = {},
  ): Promise<Map<Tensor, Tensor>> {
    assert(outputs.length === dOutputs.length, `${outputs.length} outputs and ${dOutputs.length} gradients`)
    const schedule = options.weights ?? 'now'
    const gradients = new Map<Tensor, Tensor>()
    const scope = new Scope()
    const inner = ctx.with({ scope, tape: null })
    try {
      for (let i = 0; i < outputs.length; i++) {
        accumulate(inner, gradients, outputs[i] as Tensor, dOutputs[i] as Tensor)
      }
      scope.drain()
      for (let entry = this.#entries.pop(); entry !== undefined; entry = this.#entries.pop()) {
        const { record } = entry
        this.#prepare(inner)
        // A watched output keeps its gradient for the caller too.
        const dOuts = record.outputs.map((t) => (t === null ? null : this.#take(gradients, t)))
        if (dOuts.every((d) => d === null)) {
          drop(entry, dOuts)
          continue
        }
        let deferred = false
        try {
          this.#bring(inner, record.saved)
          checkVersions(entry)
          const wantsNow = wantsWeights(record) && schedule === 'now'
          const both = wantsNow ? record.backward?.(inner, dOuts, entry.wanted) : undefined
          const result = both ?? record.backwardInput(inner, dOuts, entry.wanted, options)
          const dIns = result instanceof Promise ? await result : result
          for (let i = 0; i < record.inputs.length; i++) {
            const d = dIns[i]
            if (d && entry.wanted[i]) accumulate(inner, gradients, record.inputs[i] as Tensor, d)
          }
          if (both !== undefined) tell(record, options)
          else if (record.backwardWeight !== undefined && wantsWeights(record)) {
            if (schedule === 'defer') {
              // backwardInput may have written over what only it needed, so versions are taken anew.
              const versions = record.saved.map((t) => t.version)
              this.#deferred.push({ entry: { ...entry, versions }, dOutputs: dOuts })
              deferred = true
            } else {
              const done = record.backwardWeight(inner, dOuts, options)
              if (done instanceof Promise) await done
              tell(record, options)
            }
          }
        } finally {
          if (!deferred) drop(entry, dOuts)
          scope.drain()
        }
      }
      const found = new Map<Tensor, Tensor>()
      for (const [t, d] of gradients) {
        if (!this.#watched.has(t)) continue
        found.set(t, handOver(ctx, d))
        gradients.delete(t)
      }
      return found
    } finally {
      scope.close()
      for (const d of gradients.values()) d.release()
      this.#forget()
    }
  }

  /** Computes the weight gradients that `backward` deferred, in the order in which it met them. */
  async backwardWeight(ctx: Ctx, options: BackwardOptions = {}): Promise<void> {
    const work = this.#deferred
    this.#deferred = []
    let done = 0
    try {
      for (const { entry, dOutputs } of work) {
        const scope = new Scope()
        try {
          checkVersions(entry)
          const result = entry.record.backwardWeight?.(ctx.with({ scope, tape: null }), dOutputs, options)
          if (result instanceof Promise) await result
          tell(entry.record, options)
        } finally {
          done++
          drop(entry, dOutputs)
          scope.close()
        }
      }
    } finally {
      for (const { entry, dOutputs } of work.slice(done)) drop(entry, dOutputs)
    }
  }

  /** Releases everything that is held. A second call does nothing. */
  dispose(): void {
    this.#disposed = true
    for (const entry of this.#entries) drop(entry, [])
    for (const { entry, dOutputs } of this.#deferred) drop(entry, dOutputs)
    this.#entries = []
    this.#deferred = []
    this.#forget()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #take(gradients: Map<Tensor, Tensor>, t: Tensor): Tensor | null {
    const d = gradients.get(t)
    if (d === undefined) return null
    if (this.#watched.has(t)) d.retain()
    else gradients.delete(t)
    return d
  }
}

function wantsWeights(record: TapeRecord): boolean {
  if (record.hidesWeights === true) return true
  for (const weight of record.weights) if (weight.requiresGrad) return true
  return false
}

function tell(record: TapeRecord, { onWeight }: BackwardOptions): void {
  if (onWeight === undefined) return
  for (const weight of record.weights) if (weight.requiresGrad) onWeight(weight)
}

const addressOf = (t: Tensor) => native.tensorInfo(t.handle).address

function drop(entry: Entry, dOutputs: readonly (Tensor | null)[]): void {
  for (const t of entry.record.saved) t.release()
  for (const d of dOutputs) d?.release()
  entry.record.dispose?.()
}

function checkVersions(entry: Entry): void {
  const { record, versions } = entry
  for (let i = 0; i < versions.length; i++) {
    const now = (record.saved[i] as Tensor).version
    if (now !== versions[i]) {
      throw new ViaductError(
        'ERR_VERSION',
        record.name,
        `expected saved tensor ${i} of [${(record.saved[i] as Tensor).shape}] at version ${versions[i]}, got ${now}: ` +
          'something wrote into it before its backward pass ran; write into a copy',
        { op: record.name, saved: i },
      )
    }
  }
}

/** Gives the map's reference to the caller's scope. */
function handOver(ctx: Ctx, d: Tensor): Tensor {
  const view = ctx.alias(d)
  d.release()
  return view
}

/** Adds `d` to the gradient of `t`. The map holds one reference to each of its tensors. */
function accumulate(ctx: Ctx, gradients: Map<Tensor, Tensor>, t: Tensor, d: Tensor): void {
  const before = gradients.get(t)
  if (before === undefined) {
    d.retain()
    gradients.set(t, d)
    return
  }
  const target = isExclusive(before) ? before : ctx.empty(before.shape, before.dtype)
  native.add(ctx.stream.id, target.handle, before.handle, d.handle)
  if (target === before) return
  target.retain()
  before.release()
  gradients.set(t, target)
}
