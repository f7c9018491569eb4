// What the hub says of a model: the commit of a revision, its files with sizes and hashes; and what its refusals mean. Calls go
// through @huggingface/hub over our own client. No file is fetched here.
import { ViaductError } from '../../base/errors.js'
import { checkFileName } from '../paths.js'
import { commitPattern } from './cacheLayout.js'
import { type Answer, type HttpClient, httpFault } from './httpClient.js'

/** A file of a model. */
export interface RepoFile {
  readonly path: string
  readonly size: number
  /** Its name among the blobs: SHA-256 of a large file, git's SHA-1 of a small one, in hex. */
  readonly etag: string
}

const mostAnswerBytes = 64 << 20
const mostCalls = 1000
const mostFiles = 100_000

/** One model on one hub. */
export class HubRepo {
  constructor(
    readonly client: HttpClient,
    readonly endpoint: string,
    /** `org/name`. */
    readonly repo: string,
    readonly revision: string,
  ) {}

  /** The commit that the revision means now. @throws ERR_HUB_NOT_FOUND, ERR_HUB_ACCESS, ERR_HTTP, ERR_NETWORK */
  async commit(): Promise<string> {
    if (commitPattern.test(this.revision)) return this.revision
    const { modelInfo } = await import('@huggingface/hub')
    const { sha } = await this.#call((fetch) =>
      modelInfo({ name: this.repo, revision: this.revision, additionalFields: ['sha'], hubUrl: this.endpoint, fetch }),
    )
    if (typeof sha === 'string' && commitPattern.test(sha)) return sha
    throw httpFault(`expected the commit of ${this.repo} as 40 hex digits, got something else`)
  }

  /** All files of a commit. @throws as commit; ERR_PATH_ESCAPE for names that lead elsewhere */
  async files(commit: string): Promise<RepoFile[]> {
    const { listFiles } = await import('@huggingface/hub')
    return this.#call(async (fetch) => {
      const files: RepoFile[] = []
      const entries = listFiles({
        repo: { type: 'model', name: this.repo },
        revision: commit,
        recursive: true,
        hubUrl: this.endpoint,
        fetch,
      })
      for await (const { type, path, size, oid, lfs } of entries) {
        if (type !== 'file') continue
        checkFileName(path, this.repo)
        const file = { path, size: lfs?.size ?? size, etag: lfs?.oid ?? oid ?? '' }
        const hash = lfs ? /^[0-9a-f]{64}$/ : commitPattern
        if (!Number.isSafeInteger(file.size) || file.size < 0 || !hash.test(file.etag))
          throw httpFault(`expected size and hash of ${path} of ${this.repo}, got something else`)
        if (files.push(file) > mostFiles)
          throw httpFault(`expected at most ${mostFiles} files in ${this.repo}, got more`)
      }
      return files
    })
  }

  /** Address of a file's bytes. */
  address(commit: string, path: string): string {
    return `${this.endpoint}/${this.repo}/resolve/${commit}/${path.split('/').map(encodeURIComponent).join('/')}`
  }

  /** Turns a refusal into an error that says what to do. */
  check(answer: Answer): void {
    const { status, headers } = answer
    if (status < 400) return
    answer.cancel()
    const { repo, revision, endpoint, client } = this
    const page = `${endpoint}/${repo}`
    const reason = headers.get('x-error-code')
    const details = { repo, revision, status }
    if (reason === 'GatedRepo') {
      const next = client.hasToken
        ? 'with the account of your token'
        : 'and set HF_TOKEN or run `huggingface-cli login`'
      throw new ViaductError(
        'ERR_HUB_ACCESS',
        'hub',
        `expected access to ${repo}, got status ${status}: the model is gated; accept its licence at ${page} ${next}`,
        { ...details, licence: page },
      )
    }
    if (reason === 'RevisionNotFound')
      throw new ViaductError(
        'ERR_HUB_NOT_FOUND',
        'hub',
        `expected revision ${JSON.stringify(revision)} of ${repo}, found none: ${page}/tree/main lists branches and tags`,
        details,
      )
    if (reason === 'RepoNotFound' || status === 404)
      throw new ViaductError(
        'ERR_HUB_NOT_FOUND',
        'hub',
        `expected a folder or a model of ${endpoint}, found no ${repo}: correct the name${client.hasToken ? ', or ask its owner for access' : '; a private model needs HF_TOKEN'}`,
        details,
      )
    if (status === 401 || status === 403)
      throw new ViaductError(
        'ERR_HUB_ACCESS',
        'hub',
        `expected access to ${repo}, got status ${status}: ${client.hasToken ? 'the token is not valid there; log in again' : 'set HF_TOKEN or run `huggingface-cli login`'}`,
        details,
      )
    throw httpFault(`expected ${answer.url} to answer, got status ${status}`, details)
  }

  async #call<T>(use: (fetch: typeof globalThis.fetch) => Promise<T>): Promise<T> {
    let calls = 0
    const fetch = async (input: unknown): Promise<Response> => {
      if (++calls > mostCalls) throw httpFault(`expected at most ${mostCalls} pages about ${this.repo}, got more`)
      return this.client.retry(`an answer about ${this.repo}`, async () => {
        const answer = await this.client.open(String(input), { accept: 'application/json' })
        this.check(answer)
        const body = await this.client.body(answer, mostAnswerBytes)
        const link = answer.headers.get('link')
        return new Response(new Uint8Array(body), { status: answer.status, headers: link === null ? {} : { link } })
      })
    }
    try {
      return await use(fetch as typeof globalThis.fetch)
    } catch (error) {
      if (error instanceof ViaductError) throw error
      throw httpFault(
        `expected the hub's answer about ${this.repo}, got another: ${this.client.redact((error as Error).message).slice(0, 200)}`,
      )
    }
  }
}
