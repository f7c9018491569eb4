// Rotary tables on the device, kept from call to call and made longer when a longer sequence comes.
import type { Ctx } from '../tensor/ctx.js'
import { Tensor } from '../tensor/tensor.js'
import { type RopeConfig, ropeFrequencies, ropeTables } from './rope.js'

interface Tables {
  readonly cos: Tensor
  readonly sin: Tensor
}

export class RotaryEmbedding {
  #tables: Tables | null = null
  #positions = 0
  /** Length whose frequencies the tables have; 0: those of every length up to maxPositionEmbeddings. */
  #dynamicLength = 0

  constructor(readonly config: RopeConfig) {}

  /**
   * cos and sin, float32 [P, R/2] with P at least `length`, owned by this object.
   * @param length - largest position + 1.
   */
  tables(ctx: Ctx, length: number): Tables {
    const { scaling, maxPositionEmbeddings } = this.config
    const dynamicLength = scaling.type === 'dynamic' && length > maxPositionEmbeddings ? length : 0
    if (this.#tables !== null && length <= this.#positions && dynamicLength === this.#dynamicLength) return this.#tables
    // Doubling, so that decoding token by token does not upload at each step.
    const positions = dynamicLength > 0 ? length : Math.max(256, 2 ** Math.ceil(Math.log2(length)))
    const host = ropeTables(ropeFrequencies(this.config, length), positions)
    const shape = [positions, this.config.channels / 2]
    this.dispose()
    this.#tables = {
      cos: Tensor.fromHost(ctx, host.cos, shape, 'float32').keep(),
      sin: Tensor.fromHost(ctx, host.sin, shape, 'float32').keep(),
    }
    this.#positions = positions
    this.#dynamicLength = dynamicLength
    return this.#tables
  }

  dispose(): void {
    this.#tables?.cos.dispose()
    this.#tables?.sin.dispose()
    this.#tables = null
  }
}
