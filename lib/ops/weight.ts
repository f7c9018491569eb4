// What ops need to know of a parameter. `Parameter` (lib/nn) satisfies it. Main gradients are float32, made of zeros at their
// first use and kept by the parameter; every backward pass adds to them.

import { native } from '../addon/load.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'

/** A tensor that may be trained. */
export interface TrainableWeight {
  readonly name: string
  readonly data: Tensor
  readonly requiresGrad: boolean
  /** float32, of data's shape; null until the first gradient. */
  mainGrad: Tensor | null
}

/** The main gradient to add to; zeros when there was none. */
export function mainGradOf(ctx: Ctx, weight: TrainableWeight): Tensor {
  if (weight.mainGrad !== null) return weight.mainGrad
  const zeros = ctx.empty(weight.data.shape, 'float32')
  native.fill(ctx.stream.id, zeros.handle, 0)
  weight.mainGrad = zeros.keep()
  return zeros
}
