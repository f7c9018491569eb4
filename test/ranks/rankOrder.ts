// What a collective must give, computed on the host: sums in rank order, 16-bit floats accumulated in float32 and rounded once.
import type { DType } from '../../lib/base/dtype.js'
import type { Reduction } from '../../lib/parallel/collectives.js'
import { bfloat16Bits, bfloat16Value } from '../../lib/tensor/host.js'

export const reducedDtypes = [
  'float32',
  'bfloat16',
  'float16',
  'float64',
  'int64',
  'int32',
  'int16',
  'int8',
  'uint8',
  'uint16',
  'uint32',
  'uint64',
  'bool',
] as const satisfies readonly DType[]
export type ReducedDtype = (typeof reducedDtypes)[number]

type Values = { [index: number]: number | bigint; length: number }

function halfValue(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >> 10) & 31
  const fraction = bits & 1023
  return exponent === 0 ? sign * fraction * 2 ** -24 : sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
}

/** Bits of the float16 nearest to a finite number in its normal range or 0, ties to even. */
function halfBits(value: number): number {
  if (value === 0) return 0
  const sign = value < 0 ? 0x8000 : 0
  const exponent = Math.floor(Math.log2(Math.abs(value)))
  const scaled = (Math.abs(value) / 2 ** exponent - 1) * 1024
  const low = Math.floor(scaled)
  const up = scaled - low > 0.5 || (scaled - low === 0.5 && low % 2 === 1)
  return sign | (((exponent + 15) << 10) + low + (up ? 1 : 0))
}

const arrays = {
  float32: Float32Array,
  bfloat16: Uint16Array,
  float16: Uint16Array,
  float64: Float64Array,
  int64: BigInt64Array,
  int32: Int32Array,
  int16: Int16Array,
  int8: Int8Array,
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  uint64: BigUint64Array,
  bool: Uint8Array,
} as const

/** A fresh array of a dtype; 16-bit floats as their bits. */
export function arrayOf(dtype: ReducedDtype, length: number): Values & ArrayBufferView {
  return new arrays[dtype](length) as never
}

/** Rank's input: awkward values whose sum depends on the order where the dtype has rounding. */
export function inputOf(dtype: ReducedDtype, length: number, rank: number): Values & ArrayBufferView {
  const out = arrayOf(dtype, length)
  for (let i = 0; i < length; i++) {
    const wave = ((i * 2654435761 + rank * 40503) >>> 7) % 1999
    if (dtype === 'bool') out[i] = (wave >> 3) & 1
    else if (dtype === 'int64' || dtype === 'uint64') out[i] = BigInt(wave) * 2n ** 52n
    else if (dtype === 'bfloat16') out[i] = bfloat16Bits((wave - 999) * (rank === 0 ? 16 : 0.37))
    else if (dtype === 'float16') out[i] = halfBits((wave - 999) * (rank === 0 ? 8 : 0.43))
    else if (dtype === 'float32' || dtype === 'float64') out[i] = (wave - 999) * (rank === 1 ? 1e7 : 0.1)
    else out[i] = wave * 7919
  }
  return out
}

function join(a: number | bigint, b: number | bigint, op: Reduction): number | bigint {
  if (op === 'max') return a > b ? a : b
  if (op === 'min') return a < b ? a : b
  return typeof a === 'bigint' ? a + (b as bigint) : a + (b as number)
}

/** Rank 0's input op rank 1's op ..., element by element. */
export function reduceInOrder(dtype: ReducedDtype, inputs: readonly Values[], op: Reduction): Values & ArrayBufferView {
  const length = (inputs[0] as Values).length
  const out = arrayOf(dtype, length)
  const half = dtype === 'bfloat16' ? bfloat16Value : dtype === 'float16' ? halfValue : null
  const back = dtype === 'bfloat16' ? bfloat16Bits : halfBits
  for (let i = 0; i < length; i++) {
    if (half !== null) {
      let acc = half(inputs[0]?.[i] as number)
      for (const input of inputs.slice(1)) acc = Math.fround(join(acc, half(input[i] as number), op) as number)
      out[i] = back(acc)
      continue
    }
    let acc = inputs[0]?.[i] as number | bigint
    for (const input of inputs.slice(1)) {
      acc = join(acc, input[i] as never, dtype === 'bool' && op === 'sum' ? 'max' : op)
      // Storing rounds or wraps as the dtype does.
      out[i] = acc
      acc = out[i] as number | bigint
    }
    out[i] = acc
  }
  return out
}
