// Keys and values of past tokens, for generation. One cache serves one batch of sequences of equal length so far (shorter prompts are
// padded on the left); memory is taken once, for `maxLength` tokens.
import type { DType } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import type { LayerCache } from '../nn/coreAttention.js'
import type { Ctx } from '../tensor/ctx.js'
import { Tensor } from '../tensor/tensor.js'

export interface KvCacheShape {
  /** Index of the first layer in the whole model: on a pipeline stage not 0. Default 0. */
  readonly firstLayer?: number
  readonly numLayers: number
  readonly batchSize: number
  /** Most tokens a sequence may have. */
  readonly maxLength: number
  /** Key-value heads on this rank. */
  readonly groups: number
  /** Channels a head. */
  readonly channels: number
  readonly dtype: DType
}

export class KvCache {
  readonly #layers: { readonly key: Tensor; readonly value: Tensor }[] = []
  #length = 0

  private constructor(readonly shape: KvCacheShape) {}

  /** Takes memory for all layers; the caller disposes the cache. `GPTModel.createCache` knows the shape. */
  static create(ctx: Ctx, shape: KvCacheShape): KvCache {
    const cache = new KvCache(shape)
    const dims = [shape.batchSize, shape.maxLength, shape.groups, shape.channels]
    for (let i = 0; i < shape.numLayers; i++) {
      const key = Tensor.empty(ctx, dims, shape.dtype).keep()
      cache.#layers.push({ key, value: Tensor.empty(ctx, dims, shape.dtype).keep() })
    }
    return cache
  }

  /** Tokens of each sequence that are in the cache. */
  get length(): number {
    return this.#length
  }

  /** @param index - in the whole model. */
  layer(index: number): LayerCache {
    const { firstLayer = 0, numLayers } = this.shape
    const layer = this.#layers[index - firstLayer]
    if (layer === undefined) {
      throw new ViaductError(
        'ERR_HANDLE',
        'kvCache',
        `expected layer ${firstLayer} to ${firstLayer + numLayers - 1}, got ${index}: the cache may be disposed`,
      )
    }
    return { ...layer, length: this.#length }
  }

  /** Counts tokens that every layer has written. */
  advance(tokens: number): void {
    this.#length += tokens
  }

  /** Forgets tokens past `length` (default: all); memory stays. */
  truncate(length = 0): void {
    this.#length = Math.min(this.#length, length)
  }

  dispose(): void {
    for (const { key, value } of this.#layers) {
      key.dispose()
      value.dispose()
    }
    this.#layers.length = 0
    this.#length = 0
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}
