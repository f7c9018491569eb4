// Main gradients of a model: float32, in one buffer; their sums over ranks and their global norm. Gradients are sums over tokens;
// the division by the number of tokens happens in the optimizer's gradient factor.
import { native } from '../addon/load.js'
import type { Parameter } from '../nn/parameter.js'
import { allReduce } from '../parallel/collectives.js'
import { sumSharedGradients } from '../parallel/gradientSums.js'
import type { Ctx } from '../tensor/ctx.js'
import { withScope } from '../tensor/scope.js'
import { Tensor } from '../tensor/tensor.js'
import { FlatBuffer, type FlatLayout, type Range } from './flatBuffer.js'

/** Elements that one collective carries: 128 MiB. */
const bucketElements = 2 ** 25

export class Gradients {
  readonly #buffer: FlatBuffer
  readonly #owned: Range[]

  /** Gives each parameter its main gradient: a view of one buffer of zeros. */
  constructor(
    ctx: Ctx,
    readonly layout: FlatLayout,
  ) {
    this.#buffer = new FlatBuffer(ctx, layout)
    this.#owned = layout.ownedRanges()
    for (const parameter of layout.parameters) parameter.mainGrad = this.#buffer.view(ctx, parameter).keep()
  }

  /** Before the first micro-batch of a step. */
  zero(ctx: Ctx): void {
    this.#buffer.zero(ctx)
  }

  /** The buffer's place of a parameter. */
  view(ctx: Ctx, parameter: Parameter): Tensor {
    return this.#buffer.view(ctx, parameter)
  }

  /** After the last micro-batch: sums over the axes that shards name, then over data-parallel ranks, in float32. */
  async reduce(ctx: Ctx): Promise<void> {
    await sumSharedGradients(ctx, this.layout.parameters)
    const group = ctx.groups.get('dp')
    if (group.size === 1) return
    await withScope(ctx, (inner) => {
      for (let start = 0; start < this.layout.length; start += bucketElements) {
        const length = Math.min(bucketElements, this.layout.length - start)
        allReduce(inner, this.#buffer.range(inner, { start, length }), group)
      }
    })
  }

  /** Sum of squares of the gradients as they are on this rank, owned blocks only, in float64. */
  async sumOfSquares(ctx: Ctx): Promise<number> {
    return await withScope(ctx, async (inner) => {
      const acc = Tensor.zeros(inner, [1], 'float64')
      for (const range of this.#owned)
        native.sumSquares(ctx.stream.id, acc.handle, this.#buffer.range(inner, range).handle)
      return await acc.item()
    })
  }

  /** Names of parameters whose gradient on this rank has a value that is not finite. */
  async notFinite(ctx: Ctx): Promise<string[]> {
    const names: string[] = []
    for (const parameter of this.layout.parameters) {
      const sum = await withScope(ctx, async (inner) => {
        const acc = Tensor.zeros(inner, [1], 'float64')
        const view = this.#buffer.view(inner, parameter)
        native.sumSquares(ctx.stream.id, acc.handle, view.reshape(inner, [view.numel]).handle)
        return await acc.item()
      })
      if (!Number.isFinite(sum)) names.push(parameter.name)
    }
    return names
  }

  dispose(): void {
    for (const parameter of this.layout.parameters) {
      parameter.mainGrad?.dispose()
      parameter.mainGrad = null
    }
    this.#buffer.dispose()
  }
}
