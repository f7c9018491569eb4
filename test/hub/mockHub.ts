// A small hub on 127.0.0.1: the calls that downloads make, over real HTTP, with faults to order. Large files are redirected to a
// second server, as the real hub does. Whatever is asked is written down.
import { createHash } from 'node:crypto'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { afterAll } from 'vitest'

export const token = 'hf_secretOfThisTest'

/** What goes wrong with one file; each is used up where it is a list or a count. */
export interface Fault {
  /** Fractions of the whole file at which the connection is cut, one an answer. */
  cutAt?: number[]
  /** Answers with one flipped byte. */
  flips?: number
  /** Answers that stop after their first half and stay open. */
  stalls?: number
  /** Refusals before the first good answer. */
  refusals?: { status: number; headers?: Record<string, string> }[]
  /** Changes the headers of an answer. */
  lie?: (headers: Record<string, string>) => Record<string, string>
  noRange?: boolean
  /** Answers with redirects to itself. */
  loops?: boolean
  /** Sends bytes one by one, this many ms apart. */
  trickleMs?: number
}

export interface Asked {
  readonly server: 'hub' | 'store'
  readonly path: string
  readonly headers: IncomingMessage['headers']
}

export class MockHub {
  readonly asked: Asked[] = []
  readonly faults: Record<string, Fault> = {}
  /** Bytes of each file that went out. */
  readonly sent: Record<string, number> = {}
  commit = '0123456789abcdef0123456789abcdef01234567'
  gated: 'no' | 'yes' = 'no'
  /** Revisions and what they mean. */
  readonly refs: Record<string, string> = {}
  largeFrom = 1024
  /** The list of files has no end: its body, or its pages. */
  endless: 'body' | 'pages' | null = null
  endpoint = ''
  store = ''
  private readonly servers: Server[] = []

  constructor(
    readonly repo: string,
    public files: Record<string, Buffer>,
  ) {}

  static async start(repo: string, files: Record<string, Buffer>): Promise<MockHub> {
    const hub = new MockHub(repo, files)
    hub.endpoint = await hub.listen((request, response) => hub.answer('hub', request, response))
    hub.store = await hub.listen((request, response) => hub.answer('store', request, response))
    afterAll(() => hub.stop())
    return hub
  }

  stop(): void {
    for (const server of this.servers) {
      server.closeAllConnections()
      server.close()
    }
  }

  private async listen(answer: (request: IncomingMessage, response: ServerResponse) => void): Promise<string> {
    const server = createServer(answer)
    this.servers.push(server)
    await new Promise<void>((done) => server.listen(0, '127.0.0.1', done))
    return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  }

