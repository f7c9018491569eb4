// Streams and events as TypeScript sees them: order of execution on a device. A command that fails poisons its stream: later
// commands are skipped and each await rejects with the first error. See docs/runtime.md, sections 4 and 5.
import { native } from '../addon/load.js'

/** A point of a stream. Dispose it when all waits are enqueued. */
export class Event {
  #id: number

  /** Made by `Stream.record()`. */
  constructor(id: number) {
    this.#id = id
  }

  /** The native id. */
  get id(): number {
    return this.#id
  }

  /** True when the stream has passed the point, also after a failure. */
  get done(): boolean {
    return native.eventDone(this.#id)
  }

  dispose(): void {
    if (this.#id === 0) return
    native.destroyEvent(this.#id)
    this.#id = 0
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** Commands in order, on a worker of their own. Streams of a device run beside each other; events order them. */
export class Stream {
  #live = true

  private constructor(
    /** The native id, first argument of every op. */
    readonly id: number,
    readonly name: string,
  ) {}

  /** A new stream on the device with this native index. */
  static create(device: number, name: string): Stream {
    return new Stream(native.createStream(device), name)
  }

  /** Resolves when everything enqueued so far has run; rejects with the stream's first error. */
  sync(): Promise<void> {
    return native.syncStream(this.id)
  }

  /** Throws the stream's first error if it is known already. */
  check(): void {
    native.checkStream(this.id)
  }

  /** Clears the error of a poisoned stream, after what was enqueued has been skipped. */
  reset(): void {
    native.resetStream(this.id)
  }

  /** Names the place in the program, e.g. `decoder.layers.3.mlp, step 12`; errors of later commands carry it. */
  setPlace(place: string): void {
    native.setPlace(this.id, place)
  }

  /** A point after all that was enqueued so far. */
  record(): Event {
    return new Event(native.recordEvent(this.id))
  }

  /** Later commands of this stream start after the event, or after what `other` has enqueued so far. */
  wait(other: Event | Stream): void {
    if (other instanceof Event) {
      native.waitEvent(this.id, other.id)
      return
    }
    const event = native.recordEvent(other.id)
    native.waitEvent(this.id, event)
    native.destroyEvent(event)
  }

  /** Waits for the stream's commands and ends it. Idempotent. */
  dispose(): void {
    if (!this.#live) return
    this.#live = false
    native.destroyStream(this.id)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}
