// Megatron's indexed datasets: PREFIX.bin holds token ids one after the other, PREFIX.idx says their type and the documents.
// Read in file order; only the tokens that are asked for are read.
import { closeSync, fstatSync, openSync, readFileSync, readSync } from 'node:fs'
import { ViaductError } from '../base/errors.js'
import type { TokenStream } from './tokenDataset.js'

/** Type codes of the index: bytes an id, and how to read them. Float types (6, 7) are no token ids. */
const readers: Readonly<Record<number, { bytes: number; read: (view: DataView, at: number) => number }>> = {
  1: { bytes: 1, read: (view, at) => view.getUint8(at) },
  2: { bytes: 1, read: (view, at) => view.getInt8(at) },
  3: { bytes: 2, read: (view, at) => view.getInt16(at, true) },
  4: { bytes: 4, read: (view, at) => view.getInt32(at, true) },
  5: { bytes: 8, read: (view, at) => Number(view.getBigInt64(at, true)) },
  8: { bytes: 2, read: (view, at) => view.getUint16(at, true) },
}

const magic = 'MMIDIDX\0\0'
/** magic 9, version 8, type 1, sequences 8, documents 8. */
const headBytes = 34

export class IndexedTokens implements TokenStream {
  readonly length: number
  readonly #file: number
  readonly #reader: { bytes: number; read: (view: DataView, at: number) => number }

  /**
   * @param prefix - path without `.bin` and `.idx`.
   * @throws ERR_DATA when a file is missing, of another format, or shorter than the index says.
   */
  constructor(readonly prefix: string) {
    const fail = (why: string, cause?: unknown) =>
      new ViaductError(
        'ERR_DATA',
        'indexed dataset',
        `${prefix}: ${why}`,
        { prefix },
        cause === undefined ? {} : { cause },
      )
    let index: Buffer
    try {
      index = readFileSync(`${prefix}.idx`)
      this.#file = openSync(`${prefix}.bin`, 'r')
    } catch (cause) {
      throw fail(`expected ${prefix}.idx and ${prefix}.bin: ${(cause as Error).message}`, cause)
    }
    try {
      if (index.length < headBytes || index.toString('latin1', 0, 9) !== magic)
        throw fail('the .idx file does not begin with MMIDIDX')
      const version = Number(index.readBigUInt64LE(9))
      if (version !== 1) throw fail(`expected version 1 of the index, got ${version}`)
      const code = index.readUInt8(17)
      const reader = readers[code]
      if (reader === undefined) throw fail(`expected token ids of an integer type, got type code ${code}`)
      const sequences = Number(index.readBigUInt64LE(18))
      const documents = Number(index.readBigUInt64LE(26))
      const wanted = headBytes + 12 * sequences + 8 * documents
      if (index.length < wanted)
        throw fail(`expected ${wanted} bytes of index for ${sequences} sequences, got ${index.length}`)
      let tokens = 0
      for (let i = 0; i < sequences; i++) {
        const pointer = Number(index.readBigInt64LE(headBytes + 4 * sequences + 8 * i))
        if (pointer !== tokens * reader.bytes)
          throw fail(`sequence ${i} lies at byte ${pointer}, expected ${tokens * reader.bytes}`)
        tokens += index.readInt32LE(headBytes + 4 * i)
      }
      const { size } = fstatSync(this.#file)
      if (size < tokens * reader.bytes) throw fail(`expected ${tokens * reader.bytes} bytes in .bin, got ${size}`)
      this.length = tokens
      this.#reader = reader
    } catch (error) {
      closeSync(this.#file)
      throw error
    }
  }

  read(start: number, count: number): Int32Array {
    const { bytes, read } = this.#reader
    const buffer = Buffer.alloc(count * bytes)
    let got = 0
    while (got < buffer.length) {
      const n = readSync(this.#file, buffer, got, buffer.length - got, start * bytes + got)
      if (n === 0)
        throw new ViaductError('ERR_DATA', 'indexed dataset', `${this.prefix}.bin ended early`, { prefix: this.prefix })
      got += n
    }
    const view = new DataView(buffer.buffer, buffer.byteOffset, buffer.length)
    return Int32Array.from({ length: count }, (_, i) => read(view, i * bytes))
  }

  dispose(): void {
    closeSync(this.#file)
  }
}
