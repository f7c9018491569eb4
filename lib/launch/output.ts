// Output of ranks: whole lines with a prefix, to a terminal or file, without loss and without unbounded buffers.
import type { Readable, Writable } from 'node:stream'

const newline = 0x0a
const longest = 1 << 16

/** Cuts a byte stream into lines and puts a prefix before each. Output without an end of line is given out at the end. */
export class LinePrefixer {
  readonly #prefix: Buffer
  #rest: Buffer[] = []
  #restBytes = 0

  constructor(prefix: string) {
    this.#prefix = Buffer.from(prefix)
  }

  /** The lines that are complete with this chunk. */
  push(chunk: Buffer): Buffer {
    const out: Buffer[] = []
    let start = 0
    for (let end = chunk.indexOf(newline); end >= 0; end = chunk.indexOf(newline, start)) {
      out.push(this.#prefix, ...this.#rest, chunk.subarray(start, end + 1))
      this.#rest = []
      this.#restBytes = 0
      start = end + 1
    }
    if (start < chunk.length) {
      this.#rest.push(chunk.subarray(start))
      this.#restBytes += chunk.length - start
    }
    if (this.#restBytes > longest) out.push(this.end())
    return Buffer.concat(out)
  }

  /** What is left, as a line. */
  end(): Buffer {
    if (this.#restBytes === 0) return Buffer.alloc(0)
    const last = Buffer.concat([this.#prefix, ...this.#rest, Buffer.from('\n')])
    this.#rest = []
    this.#restBytes = 0
    return last
  }
}

/** Carries a rank's stream to places, each with its own prefix; a slow place slows the rank. */
export function carry(from: Readable, places: readonly { to: Writable; prefix: string }[]): void {
  const lanes = places.map(({ to, prefix }) => ({ to, lines: new LinePrefixer(prefix) }))
  let waiting = 0
  const write = (to: Writable, bytes: Buffer) => {
    if (bytes.length === 0 || to.write(bytes)) return
    waiting++
    from.pause()
    to.once('drain', () => {
      if (--waiting === 0) from.resume()
    })
  }
  from.on('data', (chunk: Buffer) => {
    for (const { to, lines } of lanes) write(to, lines.push(chunk))
  })
  from.on('end', () => {
    for (const { to, lines } of lanes) write(to, lines.end())
  })
}
