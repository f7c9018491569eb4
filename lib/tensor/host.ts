// Host numbers as bytes of a dtype, little endian, and back. Rounding is to nearest even, as in native casts.
import { type DType, dtypeBytes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'

/** Host data for a tensor: numbers of its dtype, or raw bytes (Uint8Array, ArrayBuffer) in the dtype's layout. */
export type HostData = readonly number[] | readonly bigint[] | ArrayBuffer | ArrayBufferView

const word = new DataView(new ArrayBuffer(4))

/** The upper half of the float32 nearest to `value`, rounded to nearest even. */
export function bfloat16Bits(value: number): number {
  word.setFloat32(0, value)
  const bits = word.getUint32(0)
  if (Number.isNaN(value)) return 0x7fc0
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff
}

/** The number that these bfloat16 bits mean. */
export function bfloat16Value(bits: number): number {
  word.setUint32(0, bits << 16)
  return word.getFloat32(0)
}

const arrays = {
  float32: Float32Array,
  float64: Float64Array,
  int32: Int32Array,
  int16: Int16Array,
  int8: Int8Array,
  uint8: Uint8Array,
  bool: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
} as const
const wide = { int64: BigInt64Array, uint64: BigUint64Array } as const

function sameKind(view: ArrayBufferView, dtype: DType): boolean {
  const array = (arrays as Record<string, unknown>)[dtype] ?? (wide as Record<string, unknown>)[dtype]
  return array !== undefined && view.constructor === array
}

/**
 * Bytes of `elements` elements. Typed arrays of the dtype and raw bytes of the right length pass through without a copy;
 * numbers (and Float32Array for bfloat16) are converted.
 * @throws ERR_SHAPE for a wrong count, ERR_DTYPE for what cannot be converted.
 */
export function encodeHost(
  data: HostData,
  dtype: DType,
  elements: number,
  where: string,
): ArrayBuffer | ArrayBufferView {
  const bytes = elements * dtypeBytes(dtype)
  const view = data instanceof ArrayBuffer ? new Uint8Array(data) : data
  if (ArrayBuffer.isView(view)) {
    const raw = view instanceof Uint8Array || view instanceof DataView || sameKind(view, dtype)
    if (raw) {
      if (view.byteLength === bytes) return view
      throw new ViaductError(
        'ERR_SHAPE',
        where,
        `expected ${bytes} bytes (${elements} of ${dtype}), got ${view.byteLength}`,
      )
    }
    return encodeNumbers(Array.from(view as unknown as Iterable<number>), dtype, elements, where)
  }
  return encodeNumbers(view, dtype, elements, where)
}

function encodeNumbers(
  values: readonly (number | bigint)[],
  dtype: DType,
  elements: number,
  where: string,
): ArrayBufferView {
  if (values.length !== elements) {
    throw new ViaductError('ERR_SHAPE', where, `expected ${elements} numbers, got ${values.length}`)
  }
  if (dtype === 'bfloat16') return Uint16Array.from(values, (value) => bfloat16Bits(Number(value)))
  if (dtype === 'int64' || dtype === 'uint64') return wide[dtype].from(values.map((value) => BigInt(value)))
  const array = (arrays as Partial<Record<DType, (typeof arrays)[keyof typeof arrays]>>)[dtype]
  if (array === undefined) {
    throw new ViaductError(
      'ERR_DTYPE',
      where,
      `expected raw bytes for ${dtype}, got numbers: convert them, or cast on the device`,
    )
  }
  return array.from(values as readonly number[])
}

/**
 * Numbers of `bytes`, as float32.
 * @throws ERR_DTYPE for dtypes that the host does not decode.
 */
export function decodeFloat32(bytes: ArrayBuffer, dtype: DType, where: string): Float32Array {
  if (dtype === 'float32') return new Float32Array(bytes)
  if (dtype === 'bfloat16') return Float32Array.from(new Uint16Array(bytes), bfloat16Value)
  if (dtype === 'int64' || dtype === 'uint64') return Float32Array.from(new wide[dtype](bytes), Number)
  const array = (arrays as Partial<Record<DType, (typeof arrays)[keyof typeof arrays]>>)[dtype]
  if (array !== undefined) return Float32Array.from(new array(bytes))
  throw new ViaductError(
    'ERR_DTYPE',
    where,
    `expected a dtype that the host reads, got ${dtype}: cast on the device first`,
  )
}
