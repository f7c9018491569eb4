// Small safetensors files as host arrays: inputs and results of commands. Weights do not go this way; see weightFolder and blocks.
import { open, readFile, rename, rm } from 'node:fs/promises'
import { dirname } from 'node:path'
import type { DType } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { flush, ioError, makeFolder, temporaryName } from './atomic.js'
import { encodeHeader } from './safetensorsHeader.js'
import { readHeader } from './weightFolder.js'

/** One tensor on the host. */
export interface HostTensor {
  readonly dtype: DType
  readonly shape: readonly number[]
  /** Row-major, little-endian. */
  readonly bytes: Uint8Array
}

/**
 * Every tensor of a safetensors file.
 * @throws ERR_FILE_MISSING, and ERR_SAFETENSORS_* as readHeader.
 */
export async function readHostTensors(path: string): Promise<Map<string, HostTensor>> {
  const header = await readHeader(path)
  const file = await readFile(path)
  const tensors = new Map<string, HostTensor>()
  const first = header.bytes.length
  for (const [name, { dtype, shape, begin, end }] of header.entries) {
    tensors.set(name, { dtype, shape, bytes: file.subarray(first + begin, first + end) })
  }
  return tensors
}

/**
 * Writes a safetensors file that appears whole or not at all.
 * @throws ERR_NO_SPACE, ERR_IO
 */
export async function writeHostTensors(path: string, tensors: ReadonlyMap<string, HostTensor>): Promise<void> {
  const plans = [...tensors].map(([name, { dtype, shape }]) => ({ name, dtype, shape }))
  const header = encodeHeader(plans)
  const temporary = temporaryName(path)
  try {
    await makeFolder(dirname(path))
    const file = await open(temporary, 'wx')
    try {
      await file.writeFile(header.bytes)
      for (const name of header.entries.keys()) await file.writeFile((tensors.get(name) as HostTensor).bytes)
      await file.sync()
    } finally {
      await file.close()
    }
    await rename(temporary, path)
    await flush(dirname(path))
  } catch (cause) {
    await rm(temporary, { force: true })
    throw ioError(cause, `cannot write ${path}`)
  }
}

/**
 * Whole numbers of an int64, int32 or bool tensor as numbers.
 * @throws ERR_TENSOR_DTYPE for other dtypes; ERR_DATA for numbers past 2^53.
 */
export function wholeNumbers(name: string, tensor: HostTensor): number[] {
  const { bytes } = tensor
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const widths: Partial<Record<DType, number>> = { int64: 8, int32: 4, uint8: 1, bool: 1 }
  const width = widths[tensor.dtype]
  if (width === undefined) {
    throw new ViaductError(
      'ERR_TENSOR_DTYPE',
      'input',
      `expected ${name} to be int64, int32 or bool, got ${tensor.dtype}`,
    )
  }
  return Array.from({ length: bytes.byteLength / width }, (_, i) => {
    if (width === 1) return view.getUint8(i)
    if (width === 4) return view.getInt32(4 * i, true)
    const value = Number(view.getBigInt64(8 * i, true))
    if (Number.isSafeInteger(value)) return value
    throw new ViaductError(
      'ERR_DATA',
      'input',
      `expected ${name} to hold whole numbers below 2^53, got ${value} at ${i}`,
    )
  })
}
