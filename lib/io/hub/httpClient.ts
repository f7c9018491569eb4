// HTTP as downloads need it: every wait is bounded, redirects are followed by hand so that a token goes to its own origin alone,
// what may pass is tried again after a pause. Bodies come as they are sent: no content coding is asked for. No meaning of files.
import { setTimeout as pause } from 'node:timers/promises'
import { envInt } from '../../base/env.js'
import { type ErrorDetails, ViaductError } from '../../base/errors.js'

export interface HttpOptions {
  readonly signal?: AbortSignal
  /** Sent to `origin` and nowhere else. */
  readonly token?: string | null
  readonly origin?: string
  /** Tries of one request in all. Default 6. */
  readonly attempts?: number
  /** First pause between tries, in ms; it doubles. Default 500. */
  readonly backoffMs?: number
  /** Most ms without headers, or without 1 KiB of body. Default HF_HUB_DOWNLOAD_TIMEOUT, 30 s. */
  readonly stallMs?: number
}

/** An answer whose body has not been read. */
export interface Answer {
  readonly status: number
  readonly headers: Headers
  /** After redirects, without its query, which may hold a signature. */
  readonly url: string
  /** The body; a stall or a cut is a Transient. Read it to the end, or call cancel. */
  chunks(): AsyncGenerator<Uint8Array>
  cancel(): void
}

/** A failure that another try may cure. */
export class Transient extends Error {
  constructor(
    message: string,
    /** Pause that the server asked for, in ms. */
    readonly afterMs: number | null = null,
    options?: ErrorOptions,
  ) {
    super(message, options)
  }
}

const mostRedirects = 10
const longestPauseMs = 300_000
const leastBytes = 1024

/** A server that breaks the rules of HTTP. */
export function httpFault(message: string, details: ErrorDetails = {}): ViaductError {
  return new ViaductError('ERR_HTTP', 'http', message, details)
}

/** An address without user, password and query. */
export function plainAddress(url: string | URL): string {
  const { protocol, host, pathname } = new URL(url)
  return `${protocol}//${host}${pathname}`
}

export class HttpClient {
  readonly #token: string | null
  readonly #origin: string | undefined
  readonly signal: AbortSignal | undefined
  readonly attempts: number
  readonly #backoffMs: number
  readonly #stallMs: number

  constructor(options: HttpOptions = {}) {
    this.#token = options.token ?? null
    this.#origin = options.origin
    this.signal = options.signal
    this.attempts = options.attempts ?? 6
    this.#backoffMs = options.backoffMs ?? 500
    this.#stallMs = options.stallMs ?? Math.max(1, envInt('HF_HUB_DOWNLOAD_TIMEOUT') ?? 30) * 1000
  }

  /** True where a token is sent. */
  get hasToken(): boolean {
    return this.#token !== null
  }

  /** A text of a server without the token, should it hold it. */
  redact(text: string): string {
    return this.#token === null ? text : text.replaceAll(this.#token, '***')
  }

