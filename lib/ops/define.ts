// defineOp: all that there is to know about an op in one object. The forward rule gets its outputs allocated by the shape
// rule; the backward rules read the same arguments and outputs, of which only what `saves` names is still alive by then.
import { ViaductError } from '../base/errors.js'
import type { DType } from '../base/dtype.js'
import type { Shape } from '../base/shape.js'
import type { Ctx } from '../tensor/ctx.js'
import type { Tensor } from '../tensor/tensor.js'
import type { TapeRecord } from './tape.js'
import type { TrainableWeight } from './weight.js'

/** Shape and dtype of an output, or `inPlace`: the output is the input's memory, with the input's shape or another. */
export type OutputSpec =
  | { readonly shape: Shape; readonly dtype: DType }
  | { readonly inPlace: Tensor; readonly shape?: Shape }

type Outputs = Readonly<Record<string, Tensor | null>>
type Maybe<T> = T | null | undefined

/** Gradients by output name; null where none arrived. */
export type OutputGradients<O extends Outputs> = { readonly [K in keyof O]: Tensor | null }

/** What an op is. `A`: its arguments by name; `O`: its outputs by name, null where an optional one was not asked for. */
export interface OpRule<A extends object, O extends Outputs> {
  readonly name: string
  /** Checks the arguments (native code checks again what it reads) and says what comes out. */
  shapes(args: A): { readonly [K in keyof O]: OutputSpec | null }
  /** Enqueues the work into `out`. */
  forward(ctx: Ctx, args: A, out: O): void
  /** Arguments that a gradient may flow to, in the order of backwardInput's results. */
  inputs?(args: A): readonly Maybe<Tensor>[]
  weights?(args: A): readonly Maybe<TrainableWeight>[]
  /** Arguments and outputs that the backward rules read. */
  saves?(args: A, out: O): readonly Maybe<Tensor>[]
  backwardInput?(
    ctx: Ctx,
    args: A,
    out: O,
    d: OutputGradients<O>,
    wanted: readonly boolean[],
  ): readonly (Tensor | null)[]
  /** Adds to main gradients of the weights that require one. */
  backwardWeight?(ctx: Ctx, args: A, out: O, d: OutputGradients<O>): void
}

/** An op: call it to enqueue it, and to record it when the context has a tape. */
export type Op<A extends object, O extends Outputs> = ((ctx: Ctx, args: A) => O) & { readonly rule: OpRule<A, O> }

function present<T>(list: readonly Maybe<T>[] | undefined): T[] {
  if (list === undefined) return []
  return list.filter((t): t is T => t !== null && t !== undefined)
}

/**
 * Makes an op of its rule.
 * @throws ERR_SHAPE, ERR_DTYPE, ERR_LAYOUT at the call when the arguments do not fit.
 */
export function defineOp<A extends object, O extends Outputs>(rule: OpRule<A, O>): Op<A, O> {
  const op = (ctx: Ctx, args: A): O => {
    const specs = rule.shapes(args)
    const out: Record<string, Tensor | null> = {}
    for (const key in specs) {
      const spec = specs[key]
      if (!spec) out[key] = null
      else if ('inPlace' in spec) out[key] = spec.shape ? spec.inPlace.reshape(ctx, spec.shape) : ctx.alias(spec.inPlace)
      else out[key] = ctx.empty(spec.shape, spec.dtype)
    }
    rule.forward(ctx, args, out as O)
    if (ctx.tape !== null) ctx.tape.record(recordOf(rule, args, out as O))
    return out as O
  }
  return Object.assign(op, { rule })
}

function recordOf<A extends object, O extends Outputs>(rule: OpRule<A, O>, args: A, out: O): TapeRecord {
  const names = Object.keys(out)
  const weights = present(rule.weights?.(args))
  const byName = (dOutputs: readonly (Tensor | null)[]): OutputGradients<O> =>
    Object.fromEntries(names.map((name, i) => [name, dOutputs[i] ?? null])) as OutputGradients<O>
  const record: TapeRecord = {
    name: rule.name,
    inputs: (rule.inputs?.(args) ?? []).map((t) => t ?? null),
    outputs: Object.values(out),
    saved: present(rule.saves?.(args, out)),
    weights,
    backwardInput: (ctx, dOutputs, wanted) => rule.backwardInput?.(ctx, args, out, byName(dOutputs), wanted) ?? [],
  }
  if (rule.backwardWeight === undefined || !weights.some((w) => w.requiresGrad)) return record
  return { ...record, backwardWeight: (ctx, dOutputs) => rule.backwardWeight?.(ctx, args, out, byName(dOutputs)) }
}

/** Throws ERR_SHAPE unless the tensor has `rank` dims. */
export function checkRank(op: string, name: string, t: Tensor, rank: number): void {
  if (t.shape.length === rank) return
  throw new ViaductError('ERR_SHAPE', op, `expected ${name} with ${rank} dims, got [${t.shape}]`)
}

/** Throws ERR_SHAPE unless the condition holds. */
export function checkShape(condition: boolean, op: string, expected: string, ...got: readonly Tensor[]): void {
  if (condition) return
  throw new ViaductError('ERR_SHAPE', op, `expected ${expected}, got ${got.map((t) => `[${t.shape}]`).join(' and ')}`)
}
