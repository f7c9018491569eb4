// One file from the hub into the cache: resumed by Range where it stopped, hashed on the way, given its name when the hash is
// right. A wrong one is fetched once more and never gets the name. Who calls holds the blob's lock.
import { createHash, type Hash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { open, rename, rm, stat } from 'node:fs/promises'
import { ViaductError } from '../../base/errors.js'
import { ioError } from '../atomic.js'
import { type Answer, type HttpClient, httpFault, Transient } from './httpClient.js'
import type { RepoFile } from './hubApi.js'

/** Bytes that are gathered before they are written. */
const writeBytes = 1 << 20

export interface BlobRequest {
  readonly client: HttpClient
  readonly address: string
  readonly file: RepoFile
  /** Where the finished file goes; unfinished it is PATH.incomplete. */
  readonly path: string
  /** Throws for refusals. */
  readonly check: (answer: Answer) => void
  /** Told bytes that are new here; negative when some are thrown away. */
  readonly onBytes: (bytes: number) => void
}

/** @throws ERR_DOWNLOAD_HASH, ERR_NETWORK, ERR_HTTP, ERR_NO_SPACE, ERR_ABORTED, what `check` throws */
export async function downloadBlob(request: BlobRequest): Promise<void> {
  const { client, file, path, onBytes } = request
  const partial = `${path}.incomplete`
  let found = ''
  for (let tries = 0; tries < 2; tries++) {
    found = await fetchWhole(request, partial)
    if (found === file.etag) {
      await rename(partial, path).catch((cause: unknown) => {
        throw ioError(cause, `cannot name ${path}`)
      })
      return
    }
    await rm(partial, { force: true })
    onBytes(-file.size)
  }
  throw new ViaductError(
    'ERR_DOWNLOAD_HASH',
    'hub',
    `expected hash ${file.etag} of ${file.path}, got ${found} twice: the transfer or the server spoils it (${client.redact(request.address)}); nothing was kept`,
    { file: file.path, expected: file.etag, actual: found },
  )
}

function startHash(file: RepoFile): Hash {
  // Git hashes its own header with the bytes.
  return file.etag.length === 64 ? createHash('sha256') : createHash('sha1').update(`blob ${file.size}\0`)
}

/** Brings the partial file to its full size. @returns its hash */
async function fetchWhole({ client, address, file, check, onBytes }: BlobRequest, partial: string): Promise<string> {
  const { size } = file
  let have = await stat(partial).then(
    (found) => found.size,
    () => 0,
  )
  if (have > size) {
    await rm(partial)
    have = 0
  }
  let hash = startHash(file)
  if (have > 0) for await (const chunk of createReadStream(partial)) hash.update(chunk as Buffer)
  onBytes(have)
  const out = await open(partial, 'a').catch((cause: unknown) => {
    throw ioError(cause, `cannot write ${partial}`)
  })
  const restart = async () => {
    await out.truncate(0)
    onBytes(-have)
    have = 0
    hash = startHash(file)
  }
  const append = async (parts: Uint8Array[]) => {
    if (parts.length === 0) return
    const bytes = Buffer.concat(parts.splice(0))
    await out.appendFile(bytes).catch((cause: unknown) => {
      throw ioError(cause, `cannot write ${partial}`)
    })
    hash.update(bytes)
    have += bytes.length
  }
  try {
    let before = have
    await client.retry(
      `all ${size} bytes of ${file.path}`,
      async () => {
        before = have
        if (have === size && size > 0) return
        const answer = await client.open(address, have > 0 ? { range: `bytes=${have}-` } : {})
        check(answer)
        if (answer.status === 416) {
          answer.cancel()
          await restart()
          throw new Transient(`status 416 for the rest of ${file.path}`)
        }
        if (answer.status === 200 && have > 0) await restart()
        checkLength(answer, have, file)
        const parts: Uint8Array[] = []
        let waiting = 0
        try {
          for await (const chunk of answer.chunks()) {
            waiting += chunk.length
            if (have + waiting > size) throw httpFault(`expected ${size} bytes of ${file.path}, got more`)
            parts.push(chunk)
            onBytes(chunk.length)
            if (waiting < writeBytes) continue
            await append(parts)
            waiting = 0
          }
        } finally {
          await append(parts)
        }
        if (have < size) throw new Transient(`${have} of ${size} bytes`)
      },
      () => have - before >= writeBytes,
    )
    await out.sync()
  } finally {
    await out.close()
  }
  return hash.digest('hex')
}

/** The answer's own words on what it sends must fit what was asked for. */
function checkLength({ status, headers, cancel }: Answer, from: number, { path, size }: RepoFile): void {
  const fail = (what: string): never => {
    cancel()
    throw httpFault(`expected bytes ${from} to ${size} of ${path}, got ${what}`, { file: path })
  }
  if (status !== 200 && status !== 206) fail(`status ${status}`)
  const range = headers.get('content-range')
  if (status === 206 && range !== `bytes ${from}-${size - 1}/${size}`) fail(`Content-Range ${range}`)
  const length = headers.get('content-length')
  if (length !== null && Number(length) !== size - from) fail(`Content-Length ${length}`)
}
