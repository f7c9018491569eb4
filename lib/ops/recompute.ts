// Recompute: a stretch of the forward pass that saves its inputs only and runs again in the backward pass, under a tape of its own, or
// one output that its op makes again. Randomness is by place, so the second run draws the same numbers without any stored state.

import type { Ctx } from '../tensor/ctx.js'
import { withScope } from '../tensor/scope.js'
import { Tensor } from '../tensor/tensor.js'
import { Tape } from './tape.js'

/**
 * Frees an output of an op that can make it again (rmsNorm, layerNorm, attention, gatedActivation) once its readers have run. Under a tape it is made
 * again, from what the op saved, when the backward pass comes to the first of them; nobody may write into it in between.
 */
export function recomputeOutput(ctx: Ctx, output: Tensor): void {
  ;(ctx.tape as Tape | null)?.giveUp(output)
  output.dispose()
}

/**
 * Runs f without saving its activations; runs it again in the backward pass.
 * @param inputs - every tensor through which a gradient enters f; parameters are found by f itself.
 * @param reads - other tensors that f reads (tables, masks): kept alive until then. The random slot and the batch's
 * coordinates of the context are kept as well.
 * @returns what f returns: a tensor, or a list of tensors with null where one is absent.
 */
export async function recompute<R extends Tensor | readonly (Tensor | null)[]>(
  ctx: Ctx,
  inputs: readonly Tensor[],
  f: (ctx: Ctx, inputs: readonly Tensor[]) => Promise<R>,
  reads: readonly (Tensor | null)[] = [],
): Promise<R> {
  const tape = ctx.tape as Tape | null
  if (tape === null) return await f(ctx, inputs)
  const result = await withScope(ctx.with({ tape: null }), (inner) => f(inner, inputs))
  const outputs = Array.isArray(result) ? (result as readonly (Tensor | null)[]) : [result as Tensor]
  const { rng, batch } = ctx
  const saved = [...inputs, rng.rngSlot, batch?.sampleIds, batch?.positions, ...reads].filter(
    (t) => t instanceof Tensor,
  )
  let inner: Tape | null = null
  tape.record({
    name: 'recompute',
    inputs,
    outputs,
    saved,
    weights: [],
    hidesWeights: true,
    async backwardInput(bctx, dOutputs, wanted, options) {
      inner = new Tape()
      for (let i = 0; i < inputs.length; i++) if (wanted[i]) inner.watch(inputs[i] as Tensor)
      const again = await withScope(bctx.with({ tape: inner, rng, batch }), (c) => f(c, inputs))
      const list = Array.isArray(again) ? (again as readonly (Tensor | null)[]) : [again as Tensor]
      const reached = list.flatMap((t, i) => (t !== null && dOutputs[i] ? [[t, dOutputs[i] as Tensor] as const] : []))
      const gradients = await inner.backward(
        bctx,
        reached.map(([t]) => t),
        reached.map(([, d]) => d),
        options,
      )
      return inputs.map((t) => gradients.get(t) ?? null)
    },
    async backwardWeight(bctx, _dOutputs, options) {
      await inner?.backwardWeight(bctx, options)
    },
    dispose() {
      inner?.dispose()
      inner = null
    },
  })
  return result
}
