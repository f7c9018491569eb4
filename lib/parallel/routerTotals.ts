// Sums of what routers are trained by besides the model's loss, over the layers of a chunk and the micro-batches of a step, for the log.
import { native } from '../addon/load.js'
import type { Told } from '../ops/routerLosses.js'
import type { Ctx } from '../tensor/ctx.js'
import { Tensor } from '../tensor/tensor.js'

/** By Megatron's names. */
export type RouterLossName = 'load_balancing_loss' | 'seq_load_balancing_loss' | 'global_load_balancing_loss' | 'z_loss'

export class RouterTotals {
  readonly #sums = new Map<RouterLossName, Tensor>()

  /** Where a loss is added, times `factor`. */
  told(ctx: Ctx, name: RouterLossName, factor: number): Told {
    let into = this.#sums.get(name)
    if (into === undefined) {
      into = Tensor.zeros(ctx, [1], 'float32').keep()
      this.#sums.set(name, into)
    }
    return { into, factor }
  }

  /** Begins a step. */
  clear(ctx: Ctx): void {
    for (const sum of this.#sums.values()) native.fill(ctx.stream.id, sum.handle, 0)
  }

  /** What was told since then on this rank. */
  async read(): Promise<ReadonlyMap<RouterLossName, number>> {
    return new Map(await Promise.all([...this.#sums].map(async ([name, sum]) => [name, await sum.item()] as const)))
  }

  dispose(): void {
    for (const sum of this.#sums.values()) sum.dispose()
    this.#sums.clear()
  }
}
