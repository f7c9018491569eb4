// A group of ranks with its native communicator. Made by World.part; collectives are in collectives.ts.
import type { CommInfo } from '../addon/functions.js'
import { native } from '../addon/load.js'
import type { Group } from '../tensor/ctx.js'

/** Ranks along an axis, or of the world. */
export class CommGroup implements Group {
  constructor(
    readonly name: string,
    /** This process's place. */
    readonly rank: number,
    readonly size: number,
    /** Native communicator, 0 when size is 1. */
    readonly comm: number,
    /** The members' ranks in the world, in order. */
    readonly ranks: readonly number[],
  ) {}

  /** Transport, operations, bytes and program order so far; null for one rank. */
  info(): CommInfo | null {
    return this.comm === 0 ? null : native.commInfo(this.comm)
  }

  /** Operations that take longer fail with ERR_TIMEOUT naming the ranks not heard from. */
  setTimeout(timeoutMs: number): void {
    if (this.comm !== 0) native.setCommTimeout(this.comm, timeoutMs)
  }
}
