// What a folder needs that grows beside its target: the parents, made for it; no leftovers of killed processes; and all of it taken
// away again when nothing comes of it. How a finished one gets the target's name is in atomic.ts.
import { mkdir, rm } from 'node:fs/promises'
import { dirname } from 'node:path'
import { commitFolder, ioError, makeFolder, removeMade, removeStale, temporaryName } from './atomic.js'

/** The parents of a target. */
export class Parents {
  readonly #folder: string
  #topmost: string | null = null

  private constructor(target: string) {
    this.#folder = dirname(target)
  }

  /** Makes those that are missing, and removes what killed processes have left beside the target. @throws ERR_IO, ERR_NO_SPACE */
  static async make(target: string): Promise<Parents> {
    const parents = new Parents(target)
    try {
      parents.#topmost = await makeFolder(parents.#folder)
    } catch (cause) {
      throw ioError(cause, `cannot make ${parents.#folder}`)
    }
    await removeStale(parents.#folder)
    return parents
  }

  /** Takes those away that were made, as far as they are empty. */
  async takeBack(): Promise<void> {
    if (this.#topmost !== null) await removeMade(this.#folder, this.#topmost)
  }
}

/** A folder of this process under a hidden name; what it holds when it is killed is removed by the next writer of the target. */
export class GrowingFolder {
  private constructor(
    readonly target: string,
    readonly folder: string,
    private readonly parents: Parents,
  ) {}

  /** Makes it, empty. @throws ERR_IO, ERR_NO_SPACE: nothing is left then. */
  static async begin(target: string): Promise<GrowingFolder> {
    const parents = await Parents.make(target)
    const folder = temporaryName(target)
    try {
      await mkdir(folder)
    } catch (cause) {
      await parents.takeBack()
      throw ioError(cause, `cannot make ${target}`)
    }
    return new GrowingFolder(target, folder, parents)
  }

  /** Gives it the target's name. Its files were flushed by their writers. */
  async commit(): Promise<void> {
    await commitFolder(this.folder, this.target)
  }

  /** Removes it, and what was made for it. */
  async abandon(): Promise<void> {
    await rm(this.folder, { recursive: true, force: true })
    await this.parents.takeBack()
  }
}
