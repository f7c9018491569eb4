// Element types: PyTorch's names, safetensors' names, sizes and the addon's codes, in one table.
// Codes equal `enum class DType` in native/tensor.h (a house test compares them).
import { ViaductError } from './errors.js'

interface DTypeRow {
  /** Code of the addon's `enum class DType`; -1 where the dtype travels only as bytes. */
  readonly code: number
  readonly bits: number
  /** Name in a safetensors header. */
  readonly safetensors: string
  readonly isFloat: boolean
}

const rows = {
  float32: { code: 0, bits: 32, safetensors: 'F32', isFloat: true },
  bfloat16: { code: 1, bits: 16, safetensors: 'BF16', isFloat: true },
  float16: { code: 2, bits: 16, safetensors: 'F16', isFloat: true },
  float64: { code: 3, bits: 64, safetensors: 'F64', isFloat: true },
  int64: { code: 4, bits: 64, safetensors: 'I64', isFloat: false },
  int32: { code: 5, bits: 32, safetensors: 'I32', isFloat: false },
  int16: { code: 6, bits: 16, safetensors: 'I16', isFloat: false },
  int8: { code: 7, bits: 8, safetensors: 'I8', isFloat: false },
  uint8: { code: 8, bits: 8, safetensors: 'U8', isFloat: false },
  bool: { code: 9, bits: 8, safetensors: 'BOOL', isFloat: false },
  float8_e4m3fn: { code: 10, bits: 8, safetensors: 'F8_E4M3', isFloat: true },
  float8_e5m2: { code: 11, bits: 8, safetensors: 'F8_E5M2', isFloat: true },
  uint16: { code: 12, bits: 16, safetensors: 'U16', isFloat: false },
  uint32: { code: 13, bits: 32, safetensors: 'U32', isFloat: false },
  uint64: { code: 14, bits: 64, safetensors: 'U64', isFloat: false },
  float8_e8m0fnu: { code: -1, bits: 8, safetensors: 'F8_E8M0', isFloat: true },
  float6_e2m3fn: { code: -1, bits: 6, safetensors: 'F6_E2M3', isFloat: true },
  float6_e3m2fn: { code: -1, bits: 6, safetensors: 'F6_E3M2', isFloat: true },
  float4_e2m1fn_x2: { code: -1, bits: 4, safetensors: 'F4', isFloat: true },
  complex64: { code: -1, bits: 64, safetensors: 'C64', isFloat: false },
} as const satisfies Record<string, DTypeRow>

/** Element type, by PyTorch's name without `torch.`. */
export type DType = keyof typeof rows

/** The table of all element types. */
export const dtypes: Readonly<Record<DType, DTypeRow>> = rows

const bySafetensors = new Map(Object.entries(rows).map(([name, row]) => [row.safetensors as string, name as DType]))

/** Names that a safetensors header may use, e.g. `BF16`. */
export const safetensorsDtypes: readonly string[] = [...bySafetensors.keys()]

/** The dtype of a safetensors name, or undefined if the name is unknown. */
export function dtypeFromSafetensors(name: string): DType | undefined {
  return bySafetensors.get(name)
}

/**
 * A dtype by PyTorch's, Megatron's or a short name: `bfloat16`, `torch.bfloat16`, `bf16`, `fp32`, `half`.
 * @throws ERR_DTYPE when the name is unknown.
 */
export function parseDtype(name: string): DType {
  const short: Record<string, DType> = {
    fp32: 'float32',
    float: 'float32',
    f32: 'float32',
    bf16: 'bfloat16',
    fp16: 'float16',
    half: 'float16',
    f16: 'float16',
    fp64: 'float64',
    double: 'float64',
    long: 'int64',
    int: 'int32',
  }
  const bare = name.replace(/^torch\./, '')
  const found = short[bare] ?? (Object.hasOwn(rows, bare) ? (bare as DType) : undefined)
  if (found !== undefined) return found
  throw new ViaductError(
    'ERR_DTYPE',
    'dtype',
    `expected one of ${Object.keys(rows).join(', ')}, got ${JSON.stringify(name)}`,
  )
}

/** Bytes of one element. @throws ERR_DTYPE for sub-byte dtypes. */
export function dtypeBytes(dtype: DType): number {
  const bits = rows[dtype].bits
  if (bits % 8 !== 0)
    throw new ViaductError('ERR_DTYPE', 'dtype', `${dtype} has ${bits} bits an element: no whole bytes`)
  return bits / 8
}
