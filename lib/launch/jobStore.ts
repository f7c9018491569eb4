// A launcher's connection to the store on node 0: values as JSON, answers within a bound, made anew when it was lost.
import { setTimeout as sleep } from 'node:timers/promises'
import { native } from '../addon/load.js'
import { stopIfAborted, ViaductError } from '../base/errors.js'

const connectMs = 2000
const pollMs = 100

/** The store answers at once where it lives. */
const answerMs = 5000

const encode = (value: unknown) => new TextEncoder().encode(JSON.stringify(value))
const decode = <T>(bytes: Uint8Array) => JSON.parse(new TextDecoder().decode(bytes)) as T

/** Whether an error is one of the connection, not of what was asked. */
export function isStoreLost(error: unknown): boolean {
  return error instanceof ViaductError && ['ERR_COMM', 'ERR_TIMEOUT'].includes(error.code) && error.where !== 'run'
}

export class JobStore {
  #id = 0

  constructor(
    readonly host: string,
    readonly port: number,
    readonly jobId: string,
  ) {}

  /** Connects anew. @throws ERR_TIMEOUT when nobody listens until the deadline, ERR_COMM for another job's store, ERR_ABORTED. */
  async connect(deadline: number, stop: AbortSignal): Promise<void> {
    this.close()
    for (;;) {
      stopIfAborted(stop, 'run')
      const rest = deadline - Date.now()
      try {
        const ms = Math.max(1, Math.min(connectMs, rest))
        this.#id = await native.storeClient('viaduct', this.host, this.port, this.jobId, ms)
        return
      } catch (error) {
        if (!(error instanceof ViaductError) || error.code !== 'ERR_TIMEOUT' || rest <= connectMs) throw error
      }
    }
  }

  /** This host's address on the way to the store. */
  address(): Promise<string> {
    return this.#soon(native.storeAddress(this.#id))
  }

  set(key: string, value: unknown, timeoutMs = answerMs): Promise<void> {
    return this.#soon(native.storeSet(this.#id, key, encode(value)), timeoutMs)
  }

  add(key: string, amount: number): Promise<number> {
    return this.#soon(native.storeAdd(this.#id, key, amount))
  }

  /** The value, however long it takes to come. @throws when the connection is lost. */
  async get<T>(key: string, timeoutMs: number): Promise<T> {
    return decode(await native.storeGet(this.#id, key, timeoutMs))
  }

  /** The value, or undefined at the deadline. Asks again and again, so that a store without an answer is noticed. */
  async poll<T>(key: string, deadline: number, stop: AbortSignal): Promise<T | undefined> {
    for (;;) {
      stopIfAborted(stop, 'run')
      if (await this.#soon(native.storeCheck(this.#id, key)))
        return decode<T>(await this.#soon(native.storeGet(this.#id, key, 1)))
      if (Date.now() >= deadline) return undefined
      await sleep(pollMs)
    }
  }

  /** Calls in progress fail. */
  close(): void {
    if (this.#id !== 0) native.storeClose(this.#id)
    this.#id = 0
  }

  async #soon<T>(call: Promise<T>, timeoutMs = answerMs): Promise<T> {
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<never>((_, reject) => {
      const error = new ViaductError('ERR_TIMEOUT', 'store', `the store at ${this.host}:${this.port} gave no answer`)
      timer = setTimeout(() => reject(error), timeoutMs)
    })
    call.catch(() => {})
    return Promise.race([call, late]).finally(() => clearTimeout(timer))
  }
}
