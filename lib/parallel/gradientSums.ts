// Sums of gradients that ShardSpec asks for, besides the data-parallel one: parts of a parameter that several ranks hold and of
// whose gradient each sees a share. See the table in docs/runtime.md, section 7.

import { native } from '../addon/load.js'
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

/** Gradients of all but experts over the ranks that share each sequence. Training sums them with the buckets of `dp_cp` instead. */
export function sumContextGradients(ctx: Ctx, parameters: Iterable<Parameter>): void {
  for (const { shard, mainGrad } of parameters)
    if (shard.copies !== 'edp' && mainGrad !== null) allReduce(ctx, mainGrad, ctx.groups.get('cp'))
}

/**
 * Gradients of experts where every data-parallel rank ran the same batch: each copy saw the tokens of some ranks, and each token came
 * once from every data-parallel rank. Training sums them with the buckets of `edp` instead.
 */
export function sumExpertGradients(ctx: Ctx, parameters: Iterable<Parameter>): void {
  const share = ctx.empty([1], 'float32')
  native.fill(ctx.stream.id, share.handle, 1 / ctx.groups.get('dp').size)
  for (const { shard, mainGrad } of parameters) {
    if (shard.copies !== 'edp' || mainGrad === null) continue
    allReduce(ctx, mainGrad, ctx.groups.get('edp'))
    native.scale(ctx.stream.id, mainGrad.handle, share.handle)
  }
}
