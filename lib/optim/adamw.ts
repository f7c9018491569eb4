// AdamW with float32 moments. bfloat16 parameters have float32 master weights, which are what is optimised; float32 parameters
// are changed in place. What changes per step travels in one device slot. State is named `optimizer.<slot>.<parameter>`.
import { native } from '../addon/load.js'
import type { DType } from '../base/dtype.js'
import type { Parameter } from '../nn/parameter.js'
import type { Ctx } from '../tensor/ctx.js'
import type { ShardSpec } from '../tensor/shardSpec.js'
import { Tensor } from '../tensor/tensor.js'
import { FlatBuffer, FlatLayout } from './flatBuffer.js'
import { Gradients } from './gradients.js'

export interface AdamWOptions {
  readonly adamBeta1: number
  readonly adamBeta2: number
  readonly adamEps: number
  /** Decoupled; matrices only. */
  readonly weightDecay: number
}

/** A piece of optimizer state in the coordinates of its parameter. */
export interface OptimizerTensor {
  /** `optimizer.exp_avg.<name>`, `optimizer.exp_avg_sq.<name>`, `optimizer.master.<name>`. */
  readonly name: string
  readonly dtype: DType
  readonly tensor: Tensor
  readonly shard: ShardSpec
}

/** What AdamW of one step needs from outside. */
export interface AdamWStep {
  readonly lr: number
  /** Multiplies the gradients: clipping and the division by the number of tokens. */
  readonly factor: number
}

interface Slots {
  readonly parameter: Parameter
  readonly expAvg: Tensor
  readonly expAvgSq: Tensor
  /** float32 weights of a bfloat16 parameter; null for float32 parameters. */
  readonly master: Tensor | null
}

export class AdamW {
  /** Updates so far: t of the bias corrections. */
  updates = 0
  readonly gradients: Gradients
  readonly #buffers: FlatBuffer[]
  readonly #slots: Slots[]
  readonly #step: Tensor

  /** Takes memory for gradients and state of every parameter that requires a gradient; `dispose` gives it back. */
  constructor(
    ctx: Ctx,
    parameters: Iterable<Parameter>,
    readonly options: AdamWOptions,
  ) {
    const trained = [...parameters].filter((parameter) => parameter.requiresGrad)
    const layout = new FlatLayout(trained)
    this.gradients = new Gradients(ctx, layout)
    const expAvg = new FlatBuffer(ctx, layout)
    const expAvgSq = new FlatBuffer(ctx, layout)
    this.#buffers = [expAvg, expAvgSq]
    const mixed = trained.filter((parameter) => parameter.dtype !== 'float32')
    const master = mixed.length > 0 ? new FlatBuffer(ctx, new FlatLayout(mixed)) : null
    if (master !== null) this.#buffers.push(master)
    this.#slots = trained.map((parameter) => ({
      parameter,
      expAvg: expAvg.view(ctx, parameter).keep(),
      expAvgSq: expAvgSq.view(ctx, parameter).keep(),
      master: master !== null && parameter.dtype !== 'float32' ? master.view(ctx, parameter).keep() : null,
    }))
    this.#step = Tensor.zeros(ctx, [4], 'float32').keep()
    this.masterFromModel(ctx)
  }

  /** Master weights become the model's weights: after the model was loaded without optimizer state. */
  masterFromModel(ctx: Ctx): void {
    for (const { parameter, master } of this.#slots) {
      if (master !== null) native.copy(ctx.stream.id, master.handle, parameter.data.handle)
    }
  }

  /** One update of all parameters from their main gradients, enqueued. */
  step(ctx: Ctx, { lr, factor }: AdamWStep): void {
    const { adamBeta1, adamBeta2, adamEps, weightDecay } = this.options
    this.updates++
    const slots = Float32Array.of(lr, 1 - adamBeta1 ** this.updates, 1 - adamBeta2 ** this.updates, factor)
    native.upload(ctx.stream.id, this.#step.handle, slots)
    for (const { parameter, expAvg, expAvgSq, master } of this.#slots) {
      native.adamw(
        ctx.stream.id,
        (master ?? parameter.data).handle,
        expAvg.handle,
        expAvgSq.handle,
        master === null ? 0 : parameter.data.handle,
        (parameter.mainGrad as Tensor).handle,
        this.#step.handle,
        adamBeta1,
        adamBeta2,
        adamEps,
        parameter.decays ? weightDecay : 0,
      )
    }
  }

  /** State for checkpoints, sharded as the parameters are. Tensors stay the optimizer's. */
  *state(): Generator<OptimizerTensor> {
    for (const { parameter, expAvg, expAvgSq, master } of this.#slots) {
      const { shard, name } = parameter
      yield { name: `optimizer.exp_avg.${name}`, dtype: 'float32', tensor: expAvg, shard }
      yield { name: `optimizer.exp_avg_sq.${name}`, dtype: 'float32', tensor: expAvgSq, shard }
      if (master !== null) yield { name: `optimizer.master.${name}`, dtype: 'float32', tensor: master, shard }
    }
  }

  dispose(): void {
    for (const { expAvg, expAvgSq, master } of this.#slots) {
      expAvg.dispose()
      expAvgSq.dispose()
      master?.dispose()
    }
    for (const buffer of this.#buffers) buffer.dispose()
    this.#step.dispose()
    this.gradients.dispose()
  }
}

/**
 * The factor of the gradients: 1 / tokens, times maxNorm / (norm + 1e-6) where the norm of the mean gradient is larger than
 * maxNorm (torch.nn.utils.clip_grad_norm_'s rule).
 * @param sumOfSquares - of the summed gradients, over all ranks.
 * @returns the factor and the norm of the mean gradient before clipping.
 */
export function gradientFactor(
  sumOfSquares: number,
  tokens: number,
  maxNorm: number,
): { factor: number; norm: number } {
  const norm = Math.sqrt(sumOfSquares) / tokens
  const clip = maxNorm > 0 ? Math.min(1, maxNorm / (norm + 1e-6)) : 1
  return { factor: clip / tokens, norm }
}
