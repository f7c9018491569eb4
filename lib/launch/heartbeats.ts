// Signs of life of a node's ranks, out of band: each rank's native thread touches a file, here the files are looked at. Silence is
// counted in looks, not by the clock: a machine that slept, or a launcher that had no turn, makes no rank silent.
import { readFileSync, statSync, writeFileSync } from 'node:fs'
import { heartbeatMs } from '../parallel/heartbeat.js'

export class Heartbeat {
  readonly #file: string
  /** Programs that do not load Viaduct have no heartbeat: their silence says nothing. */
  #expected: boolean
  #last: number
  #looks = 0

  /** @param expected - silent from the start counts; false: only after a first sign. */
  constructor(file: string, expected: boolean) {
    writeFileSync(file, '')
    this.#file = file
    this.#last = this.#time()
    this.#expected = expected
  }

  #time(): number {
    return statSync(this.#file, { throwIfNoEntry: false })?.mtimeMs ?? 0
  }

  /** Called every heartbeatMs. */
  look(): void {
    const time = this.#time()
    if (time !== this.#last) {
      this.#last = time
      this.#looks = 0
      this.#expected = true
    } else if (this.#expected) this.#looks++
  }

  /** For how long there was no sign. */
  get silentMs(): number {
    return this.#looks * heartbeatMs
  }
}

/** What the system says about a process that is silent, for messages; empty where it says nothing. */
export function processState(pid: number): string {
  try {
    const state = /\) (\w)/.exec(readFileSync(`/proc/${pid}/stat`, 'utf8'))?.[1]
    if (state === 'T' || state === 't') return ', a signal has stopped it'
    return state === 'D' ? ', it waits for a disk or the network' : ''
  } catch {
    return ''
  }
}
