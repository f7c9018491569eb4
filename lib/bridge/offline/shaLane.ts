// SHA-256 of whole tensors beside the copying: a queue of its own, two at a time. Which tensors, and when, is decided elsewhere.
import { type FileTensor, sha256Range } from '../../io/blocks.js'
import { leaseHere, type RemoteBytes } from '../../io/hub/remoteBytes.js'
import { tensorBytes } from '../../io/safetensorsHeader.js'

/** A tensor to be hashed. */
export interface ShaTask {
  readonly name: string
  readonly place: (output: string) => FileTensor
  /** Units first to end - 1 write it; null: it is a source. */
  readonly units: readonly [number, number] | null
}

const mostRunning = 2

/** Hashes what is added. */
export class Sha256Lane {
  private readonly queue: ShaTask[] = []
  private readonly running = new Set<Promise<void>>()
  private failure: { readonly error: unknown } | null = null

  constructor(
    private readonly output: string,
    private readonly remote: RemoteBytes | null,
    private readonly found: (tensor: string, sha256: string) => Promise<void>,
  ) {}

  add(task: ShaTask): void {
    this.queue.push(task)
    this.start()
  }

  /** All that was added is hashed. @throws the first failure. */
  async end(): Promise<void> {
    while (this.running.size > 0) await Promise.all(this.running)
    if (this.failure) throw this.failure.error
  }

  /** Starts nothing more and waits for what runs. */
  async stop(): Promise<void> {
    this.queue.length = 0
    await Promise.all(this.running)
  }

  private start(): void {
    while (this.running.size < mostRunning) {
      const task = this.queue.shift()
      if (task === undefined) return
      const work = this.hash(task)
        .catch((error) => {
          this.failure ??= { error }
          this.queue.length = 0
        })
        .finally(() => {
          this.running.delete(work)
          this.start()
        })
      this.running.add(work)
    }
  }

  private async hash({ name, place }: ShaTask): Promise<void> {
    const there = place(this.output)
    const bytes = tensorBytes(there.dtype, there.shape)
    const lease = await leaseHere(this.remote, [{ path: there.path, begin: there.offset, end: there.offset + bytes }])
    const { path, offset } = lease.local(there)
    await this.found(name, await sha256Range(path, offset, bytes).finally(lease.release))
  }
}