  /**
   * Runs `work` until it does not end in a Transient.
   * @param restored - true when the last try came far enough that tries are counted anew.
   * @throws ERR_NETWORK after the last try; ERR_ABORTED; what `work` throws.
   */
  async retry<T>(what: string, work: () => Promise<T>, restored: () => boolean = () => false): Promise<T> {
    for (let failures = 1; ; failures++) {
      try {
        this.#stopIfAborted()
        return await work()
      } catch (error) {
        if (!(error instanceof Transient)) throw error
        if (restored()) failures = 1
        const wait = error.afterMs ?? this.#backoffMs * 2 ** (failures - 1) * (0.5 + Math.random())
        if (failures >= this.attempts || wait > longestPauseMs) {
          const after = wait > longestPauseMs ? `a pause of ${Math.ceil(wait / 1000)} s asked for` : `${failures} tries`
          throw new ViaductError(
            'ERR_NETWORK',
            'http',
            `expected ${what}, got ${this.redact(error.message)} (${after}): run it again to go on where it stopped`,
            {},
            { cause: error.cause },
          )
        }
        await pause(wait, undefined, this.signal ? { signal: this.signal } : {}).catch(() => this.#stopIfAborted())
      }
    }
  }

  /**
   * Sends a GET. 429 and 5xx are Transients.
   * @throws Transient; ERR_HTTP for redirects without end or to a place that is no web address, and for endless headers;
   *   ERR_ABORTED.
   */
  async open(address: string, headers: Readonly<Record<string, string>> = {}): Promise<Answer> {
    let url = new URL(address)
    for (let redirects = 0; ; redirects++) {
      const { response, controller } = await this.#send(url, headers)
      const { status } = response
      const cancel = () => controller.abort()
      if (status >= 300 && status < 400 && response.headers.has('location')) {
        cancel()
        const target = response.headers.get('location') as string
        if (redirects >= mostRedirects)
          throw httpFault(`expected at most ${mostRedirects} redirects from ${plainAddress(address)}, got more`)
        const next = URL.canParse(target, url.href) ? new URL(target, url) : null
        if (
          next === null ||
          !/^https?:$/.test(next.protocol) ||
          (url.protocol === 'https:' && next.protocol === 'http:')
        )
          throw httpFault(`expected ${plainAddress(url)} to redirect to an address as safe as its own, got another`)
        url = next
        continue
      }
      if (status === 429 || status >= 500) {
        cancel()
        throw new Transient(`status ${status} from ${url.host}`, retryAfter(response.headers))
      }
      const coding = response.headers.get('content-encoding')
      if (coding !== null && coding !== 'identity') {
        cancel()
        throw httpFault(`expected bytes as they are from ${plainAddress(url)}, got content coding ${coding}`)
      }
      return {
        status,
        headers: response.headers,
        url: plainAddress(url),
        chunks: () => this.#chunks(response, controller, url.host),
        cancel,
      }
    }
  }

  /** The whole body, of at most `most` bytes. @throws ERR_HTTP when it is longer; Transient; ERR_ABORTED */
  async body(answer: Answer, most: number): Promise<Buffer> {
    const parts: Uint8Array[] = []
    let bytes = 0
    for await (const chunk of answer.chunks()) {
      bytes += chunk.length
      if (bytes > most) throw httpFault(`expected at most ${most} bytes from ${answer.url}, got more`)
      parts.push(chunk)
    }
    return Buffer.concat(parts)
  }

  async #send(url: URL, headers: Readonly<Record<string, string>>) {
    this.#stopIfAborted()
    const controller = new AbortController()
    const stop = () => controller.abort()
    this.signal?.addEventListener('abort', stop, { once: true })
    const timer = setTimeout(stop, this.#stallMs)
    try {
      const response = await fetch(url, {
        redirect: 'manual',
        signal: controller.signal,
        headers: {
          'accept-encoding': 'identity',
          'user-agent': 'viaduct',
          ...headers,
          ...(this.#token !== null && url.origin === this.#origin ? { authorization: `Bearer ${this.#token}` } : {}),
        },
      })
      return { response, controller }
    } catch (error) {
      throw this.#failure(error, url.host)
    } finally {
      clearTimeout(timer)
      this.signal?.removeEventListener('abort', stop)
    }
  }

  async *#chunks(response: Response, controller: AbortController, host: string): AsyncGenerator<Uint8Array> {
    const stop = () => controller.abort()
    this.signal?.addEventListener('abort', stop, { once: true })
    let fresh = 0
    // Armed while we wait for the server, not while the consumer works.
    let timer: NodeJS.Timeout | undefined
    let waited = 0
    const reader = response.body?.getReader()
    try {
      while (reader) {
        const since = performance.now()
        timer = setTimeout(stop, Math.max(0, this.#stallMs - waited))
        const { done, value } = await reader.read()
        clearTimeout(timer)
        if (done) break
        waited += performance.now() - since
        fresh += value.length
        if (fresh >= leastBytes) fresh = waited = 0
        yield value
      }
      this.#stopIfAborted()
    } catch (error) {
      throw this.#failure(error, host)
    } finally {
      clearTimeout(timer)
      this.signal?.removeEventListener('abort', stop)
      controller.abort()
    }
  }

  #failure(error: unknown, host: string): unknown {
    this.#stopIfAborted()
    if (error instanceof ViaductError || error instanceof Transient) return error
    const cause = ((error as Error).cause ?? error) as NodeJS.ErrnoException
    if (cause.code === 'UND_ERR_HEADERS_OVERFLOW') return httpFault(`expected headers of 16 KiB from ${host}, got more`)
    if ((error as Error).name === 'AbortError')
      return new Transient(`no answer from ${host} for ${this.#stallMs / 1000} s`)
    return new Transient(`a failed connection to ${host} (${cause.code ?? cause.message})`, null, { cause })
  }

  #stopIfAborted(): void {
    if (this.signal?.aborted)
      throw new ViaductError('ERR_ABORTED', 'http', 'the signal was aborted', {}, { cause: this.signal.reason })
  }
}

/** The pause of a Retry-After header in ms: seconds or a date. */
function retryAfter(headers: Headers): number | null {
  const text = headers.get('retry-after')
  if (text === null) return null
  const seconds = Number(text)
  if (Number.isFinite(seconds)) return Math.max(0, seconds * 1000)
  const date = Date.parse(text)
  return Number.isNaN(date) ? null : Math.max(0, date - Date.now())
}
