// Dropout by place: an element's draw depends on seed, step, sample, position, site and channel alone, so every layout drops the
// same elements and the backward pass is the same call on the gradient.
import { native } from '../addon/load.js'
import { ViaductError } from '../base/errors.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import { defineOp } from './define.js'
import { isExclusive } from './tape.js'

export interface DropoutArgs {
  /** [T, C]; overwritten. */
  readonly x: Tensor
  /** Share of elements that become 0, [0, 1). The others grow by 1/(1-p). */
  readonly p: number
  /** Which dropout of the model this is: a number that no other place uses. */
  readonly site: number
  /** Logical channel of x's first column. Default 0. */
  readonly channelStart?: number
}

interface Placed extends DropoutArgs {
  readonly rng: Tensor
  readonly sampleIds: Tensor
  readonly positions: Tensor
}

const dropoutOp = defineOp<Placed, { y: Tensor }>({
  name: 'dropout',
  shapes: ({ x }) => ({ y: { inPlace: x } }),
  forward: (ctx, args, { y }) => enqueue(ctx, args, y, y),
  inputs: ({ x }) => [x],
  saves: ({ rng, sampleIds, positions }) => [rng, sampleIds, positions],
  backwardInput(ctx, args, _, { y: dy }) {
    if (dy === null) return [null]
    const dx = isExclusive(dy) ? dy : ctx.empty(dy.shape, dy.dtype)
    enqueue(ctx, args, dx, dy)
    return [dx]
  },
})

function enqueue(ctx: Ctx, { rng, sampleIds, positions, site, channelStart, p }: Placed, y: Tensor, x: Tensor): void {
  native.dropout(
    ctx.stream.id,
    y.handle,
    x.handle,
    rng.handle,
    sampleIds.handle,
    positions.handle,
    site,
    channelStart ?? 0,
    p,
  )
}

/** x with a share p of its elements dropped, in place. p = 0 returns x. @throws ERR_CONFIG without rng or batch coordinates. */
export function dropout(ctx: Ctx, args: DropoutArgs): Tensor {
  if (args.p === 0) return args.x
  const rng = ctx.rng.rngSlot
  if (rng === null || ctx.batch === null) {
    throw new ViaductError(
      'ERR_CONFIG',
      'dropout',
      'expected a context with a random slot and the coordinates of its batch, got none: pass rng and batch',
    )
  }
  return dropoutOp(ctx, { ...args, rng, sampleIds: ctx.batch.sampleIds, positions: ctx.batch.positions }).y
}
