// One file on a web server, read by ranges. Its size and its version are fixed when it is opened: a server that later tells
// another size, another ETag or another range than was asked for is refused. Nothing is kept here.
import { ViaductError } from '../../base/errors.js'
import { type Answer, type HttpClient, httpFault, Transient } from './httpClient.js'

const firstBytes = 64 << 10

interface Version {
  readonly etag: string | null
  readonly modified: string | null
}

function versionOf({ headers }: Answer): Version {
  return { etag: headers.get('etag'), modified: headers.get('last-modified') }
}

export class RemoteFile {
  private constructor(
    private readonly client: HttpClient,
    readonly address: string,
    readonly size: number,
    private readonly version: Version,
  ) {}

  /** @returns the file and its beginning, of at most 64 KiB; null where there is none. @throws ERR_HTTP for a server without ranges, ERR_NETWORK, ERR_ABORTED */
  static async open(client: HttpClient, address: string): Promise<{ file: RemoteFile; first: Buffer } | null> {
    return client.retry(`the beginning of ${address}`, async () => {
      const answer = await client.open(address, { range: `bytes=0-${firstBytes - 1}` })
      const refuse = (message: string): never => {
        answer.cancel()
        throw httpFault(message, { address, status: answer.status })
      }
      if (answer.status === 404 || answer.status === 410) {
        answer.cancel()
        return null
      }
      if (answer.status === 200)
        refuse(`expected ranges of ${address}, got the whole file: its server has none, download the folder`)
      if (answer.status !== 206) refuse(`expected a range of ${address}, got status ${answer.status}`)
      const range = /^bytes 0-(\d+)\/(\d+)$/.exec(answer.headers.get('content-range') ?? '')
      const size = Number(range?.[2])
      const count = Math.min(firstBytes, size)
      if (!Number.isSafeInteger(size) || Number(range?.[1]) !== count - 1)
        refuse(
          `expected bytes 0 to ${firstBytes} of ${address}, got Content-Range ${answer.headers.get('content-range')}`,
        )
      const first = await client.body(answer, count)
      if (first.length < count) throw new Transient(`${first.length} of ${count} bytes`)
      return { file: new RemoteFile(client, address, size, versionOf(answer)), first }
    })
  }

  /**
   * Reads a range; what breaks is taken up where it stopped.
   * @param sink - gets the bytes in order, with their offset in the file.
   * @throws ERR_HTTP when the file has changed or the server lies; ERR_NETWORK; ERR_ABORTED
   */
  async read(begin: number, end: number, sink: (bytes: Uint8Array, offset: number) => Promise<void>): Promise<void> {
    if (end > this.size || begin < 0)
      throw new ViaductError('ERR_ASSERT', 'http', `expected a range in ${this.size} bytes, got ${begin} to ${end}`)
    let at = begin
    let before = begin
    const strong = this.version.etag !== null && !this.version.etag.startsWith('W/') ? this.version.etag : null
    await this.client.retry(
      `bytes ${begin} to ${end} of ${this.address}`,
      async () => {
        before = at
        if (at === end) return
        const headers = { range: `bytes=${at}-${end - 1}`, ...(strong === null ? {} : { 'if-range': strong }) }
        const answer = await this.client.open(this.address, headers)
        this.#check(answer, at, end)
        for await (const chunk of answer.chunks()) {
          if (at + chunk.length > end) throw httpFault(`expected ${end - begin} bytes of ${this.address}, got more`)
          await sink(chunk, at)
          at += chunk.length
        }
        if (at < end) throw new Transient(`${at - begin} of ${end - begin} bytes`)
      },
      () => at - before >= 1 << 20,
    )
  }

  #check(answer: Answer, begin: number, end: number): void {
    const fail = (message: string): never => {
      answer.cancel()
      throw httpFault(message, { address: this.address })
    }
    const { etag, modified } = versionOf(answer)
    const { status, headers } = answer
    const range = headers.get('content-range')
    const length = headers.get('content-length')
    const changed = etag !== this.version.etag || modified !== this.version.modified
    if (changed || (status === 206 && range?.split('/')[1] !== String(this.size)))
      fail(`expected ${this.address} to stay as it was, got another version: begin again`)
    if (status !== 206) fail(`expected a range of ${this.address}, got status ${status}`)
    if (range !== `bytes ${begin}-${end - 1}/${this.size}`)
      fail(`expected bytes ${begin} to ${end} of ${this.address}, got Content-Range ${range}`)
    if (length !== null && Number(length) !== end - begin)
      fail(`expected ${end - begin} bytes of ${this.address}, got Content-Length ${length}`)
  }
}
