// Parameters whose new values are still on their way: an update or a gather on another stream than the compute stream writes them.
// Whoever asks for one of them (Parameter.data) makes the compute stream wait.
import type { Parameter } from '../nn/parameter.js'
import type { Event, Stream } from '../tensor/stream.js'

export class Arrivals {
  readonly #arriving = new Set<() => void>()

  get size(): number {
    return this.#arriving.size
  }

  /** These parameters are written by what the event stands behind; it is disposed when they have arrived. */
  expect(parameters: readonly Parameter[], event: Event, compute: Stream): void {
    const arrive = () => {
      if (!this.#arriving.delete(arrive)) return
      for (const parameter of parameters) parameter.beforeUse = null
      compute.wait(event)
      event.dispose()
    }
    this.#arriving.add(arrive)
    for (const parameter of parameters) parameter.beforeUse = arrive
  }

  /** What is enqueued on the compute stream from here on sees all of them. */
  arrive(): void {
    for (const arrive of [...this.#arriving]) arrive()
  }
}
