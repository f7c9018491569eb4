// Sums of gradients that ShardSpec asks for, besides the data-parallel one: parts of a parameter that several ranks hold and of
// whose gradient each sees a share. See the table in docs/runtime.md, section 7.

import type { Parameter } from '../nn/parameter.js'
import type { Ctx } from '../tensor/ctx.js'
import { allReduce } from './collectives.js'

/** The axes over which blocks of its gradient are summed, besides the data-parallel one, where that is more than one rank. */
export function sharedAxes(ctx: Ctx, { shard, requiresGrad }: Parameter): string[] {
  const axes = requiresGrad ? new Set(shard.blocks.flatMap((block) => block.gradSum)) : []
  return [...axes].filter((axis) => ctx.groups.get(axis).size > 1)
}

/** Sums each block's main gradient over the axes that its shard names. Call once for each, after its last backward pass of a step. */
export function sumSharedGradients(ctx: Ctx, parameters: Iterable<Parameter>): void {
  for (const parameter of parameters) {
    if (!parameter.requiresGrad || parameter.mainGrad === null) continue
    for (const block of parameter.shard.blocks) {
      for (const axis of block.gradSum) {
        const group = ctx.groups.get(axis)
        if (group.size === 1) continue
        // Blocks are runs of rows, so a block is contiguous.
        using part = parameter.mainGrad.slice(ctx, 0, block.localStart[0] as number, block.size[0] as number)
        allReduce(ctx, part, group)
      }
    }
  }
}
