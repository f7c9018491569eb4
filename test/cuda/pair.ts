// One program run on the CPU and on the GPU of gpu.ts, through the addon's functions: what both must give alike.
import { expect } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { type DType, dtypeBytes, dtypes } from '../../lib/base/dtype.js'
import { contiguousStrides, numel } from '../../lib/base/shape.js'
import { Device } from '../../lib/tensor/device.js'
import { bfloat16Bits } from '../../lib/tensor/host.js'
import { normals } from '../ops/normals.js'

/** Tensors of one device; all are freed by `close`. */
export class Bench {
  readonly #handles: number[] = []

  constructor(readonly device: Device) {}

  get stream(): number {
    return this.device.stream.id
  }

  /**
   * A tensor that begins `offset` elements behind an address of 512 bytes, with `gap` elements between its rows. Bytes that are
   * not given stay what new memory holds.
   */
  tensor(shape: readonly number[], dtype: DType, data?: ArrayBufferView, { offset = 0, gap = 0 } = {}): number {
    const code = dtypes[dtype].code
    const columns = shape.at(-1) ?? 1
    const rows = columns === 0 ? 0 : numel(shape) / columns
    const storage = this.#keep(native.empty(this.stream, [offset + rows * (columns + gap)], code))
    const strides = contiguousStrides([...shape.slice(0, -1), columns + gap])
    const view = this.#keep(native.view(storage, shape, strides, offset))
    if (data !== undefined) {
      const whole = this.#keep(native.empty(this.stream, shape, code))
      native.upload(this.stream, whole, data)
      native.copy(this.stream, view, whole)
    }
    return view
  }

  view(tensor: number, shape: readonly number[], strides: readonly number[], offset = 0): number {
    return this.#keep(native.view(tensor, shape, strides, offset))
  }

  /** The elements' bytes, row-major. */
  async read(tensor: number, shape: readonly number[], dtype: DType): Promise<Uint8Array> {
    const whole = this.#keep(native.empty(this.stream, shape, dtypes[dtype].code))
    native.copy(this.stream, whole, tensor)
    return new Uint8Array(await native.download(this.stream, whole))
  }

  close(): void {
    for (const handle of this.#handles.splice(0)) native.free(handle)
  }

  #keep(handle: number): number {
    this.#handles.push(handle)
    return handle
  }
}

/** Results of one program: bytes with the dtype that they are of. */
export type Results = readonly { readonly bytes: Uint8Array; readonly dtype: DType }[]

/** Runs the program on both devices: [CPU's results, GPU's results]. */
export async function onBoth(program: (bench: Bench) => Promise<Results>): Promise<[Results, Results]> {
  const results: Results[] = []
  for (const kind of ['cpu', 'cuda'] as const) {
    const bench = new Bench(Device.open(kind))
    try {
      results.push(await program(bench))
    } catch (error) {
      bench.device.stream.reset() // the next test is another one
      throw error
    } finally {
      bench.close()
    }
  }
  return [results[0]!, results[1]!]
}

/** Numbers of the normal distribution as a tensor's bytes. */
export function randomBytes(name: string, n: number, dtype: 'float32' | 'bfloat16'): ArrayBufferView {
  const next = normals(name)
  return dtype === 'float32'
    ? Float32Array.from({ length: n }, next)
    : Uint16Array.from({ length: n }, () => bfloat16Bits(next()))
}

/** The bytes of a float32 or bfloat16 tensor as numbers. */
export function numbers({ bytes, dtype }: Results[number]): Float32Array {
  const copy = Uint8Array.from(bytes).buffer
  if (dtype === 'float32') return new Float32Array(copy)
  const bits = Uint32Array.from(new Uint16Array(copy), (half) => half << 16)
  return new Float32Array(bits.buffer)
}

/** Fails unless both have the same bits. */
export async function sameBits(program: (bench: Bench) => Promise<Results>): Promise<void> {
  const [cpu, gpu] = await onBoth(program)
  expect(gpu.length).toBe(cpu.length)
  for (const [k, want] of cpu.entries()) {
    const got = gpu[k]!.bytes
    if (Buffer.compare(got, want.bytes) === 0) continue
    const width = want.bytes.length / Math.max(1, numbersIn(want))
    const at = want.bytes.findIndex((byte, i) => byte !== got[i])
    expect.fail(`result ${k} (${want.dtype}) differs first at element ${Math.floor(at / width)} of ${numbersIn(want)}`)
  }
}

