// The part of the optimizer that the host takes (optimizerCpuOffload). Moments and masters lie in the host's memory. In a step the
// gradients come down and the updated parameters go up, each way on a stream of its own, so that copies both ways and the host's
// updates run beside each other, and what goes up runs beside the next forward pass.
import { native } from '../addon/load.js'
import type { Ctx } from '../tensor/ctx.js'
import { Device } from '../tensor/device.js'
import type { Stream } from '../tensor/stream.js'
import { Tensor } from '../tensor/tensor.js'

/** What one update reads and writes: flat or shaped alike. */
export interface HostUpdate {
  /** On the device. */
  readonly gradient: Tensor
  readonly data: Tensor
  /** On the host. */
  readonly expAvg: Tensor
  readonly expAvgSq: Tensor
  /** float32 weights of a bfloat16 parameter. */
  readonly master: Tensor | null
  readonly staging: Staging
  readonly weightDecay: number
}

/** Memory of the host for what is on its way, kept from step to step. */
export interface Staging {
  readonly gradient: Tensor
  readonly data: Tensor
}

export interface AdamConstants {
  readonly adamBeta1: number
  readonly adamBeta2: number
  readonly adamEps: number
}

export class HostUpdates {
  readonly #host = Device.host()
  readonly #down: Stream
  readonly #up: Stream
  readonly #slots: Tensor

  /** @param ctx - on the device of the parameters. */
  constructor(ctx: Ctx) {
    this.#down = ctx.device.communication('optimizer down')
    this.#up = ctx.device.communication('optimizer up')
    this.#slots = Tensor.zeros(this.home(ctx), [4], 'float32').keep()
  }

  /** `ctx` on the host's compute stream: where state lies. */
  home(ctx: Ctx): Ctx {
    return ctx.with({ device: this.#host, stream: this.#host.stream, tape: null })
  }

  /** `ctx` on the stream behind which parameters are up to date on the device. */
  arrived(ctx: Ctx): Ctx {
    return ctx.with({ stream: this.#up })
  }

  /** Masters take the values of a parameter, or of a part of it, on the device. */
  takeMaster(ctx: Ctx, { master, data, staging }: Pick<HostUpdate, 'data' | 'staging'> & { master: Tensor }): void {
    this.#open(ctx)
    native.copyBetween(this.#down.id, staging.data.handle, data.handle)
    this.#host.stream.wait(this.#down)
    native.copy(this.#host.stream.id, master.handle, staging.data.handle)
  }

  /** Before the updates of a step: `slots` as adamw takes them. What comes down is what `ctx.stream` has computed so far. */
  begin(ctx: Ctx, slots: Float32Array): void {
    native.upload(this.#host.stream.id, this.#slots.handle, slots)
    this.#open(ctx)
  }

  /** One update, enqueued. */
  update(update: HostUpdate, { adamBeta1, adamBeta2, adamEps }: AdamConstants): void {
    const { gradient, data, expAvg, expAvgSq, master, staging, weightDecay } = update
    const host = this.#host.stream
    native.copyBetween(this.#down.id, staging.gradient.handle, gradient.handle)
    // A float32 parameter has no second copy here that could grow old.
    if (master === null) native.copyBetween(this.#down.id, staging.data.handle, data.handle)
    host.wait(this.#down)
    native.adamw(
      host.id,
      (master ?? staging.data).handle,
      expAvg.handle,
      expAvgSq.handle,
      master === null ? 0 : staging.data.handle,
      staging.gradient.handle,
      this.#slots.handle,
      adamBeta1,
      adamBeta2,
      adamEps,
      weightDecay,
    )
    this.#up.wait(host)
    native.copyBetween(this.#up.id, data.handle, staging.data.handle)
  }

  /** After the updates of a step: gradients may be written again. */
  end(ctx: Ctx): void {
    ctx.stream.wait(this.#down)
  }

  /** Resolves when the host's updates are done. @throws the stream's error */
  async settle(): Promise<void> {
    await this.#host.stream.sync()
    await this.#up.sync()
  }

  dispose(): void {
    this.#slots.dispose()
  }

  /** The staging memory may be written again, with what the device has computed so far: `ctx.stream` has waited for what went up. */
  #open(ctx: Ctx): void {
    this.#down.wait(this.#host.stream)
    this.#down.wait(ctx.stream)
  }
}
