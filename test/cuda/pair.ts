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