function numbersIn({ bytes, dtype }: Results[number]): number {
  return bytes.length / dtypeBytes(dtype)
}

/** Fails unless each of the GPU's numbers is within `relative` of the largest of the CPU's. */
export async function close(relative: number, program: (bench: Bench) => Promise<Results>): Promise<void> {
  const [cpu, gpu] = await onBoth(program)
  for (const [k, result] of cpu.entries()) {
    const want = numbers(result)
    const got = numbers(gpu[k]!)
    const bound = relative * want.reduce((most, v) => Math.max(most, Math.abs(v)), 1e-30)
    const at = want.findIndex((value, i) => !(Math.abs(got[i]! - value) <= bound))
    if (at >= 0) expect.fail(`result ${k}, element ${at}: ${got[at]} for ${want[at]}, bound ${bound}`)
  }
}

/** Ids. */
export function whole(bench: Bench, values: readonly number[], dtype: 'int32' | 'int64'): number {
  const data = dtype === 'int32' ? Int32Array.from(values) : BigInt64Array.from(values, BigInt)
  return bench.tensor([values.length], dtype, data)
}

/** What models compute in. */
export type Float = 'float32' | 'bfloat16' | 'float16'

/** A tensor of a float type, from normal numbers of this width that are rounded to it. */
export function drawn(
  bench: Bench,
  name: string,
  shape: readonly number[],
  dtype: Float,
  { spread = 1, change = (_: Float32Array) => {}, ...at }: Drawn = {},
): number {
  const n = shape.reduce((a, b) => a * b, 1)
  const data = (randomBytes(name, n, 'float32') as Float32Array).map((x) => x * spread)
  change(data)
  const x = bench.tensor(shape, dtype, undefined, at)
  native.copy(bench.stream, x, bench.tensor(shape, 'float32', data))
  return x
}
export interface Drawn {
  spread?: number
  change?: (data: Float32Array) => void
  offset?: number
  gap?: number
}

/** A result of a program. */
export async function result(
  bench: Bench,
  tensor: number,
  shape: readonly number[],
  dtype: DType,
): Promise<Results[number]> {
  return { bytes: await bench.read(tensor, shape, dtype), dtype }
}

/** Fails unless each number is within `relative` of its own size, or within `absolute`. */
export function expectEach(got: Float32Array, want: Float32Array, relative: number, absolute = 0): void {
  const at = want.findIndex((value, i) => {
    if (!Number.isFinite(value)) return !Object.is(got[i], value)
    return !(Math.abs(got[i]! - value) <= Math.max(absolute, relative * Math.abs(value)))
  })
  if (at >= 0) expect.fail(`element ${at}: ${got[at]} for ${want[at]}`)
}

/** The CPU has no float16 op: there the dtype is float32. */
export function typeOn(bench: Bench, dtype: Float): Float {
  return dtype === 'float16' && bench.device.kind === 'cpu' ? 'float32' : dtype
}

/** As `drawn`; on the CPU the values of float16 are in float32. */
export function operand(bench: Bench, name: string, shape: readonly number[], dtype: Float, at: Drawn = {}): number {
  const x = drawn(bench, name, shape, dtype, at)
  if (typeOn(bench, dtype) === dtype) return x
  const { offset, gap } = at
  const wide = bench.tensor(shape, 'float32', undefined, {
    ...(offset === undefined ? {} : { offset }),
    ...(gap === undefined ? {} : { gap }),
  })
  native.copy(bench.stream, wide, x)
  return wide
}

/** A result as float32. */
export async function wideResult(bench: Bench, tensor: number, shape: readonly number[]): Promise<Results[number]> {
  const wide = bench.tensor(shape, 'float32')
  native.copy(bench.stream, wide, tensor)
  return result(bench, wide, shape, 'float32')
}

/** One rounding of the dtype, relative. */
export const rounding: Readonly<Record<Float, number>> = { float32: 2 ** -23, bfloat16: 2 ** -8, float16: 2 ** -11 }
