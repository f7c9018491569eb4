// A tensor: a handle of the addon with shape, strides and dtype, and a count of references. Freed by its scope, its tape or
// its keeper, never by garbage collection. Ownership rules: docs/runtime.md, section 2. Arithmetic lives in lib/ops.
import type { Dims } from '../addon/functions.js'
import { native } from '../addon/load.js'
import { type DType, dtypeBytes, dtypes } from '../base/dtype.js'
import { envFlag } from '../base/env.js'
import { assert, ViaductError } from '../base/errors.js'
import {
  contiguousStrides,
  formatShape,
  isContiguous,
  numel,
  resolveDim,
  resolveShape,
  type Shape,
  sameShape,
} from '../base/shape.js'
import type { Ctx } from './ctx.js'
import { decodeFloat32, encodeHost, type HostData } from './host.js'
import type { Scope } from './scope.js'
import type { Stream } from './stream.js'

interface Traces {
  readonly made: string
  freed: string
}

let debugging: boolean | undefined
const traces = new WeakMap<Tensor, Traces>()
const leaks = new FinalizationRegistry<{ handle: number; made: string }>(({ handle, made }) => {
  process.emitWarning(`[tensor] handle ${handle} was never freed; made at\n${made}`, 'ViaductLeak')
})

function stackHere(): string {
  return (new Error().stack ?? '').split('\n').slice(3, 9).join('\n')
}

function codeOf(dtype: DType): number {
  const code = dtypes[dtype].code
  if (code >= 0) return code
  throw new ViaductError(
    'ERR_DTYPE',
    'tensor',
    `expected a dtype of tensors, got ${dtype}, which travels only as bytes in files`,
  )
}

// The addon reads these at the call, many times as fast as plain arrays. By number of dims.
const byRank = () => Array.from({ length: 7 }, (_, rank) => new Float64Array(rank))
const shapesOut = byRank()
const stridesOut = byRank()

function packed(into: readonly Float64Array[], dims: readonly number[]): Dims {
  const out = into[dims.length]
  if (out === undefined) return dims // too many: the addon says so
  for (let i = 0; i < dims.length; i++) out[i] = dims[i] as number
  return out
}

export class Tensor {
  #handle: number
  #references = 1
  #owned = true
  /** Without memory until `refill`. */
  #evicted = false
  #comeBack: (() => void) | null = null
  /** Writes that the storage's own count does not know: those into memory that was given up. */
  #earlierWrites = 0

  /** The scope that owns the first reference; null once kept, disposed or moved to no scope. Set by Scope. */
  scope: Scope | null = null

  /**
   * Wraps a live handle of the addon; the new object owns it. Ops use `Tensor.empty`.
   * @param strides - in elements.
   * @param stream - orders this tensor's host copies: where it was allocated.
   */
  constructor(
    handle: number,
    /** Dimensions, outermost first. */
    readonly shape: Shape,
    readonly strides: readonly number[],
    readonly dtype: DType,
    readonly stream: Stream,
  ) {
    this.#handle = handle
    debugging ??= envFlag('VIADUCT_DEBUG_HANDLES')
    if (debugging) {
      const made = stackHere()
      traces.set(this, { made, freed: '' })
      leaks.register(this, { handle, made }, this)
    }
  }

  /** Memory without content, contiguous, owned by `ctx.scope`. @throws ERR_OUT_OF_MEMORY */
  static empty(ctx: Ctx, shape: Shape, dtype: DType): Tensor {
    const handle = native.empty(ctx.stream.id, packed(shapesOut, shape), codeOf(dtype))
    const tensor = new Tensor(handle, shape, contiguousStrides(shape), dtype, ctx.stream)
    ctx.scope.track(tensor)
    return tensor
  }

  /** As `empty`, filled with 0. */
  static zeros(ctx: Ctx, shape: Shape, dtype: DType): Tensor {
    return Tensor.full(ctx, shape, dtype, 0)
  }

  /** As `empty`, filled with `value`. */
  static full(ctx: Ctx, shape: Shape, dtype: DType, value: number): Tensor {
    const tensor = Tensor.empty(ctx, shape, dtype)
    native.fill(ctx.stream.id, tensor.handle, value)
    return tensor
  }

