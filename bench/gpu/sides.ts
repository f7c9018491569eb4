// Both sides of `npm run bench:cuda` as processes that are started when they are first called, and again after a failure: a CUDA error
// spoils a process for good.
import { startOurs, startPeer } from '../peers.js'
import type { Side } from '../side.js'

/** How the sides are started. */
export interface SideSettings {
  readonly threads: number
  readonly python: string
  /** More variables of ours, and of the peer. */
  readonly oursEnv: Readonly<Record<string, string>>
  readonly peerEnv: Readonly<Record<string, string>>
}

/** A side that is there from its first call on. */
class LazySide implements Side {
  #side: Side | null = null

  constructor(
    readonly name: string,
    private readonly start: () => Side,
  ) {}

  get pids(): readonly number[] {
    return this.#side?.pids ?? []
  }

  call<T extends Record<string, unknown>>(command: string, args?: Record<string, unknown>): Promise<T> {
    this.#side ??= this.start()
    return this.#side.call<T>(command, args)
  }

  end(): void {
    this.#side?.end()
    this.#side = null
  }
}

export class BenchSides {
  readonly ours: Side
  readonly peer: Side

  constructor({ threads, python, oursEnv, peerEnv }: SideSettings) {
    this.ours = new LazySide('Viaduct', () => startOurs(threads, 1, oursEnv))
    this.peer = new LazySide('PyTorch', () =>
      startPeer({ name: 'tuned', compile: true, env: peerEnv }, python, threads),
    )
  }

  /** Ends both; the next calls start new ones. */
  restart(): void {
    this.ours.end()
    this.peer.end()
  }
}
