// Exact reads at positions of one open file, and the error of a torch file that is damaged. Nothing is read beyond the size
// that the file had when it was opened, and nothing is allocated before its length is checked against that size.
import { type FileHandle, open } from 'node:fs/promises'
import { ViaductError } from '../../base/errors.js'

/** An open file of known size. */
export class ByteFile {
  private constructor(
    readonly handle: FileHandle,
    /** For messages. */
    readonly name: string,
    readonly size: number,
  ) {}

  /** Opens a file for the time of `work`. @throws ERR_FILE_MISSING */
  static async during<T>(path: string, name: string, work: (file: ByteFile) => Promise<T>): Promise<T> {
    let handle: FileHandle
    try {
      handle = await open(path, 'r')
    } catch (cause) {
      throw new ViaductError(
        'ERR_FILE_MISSING',
        'torch',
        `cannot open ${name}: ${(cause as Error).message}`,
        { file: name },
        { cause },
      )
    }
    try {
      return await work(new ByteFile(handle, name, (await handle.stat()).size))
    } finally {
      await handle.close()
    }
  }

  /** Exactly these bytes. @throws ERR_TORCH_FILE when they reach beyond the file. */
  async read(offset: number, length: number, what: string): Promise<Buffer> {
    if (length > this.size - offset)
      this.refuse(`expected ${what} in the file of ${this.size} bytes, got ${length} bytes from ${offset}`, offset)
    const bytes = Buffer.alloc(length)
    for (let got = 0; got < length; ) {
      const { bytesRead } = await this.handle.read(bytes, got, length - got, offset + got)
      if (bytesRead === 0) this.refuse(`expected ${what}, got the end of the file`, offset + got)
      got += bytesRead
    }
    return bytes
  }

  /** Refuses the file, with the byte where the fault lies. @throws ERR_TORCH_FILE */
  refuse(message: string, byteOffset: number, details: Record<string, unknown> = {}): never {
    throw new ViaductError('ERR_TORCH_FILE', 'torch', `${message} (${this.name})`, {
      file: this.name,
      byteOffset,
      ...details,
    })
  }
}
