// Memory and first values of parameters. Values are drawn by logical place: key (seed, hash of the name), counter the index in the
// logical tensor, so that every layout begins with the same model.
import { native } from '../addon/load.js'
import { nameHash } from '../base/nameHash.js'
import { contiguousStrides } from '../base/shape.js'
import type { Parameter } from '../nn/parameter.js'
import type { Ctx } from '../tensor/ctx.js'
import { volume } from '../tensor/region.js'
import { Tensor } from '../tensor/tensor.js'

/** Gives a parameter its memory; what lies outside its blocks (padding) is 0, the rest has no content yet. */
export function allocateParameter(ctx: Ctx, parameter: Parameter): void {
  const { localShape, blocks } = parameter.shard
  const data = Tensor.empty(ctx, localShape, parameter.dtype).keep()
  parameter.data = data
  const filled = blocks.reduce((n, block) => n + volume(block.size), 0)
  if (filled < volume(localShape)) native.fill(ctx.stream.id, data.handle, 0)
}

/** Draws a parameter's first values. @param seed - of the run; equal on every rank. */
export function initializeParameter(ctx: Ctx, parameter: Parameter, seed: number): void {
  const { init, shard, data, name } = parameter
  const hash = nameHash(name)
  const logicalStride = contiguousStrides(shard.logicalShape)
  for (const block of shard.blocks) {
    const offset = block.localStart.reduce((sum, start, d) => sum + start * (data.strides[d] as number), 0)
    const part = data.view(ctx, block.size, data.strides, offset)
    if (init.kind === 'constant') native.fill(ctx.stream.id, part.handle, init.value)
    else native.randomNormal(ctx.stream.id, part.handle, seed, hash, block.globalStart, logicalStride, 0, init.std)
    part.dispose()
  }
}
