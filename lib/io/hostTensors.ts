// Small safetensors files as host arrays: inputs and results of commands. Weights do not go this way; see weightFolder and blocks.
import { open, readFile } from 'node:fs/promises'
import { type DType, dtypeBytes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { ioError, removeStale, temporaryName } from './atomic.js'
import { encodeInOrder } from './safetensorsHeader.js'
import { readHeader } from './weightFolder.js'
import { rename, rm } from 'node:fs/promises'
import { dirname } from 'node:path'

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
  for (const entry of header.tensors) {
    const start = header.dataStart + entry.begin
    tensors.set(entry.name, { dtype: entry.dtype, shape: entry.shape, bytes: file.subarray(start, header.dataStart + entry.end) })
  }
  return tensors
}