  /**
   * A tensor with a copy of host data: numbers, a typed array of the dtype, or raw bytes.
   * @throws ERR_SHAPE when the count is wrong.
   */
  static fromHost(ctx: Ctx, data: HostData, shape: Shape, dtype: DType): Tensor {
    const bytes = encodeHost(data, dtype, numel(shape), 'fromHost')
    const tensor = Tensor.empty(ctx, shape, dtype)
    native.upload(ctx.stream.id, tensor.handle, bytes)
    return tensor
  }

  /** The native handle. @throws ERR_HANDLE after the tensor was freed. */
  get handle(): number {
    if (this.#handle === 0) this.#useAfterFree()
    return this.#handle
  }

  /** Number of elements. */
  get numel(): number {
    return numel(this.shape)
  }

  /** Bytes of the elements. */
  get byteLength(): number {
    return numel(this.shape) * dtypeBytes(this.dtype)
  }

  /** Row-major without gaps. */
  get isContiguous(): boolean {
    return isContiguous(this.shape, this.strides)
  }

  /** How often the storage was written; views share it. */
  get version(): number {
    return this.#earlierWrites + (this.#evicted ? 0 : native.version(this.handle))
  }

  /** References that are held: 1 is the first owner's alone. 0 after the tensor was freed. */
  get references(): number {
    return this.#references
  }

  /** True once the last reference was dropped. */
  get isFreed(): boolean {
    return this.#references === 0
  }

  /** True while the tensor has no memory: between `evict` and `refill`. */
  get isEvicted(): boolean {
    return this.#evicted
  }

  /**
   * Gives up the memory, or this tensor's share of it, whoever holds references; they wait for `refill`.
   * @param comeBack - refills it for the tape, which calls it before a backward pass reads the tensor.
   */
  evict(comeBack: (() => void) | null = null): void {
    const handle = this.handle
    this.#comeBack = comeBack
    this.#earlierWrites = this.version
    this.#evicted = true
    this.#handle = 0
    native.free(handle)
  }

  /** Refills an evicted tensor, where `evict` was told how. */
  comeBack(): void {
    if (this.#evicted) this.#comeBack?.()
  }

  /**
   * Takes over the memory of `source`, which has the bytes that this tensor had and is freed; whoever holds this one sees no change.
   * @throws ERR_ASSERT unless the tensor was evicted and both are alike.
   */
  refill(source: Tensor): void {
    const alike =
      source.dtype === this.dtype && sameShape(source.shape, this.shape) && sameShape(source.strides, this.strides)
    assert(this.#evicted && alike, `${this.toString()} cannot get memory of ${source.toString()}`)
    this.#evicted = false
    if (this.#references === 0) return source.dispose()
    this.#handle = source.#takeHandle()
    this.#earlierWrites -= native.version(this.#handle)
  }

  /** Adds a reference: the tensor lives until as many `release()` calls. Returns itself. */
  retain(): this {
    if (this.#references === 0) this.#useAfterFree()
    this.#references++
    return this
  }

  /** Drops a reference that `retain()` added; the last one frees the tensor. */
  release(): void {
    if (this.#references === 0) this.#useAfterFree()
    if (--this.#references > 0) return
    if (!this.#evicted) native.free(this.#handle)
    this.#forget()
  }

  /** The handle, which somebody else frees; the tensor is freed for all others. */
  #takeHandle(): number {
    const handle = this.handle
    this.#references = 0
    this.#forget()
    return handle
  }

  #forget(): void {
    this.#handle = 0
    this.#owned = false
    this.scope = null
    if (debugging) {
      leaks.unregister(this)
      const trace = traces.get(this)
      if (trace !== undefined) trace.freed = stackHere()
    }
  }

  /** Takes the tensor out of its scope: the caller owns it and disposes it. Returns itself. */
  keep(): this {
    if (this.#references === 0) this.#useAfterFree()
    this.scope = null
    return this
  }

  /** Drops the first reference, whoever owns it. Idempotent. A tape that retained the tensor still has it. */
  dispose(): void {
    if (!this.#owned) return
    this.#owned = false
    this.scope = null
    this.release()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /**
   * A view of the same storage, owned by `ctx.scope`. `offset` counts elements from this tensor's first.
   * @throws ERR_SHAPE when an element would lie outside of the storage.
   */
  view(ctx: Ctx, shape: Shape, strides: readonly number[], offset = 0): Tensor {
    const handle = native.view(this.handle, packed(shapesOut, shape), packed(stridesOut, strides), offset)
    const tensor = new Tensor(handle, shape, strides, this.dtype, this.stream)
    ctx.scope.track(tensor)
    return tensor
  }

  /** A view with another shape; one entry may be -1. @throws ERR_LAYOUT when this tensor is not contiguous. */
  reshape(ctx: Ctx, shape: Shape): Tensor {
    const resolved = resolveShape(shape, this.numel, 'reshape')
    if (!this.isContiguous) {
      throw new ViaductError(
        'ERR_LAYOUT',
        'reshape',
        `expected a contiguous tensor, got ${this.toString()}: copy it first`,
      )
    }
    return this.view(ctx, resolved, contiguousStrides(resolved))
  }

  /** A view of `length` entries of one dim, from `start`; a negative dim counts from the end. */
  slice(ctx: Ctx, dim: number, start: number, length: number): Tensor {
    const axis = resolveDim(dim, this.shape.length, 'slice')
    const size = this.shape[axis] as number
    if (!(start >= 0 && length >= 0 && start + length <= size)) {
      throw new ViaductError(
        'ERR_SHAPE',
        'slice',
        `expected a part of 0 to ${size}, got ${start} to ${start + length} of dim ${axis}`,
      )
    }
    const shape = [...this.shape]
    shape[axis] = length
    return this.view(ctx, shape, this.strides, start * (this.strides[axis] as number))
  }

  /** A view with the dims in another order. */
  permute(ctx: Ctx, order: readonly number[]): Tensor {
    const dims = order.map((dim) => resolveDim(dim, this.shape.length, 'permute'))
    if (dims.length !== this.shape.length || new Set(dims).size !== dims.length) {
      throw new ViaductError(
        'ERR_SHAPE',
        'permute',
        `expected each of ${this.shape.length} dims once, got ${formatShape(order)}`,
      )
    }
    const shape = dims.map((dim) => this.shape[dim] as number)
    return this.view(
      ctx,
      shape,
      dims.map((dim) => this.strides[dim] as number),
    )
  }

  /** The elements' bytes in row-major order; at most 2^31 - 1. Rejects with the stream's error if it failed. */
  async bytes(): Promise<Uint8Array> {
    return new Uint8Array(await this.#download(this.dtype))
  }

  /** The elements as float32, row-major; floats are cast on the device. */
  async toFloat32Array(): Promise<Float32Array> {
    const cast = dtypes[this.dtype].isFloat && this.dtype !== 'bfloat16' ? 'float32' : this.dtype
    return decodeFloat32(await this.#download(cast), cast, 'toFloat32Array')
  }

  /** The only element as a number. @throws ERR_SHAPE when there are several. */
  async item(): Promise<number> {
    if (this.numel !== 1) throw new ViaductError('ERR_SHAPE', 'item', `expected one element, got ${this.toString()}`)
    if (this.dtype === 'float64') return new Float64Array(await this.#download('float64'))[0] as number
    if (this.dtype === 'int64') return Number(new BigInt64Array(await this.#download('int64'))[0])
    if (this.dtype === 'int32') return new Int32Array(await this.#download('int32'))[0] as number
    return (await this.toFloat32Array())[0] as number
  }

  /** `float32 [2, 3]`, with strides where they are not row-major. */
  toString(): string {
    const strides = this.isContiguous ? '' : ` strides ${formatShape(this.strides)}`
    return `${this.dtype} ${formatShape(this.shape)}${strides}`
  }

  #download(dtype: DType): Promise<ArrayBuffer> {
    const stream = this.stream.id
    if (dtype === this.dtype && this.isContiguous) return native.download(stream, this.handle)
    const copy = native.empty(stream, this.shape, codeOf(dtype))
    try {
      native.copy(stream, copy, this.handle)
      return native.download(stream, copy)
    } finally {
      native.free(copy)
    }
  }

  #useAfterFree(): never {
    if (this.#evicted)
      throw new ViaductError(
        'ERR_HANDLE',
        'tensor',
        `expected a tensor with memory, got ${this.toString()} whose memory was given up until the backward pass`,
      )
    const trace = traces.get(this)
    throw new ViaductError(
      'ERR_HANDLE',
      'tensor',
      `expected a live tensor, got ${this.toString()} after it was freed${trace === undefined ? ': set VIADUCT_DEBUG_HANDLES=1 to see where' : `; freed at\n${trace.freed}\nmade at\n${trace.made}`}`,
    )
  }
}
