// A trainable tensor and what is known about it: its name, its place in the logical tensor, its main gradient.
import type { DType } from '../base/dtype.js'
import { assert, ViaductError } from '../base/errors.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import type { Tensor } from '../tensor/tensor.js'

/** How a parameter is initialised; drawn by logical place, so equal in every layout. */
export type Init =
  | { readonly kind: 'normal'; readonly std: number }
  | { readonly kind: 'constant'; readonly value: number }

/**
 * One parameter of a model: the local shard `data`, kept (owned) by this object.
 * `mainGrad` is float32, of `data`'s local shape; backward passes add to it, the optimizer zeroes it.
 */
export class Parameter {
  /** Full Megatron name in the model, e.g. `decoder.layers.0.self_attention.linear_qkv.weight`; set when the model is assembled. */
  name = ''
  /** False: no weight gradient is computed and none is stored. */
  requiresGrad = true
  /** Weight decay applies (matrices; not norms and biases). */
  readonly decays: boolean
  /** Called before `data` is handed out: the optimizer's gather may still write to it on another stream, or has to begin. */
  beforeUse: (() => void) | null = null
  /** Called where `mainGrad` is asked for and there is none: it may give one. */
  beforeGradient: (() => void) | null = null
  #mainGrad: Tensor | null = null
  #data: Tensor | null = null
  #disposed = false

  constructor(
    readonly shard: ShardSpec,
    readonly dtype: DType,
    readonly init: Init,
  ) {
    this.decays = shard.logicalShape.length >= 2
  }

  /**
   * The local tensor. Ask anew in each step, then wait for the compute stream where its bytes are read outside of streams.
   * @throws ERR_ASSERT before it was allocated, ERR_HANDLE after dispose.
   */
  get data(): Tensor {
    if (this.#disposed)
      throw new ViaductError('ERR_HANDLE', 'model', `expected a live model, got one that was disposed (${this.name})`)
    assert(this.#data !== null, `parameter ${this.name} has no memory yet: allocate or load the model first`)
    this.beforeUse?.()
    return this.#data
  }

  /** `data` without `beforeUse`: it may have no memory at present. For whoever owns that. */
  get stored(): Tensor {
    assert(this.#data !== null, `parameter ${this.name} has no memory yet: allocate or load the model first`)
    return this.#data
  }

  /** float32, of `data`'s local shape; null where none was made. */
  get mainGrad(): Tensor | null {
    if (this.#mainGrad === null) this.beforeGradient?.()
    return this.#mainGrad
  }

  set mainGrad(tensor: Tensor | null) {
    this.#mainGrad = tensor
  }

  get isAllocated(): boolean {
    return this.#data !== null
  }

  /** Takes ownership of a kept tensor of the shard's local shape. */
  set data(tensor: Tensor) {
    this.#data?.dispose()
    this.#disposed = false
    this.#data = tensor
  }

  dispose(): void {
    this.#disposed = true
    this.#data?.dispose()
    this.#data = null
    this.#mainGrad?.dispose()
    this.#mainGrad = null
  }
}
