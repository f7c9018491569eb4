// defineOp: all that there is to know about an op in one object. The forward rule gets its outputs allocated by the shape
// rule; the backward rules read the same arguments and outputs, of which only what `saves` names is still alive by then.

import type { DType } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
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
  /** Outputs whose memory may be given up until the backward pass: `remake` makes them again. */
  remade?(out: O): readonly Tensor[]
  /** As `forward`, into tensors like `remade`, from the arguments and outputs that the backward rules read besides. */
  remake?(ctx: Ctx, args: A, out: O, into: readonly Tensor[]): void
  /** Adds to main gradients of the weights that require one. */
  backwardWeight?(ctx: Ctx, args: A, out: O, d: OutputGradients<O>): void
  /** Both backward rules at once, where an op can have more of them beside each other than one behind the other. */
  backward?(ctx: Ctx, args: A, out: O, d: OutputGradients<O>, wanted: readonly boolean[]): readonly (Tensor | null)[]
}

/** An op: call it to enqueue it, and to record it when the context has a tape. */
export type Op<A extends object, O extends Outputs> = ((ctx: Ctx, args: A) => O) & { readonly rule: OpRule<A, O> }

/**
 * Makes an op of its rule.
 * @throws ERR_SHAPE, ERR_DTYPE, ERR_LAYOUT at the call when the arguments do not fit.
 */
export function defineOp<A extends object, O extends Outputs>(rule: OpRule<A, O>): Op<A, O> {
  let names: string[] | null = null
  const op = (ctx: Ctx, args: A): O => {
    const specs = rule.shapes(args)
    names ??= Object.keys(specs)
    const out: Record<string, Tensor | null> = {}
    const outputs: (Tensor | null)[] = []
    for (const name of names) {
      const output = outputOf(ctx, specs[name])
      out[name] = output
      outputs.push(output)
    }
    rule.forward(ctx, args, out as O)
    if (ctx.tape !== null) ctx.tape.record(new OpRecord(rule, names, args, out as O, outputs))
    return out as O
  }
  return Object.assign(op, { rule })
}

function outputOf(ctx: Ctx, spec: OutputSpec | null | undefined): Tensor | null {
  if (!spec) return null
  if (!('inPlace' in spec)) return ctx.empty(spec.shape, spec.dtype)
  return spec.shape ? spec.inPlace.reshape(ctx, spec.shape) : ctx.alias(spec.inPlace)
}

function present<T>(list: readonly Maybe<T>[]): readonly T[] {
  for (const item of list)
    if (item === null || item === undefined) return list.filter((t): t is T => t !== null && t !== undefined)
  return list as readonly T[]
}

const none: readonly never[] = []

/** One call of an op on the tape. A class, not closures: one is made for each op of a step. */
class OpRecord<A extends object, O extends Outputs> implements TapeRecord {
  readonly inputs: readonly (Tensor | null)[]
  readonly saved: readonly Tensor[]
  readonly weights: readonly TrainableWeight[]
  readonly backward?: NonNullable<TapeRecord['backward']>

  constructor(
    readonly rule: OpRule<A, O>,
    readonly names: readonly string[],
    readonly args: A,
    readonly out: O,
    readonly outputs: readonly (Tensor | null)[],
  ) {
    this.inputs = rule.inputs ? (rule.inputs(args) as readonly (Tensor | null)[]) : none
    this.saved = rule.saves ? present(rule.saves(args, out)) : none
    this.weights = rule.weights ? present(rule.weights(args)) : none
    if (rule.backward)
      this.backward = (ctx, dOutputs, wanted) =>
        rule.backward?.(ctx, this.args, this.out, this.#named(dOutputs), wanted) ?? none
  }

  get name(): string {
    return this.rule.name
  }

  backwardInput(
    ctx: Ctx,
    dOutputs: readonly (Tensor | null)[],
    wanted: readonly boolean[],
  ): readonly (Tensor | null)[] {
    return this.rule.backwardInput
      ? this.rule.backwardInput(ctx, this.args, this.out, this.#named(dOutputs), wanted)
      : none
  }

  get remade(): readonly Tensor[] {
    return this.rule.remade?.(this.out) ?? none
  }

  remake(ctx: Ctx, into: readonly Tensor[]): void {
    this.rule.remake?.(ctx, this.args, this.out, into)
  }

  backwardWeight(ctx: Ctx, dOutputs: readonly (Tensor | null)[]): void {
    this.rule.backwardWeight?.(ctx, this.args, this.out, this.#named(dOutputs))
  }

  #named(dOutputs: readonly (Tensor | null)[]): OutputGradients<O> {
    const named: Record<string, Tensor | null> = {}
    for (let i = 0; i < this.names.length; i++) named[this.names[i] as string] = dOutputs[i] ?? null
    return named as OutputGradients<O>
  }
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
