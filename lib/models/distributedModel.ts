// What a provider gives: this rank's part of a model, on its device and mesh. Wrapping for data parallelism is a flag here;
// lib/train sums the gradients.

import type { Parameter } from '../nn/parameter.js'
import type { Mesh } from '../parallel/mesh.js'
import type { PipelineLinks } from '../parallel/pipelineLinks.js'
import { Ctx, type CtxFields } from '../tensor/ctx.js'
import type { Device } from '../tensor/device.js'
import type { GPTModel } from './gpt.js'
import type { GPTModelProvider } from './provider.js'
import type { ShardedWeights } from './unitPasses.js'

interface DistributedModelFields {
  readonly chunks: readonly GPTModel[]
  readonly mesh: Mesh
  readonly config: GPTModelProvider
  readonly device: Device
  /** Gradients are to be summed over data-parallel ranks. */
  readonly wrapWithDdp: boolean
  /** The mesh was made for this model and ends with it. */
  readonly ownsMesh: boolean
  /** To the neighbouring stages; null without a pipeline. Ends with the model. */
  readonly links: PipelineLinks | null
}

export class DistributedModel {
  /** One chunk of layers for each virtual pipeline stage of this rank. */
  readonly chunks: readonly GPTModel[]
  readonly mesh: Mesh
  readonly config: GPTModelProvider
  readonly device: Device
  readonly wrapWithDdp: boolean
  /** To the neighbouring stages; null without a pipeline. */
  readonly links: PipelineLinks | null
  /** Set by who shards the weights over data-parallel ranks; null: each rank has all of its part. */
  shardedWeights: ShardedWeights | null = null
  readonly #ownsMesh: boolean
  #disposed = false

  constructor(fields: DistributedModelFields) {
    this.chunks = fields.chunks
    this.mesh = fields.mesh
    this.config = fields.config
    this.device = fields.device
    this.wrapWithDdp = fields.wrapWithDdp
    this.links = fields.links
    this.#ownsMesh = fields.ownsMesh
  }

  /** This rank's parameters under the names that they have in the whole model; a shared one comes once. */
  *namedParameters(): Generator<[string, Parameter]> {
    for (const chunk of this.chunks) yield* chunk.namedParameters()
  }

  /** A fresh context on the model's device and mesh, with a scope of its own that the caller closes. */
  ctx(fields: Partial<Omit<CtxFields, 'device'>> = {}): Ctx {
    return Ctx.create({ device: this.device, groups: this.mesh, ...fields })
  }

  /** Whether dropout is on, in every chunk. */
  get training(): boolean {
    return this.chunks.some((chunk) => chunk.training)
  }

  set training(on: boolean) {
    for (const chunk of this.chunks) chunk.training = on
  }

  /** Frees parameters and gradients, and the mesh if it was made for this model. Idempotent. */
  async dispose(): Promise<void> {
    if (this.#disposed) return
    this.#disposed = true
    for (const chunk of this.chunks) chunk.dispose()
    this.links?.dispose()
    if (this.#ownsMesh) await this.mesh.dispose()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose()
  }
}
