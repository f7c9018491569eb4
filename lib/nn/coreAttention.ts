// Scaled dot-product attention over packed queries, keys and values, with rotation. See ops/attention.ts for the packed layout.

import { type AttentionArgs, attention, cachedAttention, type Rotary } from '../ops/attention.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { Module } from './module.js'
import type { Parameter } from './parameter.js'

export interface CoreAttentionConfig {
  /** Key-value heads on this rank. */
  readonly groups: number
  /** Query heads of each key-value head on this rank. */
  readonly queriesPerGroup: number
  /** Channels a head. */
  readonly channels: number
  /** Factor of the scores; default 1/sqrt(channels). */
  readonly scale?: number
  readonly window?: number
  readonly softcap?: number
}

/** What of the batch attention looks at. */
export interface AttentionContext {
  readonly batchSize: number
  readonly rotary: Rotary | null
  /** int32 [B, S] or null. */
  readonly firstKey: Tensor | null
  /** int32 [B] or null. */
  readonly keyEnd: Tensor | null
}

/** Keys and values of one layer, [B, maxLength, G, D], and how many are filled. */
export interface LayerCache {
  readonly key: Tensor
  readonly value: Tensor
  readonly length: number
}

/** `core_attention`: its only parameter is `softmax_offset`, where the softmax counts a sink. */
export class CoreAttention extends Module {
  readonly softmaxOffset: Parameter | null

  constructor(
    readonly config: CoreAttentionConfig,
    softmaxOffset: Parameter | null = null,
  ) {
    super()
    this.softmaxOffset = softmaxOffset && this.parameter('softmax_offset', softmaxOffset)
  }

  /** What the ops take. */
  args(qkv: Tensor, at: AttentionContext): AttentionArgs {
    return { scale: this.config.channels ** -0.5, ...this.config, ...at, qkv, sink: this.softmaxOffset }
  }

  /** qkv [T, G·(R+2)·D] to [T, G·R·D]. With a cache: this call's keys are appended and all are seen. */
  forward(ctx: Ctx, qkv: Tensor, at: AttentionContext, cache?: LayerCache): Tensor {
    const args = this.args(qkv, at)
    if (cache === undefined) return attention(ctx, args).y
    return cachedAttention(ctx, { ...args, keyCache: cache.key, valueCache: cache.value, start: cache.length })
  }
}