  private answer(server: 'hub' | 'store', request: IncomingMessage, response: ServerResponse): void {
    const url = new URL(request.url ?? '/', this.endpoint)
    const path = decodeURIComponent(url.pathname)
    this.asked.push({ server, path, headers: request.headers })
    const json = (value: unknown) =>
      response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(value))
    const refuse = (status: number, code: string) =>
      response.writeHead(status, { 'x-error-code': code, 'content-type': 'application/json' }).end('{"error":"no"}')
    const revision = (name: string) => (name === this.commit || name === 'main' ? this.commit : this.refs[name])
    const info = new RegExp(`^/api/models/${this.repo}/revision/(.+)$`).exec(path)
    const tree = new RegExp(`^/api/models/${this.repo}/tree/([^/]+)$`).exec(path)
    const file = new RegExp(`^/${this.repo}/resolve/([^/]+)/(.+)$`).exec(path)
    if (server === 'store') return this.sendFile(path.slice(1), request, response)
    if (info) {
      const fault = this.faults['info']?.refusals?.shift()
      if (fault) return void response.writeHead(fault.status, fault.headers).end()
      const commit = revision(info[1] as string)
      return void (commit ? json({ id: this.repo, _id: '1', sha: commit }) : refuse(404, 'RevisionNotFound'))
    }
    if (tree && this.endless === 'pages') {
      response.setHeader('link', `<${this.endpoint}${request.url}>; rel="next"`)
      return void json([])
    }
    if (tree && this.endless === 'body') {
      const chunk = Buffer.alloc(1 << 20, ' ')
      const more = () => response.destroyed || response.write(chunk, () => setImmediate(more))
      return void more()
    }
    if (tree) return void (revision(tree[1] as string) ? json(this.tree()) : refuse(404, 'RevisionNotFound'))
    if (!file) return void refuse(request.headers.authorization ? 404 : 401, 'RepoNotFound')
    if (this.gated === 'yes') return void refuse(request.headers.authorization ? 403 : 401, 'GatedRepo')
    const name = file[2] as string
    if (this.faults[name]?.loops) return void response.writeHead(302, { location: request.url as string }).end()
    const bytes = this.files[name]
    // What Python's client asks of a hub.
    response.setHeader('x-repo-commit', this.commit)
    if (bytes && bytes.length >= this.largeFrom) {
      response.setHeader('x-linked-size', bytes.length)
      response.setHeader('x-linked-etag', `"${sha256(bytes)}"`)
      return void response.writeHead(302, { location: `${this.store}/${name}?signature=secret` }).end()
    }
    this.sendFile(name, request, response)
  }

  private tree(): unknown[] {
    return Object.entries(this.files).map(([path, bytes]) => {
      const large = bytes.length >= this.largeFrom
      const oid = gitHash(large ? Buffer.from(`pointer of ${path}`) : bytes)
      const lfs = large ? { lfs: { oid: sha256(bytes), size: bytes.length, pointerSize: 130 } } : {}
      return { type: 'file', path, size: bytes.length, oid, ...lfs }
    })
  }

  private sendFile(name: string, request: IncomingMessage, response: ServerResponse): void {
    const whole = this.files[name]
    const fault = this.faults[name] ?? {}
    if (!whole) return void response.writeHead(404, { 'x-error-code': 'EntryNotFound' }).end()
    const refusal = fault.refusals?.shift()
    if (refusal) return void response.writeHead(refusal.status, refusal.headers).end('busy')
    const range = fault.noRange ? null : /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? '')
    const from = Number(range?.[1] ?? 0)
    const to = range?.[2] ? Math.min(Number(range[2]) + 1, whole.length) : whole.length
    if (from >= whole.length && whole.length > 0) return void response.writeHead(416).end()
    let bytes = Buffer.from(whole.subarray(from, to))
    if ((fault.flips ?? 0) > 0) {
      fault.flips = (fault.flips as number) - 1
      bytes[bytes.length >> 1] = (bytes[bytes.length >> 1] as number) ^ 1
    }
    const headers: Record<string, string> = {
      'content-length': String(bytes.length),
      etag: `"${whole.length >= this.largeFrom ? sha256(whole) : gitHash(whole)}"`,
      ...(range ? { 'content-range': `bytes ${from}-${to - 1}/${whole.length}` } : {}),
    }
    response.writeHead(range ? 206 : 200, fault.lie ? fault.lie(headers) : headers)
    const count = (sent: number) => {
      this.sent[name] = (this.sent[name] ?? 0) + sent
    }
    const cut = fault.cutAt?.shift()
    if (cut !== undefined || (fault.stalls ?? 0) > 0) {
      const end = cut === undefined ? bytes.length >> 1 : Math.max(0, Math.floor(whole.length * cut) - from)
      bytes = bytes.subarray(0, end)
      count(bytes.length)
      if (cut === undefined) fault.stalls = (fault.stalls as number) - 1
      // What was written reaches the socket before the cut.
      return void response.write(bytes, () => cut !== undefined && setTimeout(() => response.destroy(), 50))
    }
    if (fault.trickleMs !== undefined) {
      let at = 0
      const timer = setInterval(() => {
        if (response.destroyed || at >= bytes.length) return clearInterval(timer)
        response.write(bytes.subarray(at, ++at))
      }, fault.trickleMs)
      return
    }
    count(bytes.length)
    response.end(bytes)
  }
}

export function sha256(bytes: Buffer): string {
  return createHash('sha256').update(bytes).digest('hex')
}

function gitHash(bytes: Buffer): string {
  return createHash('sha1').update(`blob ${bytes.length}\0`).update(bytes).digest('hex')
}
