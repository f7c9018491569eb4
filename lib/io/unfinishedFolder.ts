// The hidden folder in which long work grows beside its target, so that a killed process can be gone on from: the output, the
// plan that it follows, a journal a process, and a lock. Who writes the output and what a journal line means is not known here.
import { randomBytes } from 'node:crypto'
import { appendFile, link, mkdir, readdir, readFile, rename, rm, rmdir, stat, writeFile } from 'node:fs/promises'
import { hostname } from 'node:os'
import { basename, join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { ViaductError } from '../base/errors.js'
import { commitFolder, ioError, unfinishedName, writeFileAtomic } from './atomic.js'
import { Parents } from './growingFolder.js'

/** A process that writes. */
export interface Writer {
  readonly host: string
  readonly pid: number
  /** Clock ticks from the machine's start to the process's, which tell two processes of one number apart; null where unknown. */
  readonly started: string | null
}

async function startOf(pid: number | 'self'): Promise<string | null> {
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => null)
  return text?.slice(text.lastIndexOf(')') + 2).split(' ')[19] ?? null
}

/** This process. */
export async function thisWriter(): Promise<Writer> {
  return { host: hostname(), pid: process.pid, started: await startOf('self') }
}

async function isLive({ pid, started }: Writer): Promise<boolean> {
  try {
    process.kill(pid, 0)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EPERM') return false
  }
  const now = await startOf(pid)
  return now === null || started === null || now === started
}

/** How long writers may still be ending: ranks notice within a second that their launcher was killed. */
const patienceMs = 3000

/** How the folder was found. `committed`: the output had its name already when the last process was killed. */
export type Found = 'new' | 'resumed' | 'committed' | 'restarted'

interface Plan {
  readonly fingerprint: string
  /** Of the output folder: tells after a kill whether it has got the target's name. */
  readonly inode: number
}

async function inodeOf(path: string): Promise<number | null> {
  return stat(path).then(
    ({ ino }) => ino,
    () => null,
  )
}

/** An unfinished target; see the file's head. */
export class UnfinishedFolder {
  readonly folder: string
  /** Where the output grows. */
  readonly output: string
  private parents: Parents | null = null

  constructor(readonly target: string) {
    this.folder = unfinishedName(target)
    this.output = join(this.folder, 'output')
  }

  private get lock(): string {
    return join(this.folder, 'lock.json')
  }

  private get plan(): string {
    return join(this.folder, 'plan.json')
  }

  /** True when a plan of this fingerprint was carried out but for the last step: the target has its content. */
  async isCommitted(fingerprint: string): Promise<boolean> {
    const plan = await this.readPlan()
    return plan?.fingerprint === fingerprint && (await inodeOf(this.target)) === plan.inode
  }

  /**
   * Makes the folder's own, and the target's parents, and says what is there.
   * @param writers - the processes that will write: while one of them lives, nobody else may.
   * @param resume - false: what is there is removed.
   * @throws ERR_TARGET_BUSY
   */
  async claim(fingerprint: string, writers: readonly Writer[], resume: boolean): Promise<Found> {
    this.parents = await Parents.make(this.target)
    try {
      await mkdir(this.folder, { recursive: true })
      await this.takeLock(writers)
    } catch (cause) {
      await this.parents.takeBack()
      throw ioError(cause, `cannot make ${this.target}`)
    }
    try {
      const plan = await this.readPlan()
      if (plan !== null && plan.fingerprint === fingerprint && resume) {
        if ((await inodeOf(this.output)) === plan.inode) return 'resumed'
        if ((await inodeOf(this.target)) === plan.inode) return 'committed'
      }
      for (const name of await readdir(this.folder))
        if (name !== basename(this.lock)) await rm(join(this.folder, name), { recursive: true, force: true })
      await mkdir(this.output)
      return plan === null ? 'new' : 'restarted'
    } catch (cause) {
      await this.leave()
      throw ioError(cause, `cannot make ${this.target}`)
    }
  }

  /** Writes the plan down: from here on the output can be gone on with. */
  async begin(fingerprint: string): Promise<void> {
    const plan: Plan = { fingerprint, inode: (await inodeOf(this.output)) as number }
    await writeFileAtomic(this.plan, `${JSON.stringify(plan)}\n`)
  }

  /** Appends a line to a process's journal. A line that a kill has cut is no line. */
  async note(rank: number, entry: unknown): Promise<void> {
    try {
      await appendFile(
        join(this.folder, `journal-${String(rank).padStart(5, '0')}.ndjson`),
        `${JSON.stringify(entry)}\n`,
      )
    } catch (cause) {
      throw ioError(cause, `cannot write the journal of ${this.target}`)
    }
  }

  /** The lines of all journals. */
  async notes(): Promise<unknown[]> {
    const entries: unknown[] = []
    for (const name of (await readdir(this.folder)).filter((n) => n.startsWith('journal-')).sort()) {
      const text = await readFile(join(this.folder, name), 'utf8')
      for (const line of text.split('\n')) {
        try {
          if (line !== '') entries.push(JSON.parse(line))
        } catch {
          // Cut by a kill: the next process has begun a line of its own behind it.
        }
      }
      if (text !== '' && !text.endsWith('\n')) await appendFile(join(this.folder, name), '\n')
    }
    return entries
  }

  /** Gives the output the target's name. */
  async commit(): Promise<void> {
    await commitFolder(this.output, this.target)
  }

  /** Removes everything, the lock last. */
  async remove(): Promise<void> {
    for (const name of await readdir(this.folder).catch(() => []))
      if (name !== basename(this.lock)) await rm(join(this.folder, name), { recursive: true, force: true })
    await rm(this.lock, { force: true })
    await rmdir(this.folder).catch(() => {}) // another process has claimed it by now
  }

  /** Removes everything, and the target's parents as far as `claim` has made them. */
  async abandon(): Promise<void> {
    await this.remove()
    await this.parents?.takeBack()
  }

  /** Leaves what is there to a later process. */
  async leave(): Promise<void> {
    await rm(this.lock, { force: true })
  }

  private async readPlan(): Promise<Plan | null> {
    const text = await readFile(this.plan, 'utf8').catch(() => null)
    try {
      return text === null ? null : (JSON.parse(text) as Plan)
    } catch {
      return null
    }
  }

  private async takeLock(writers: readonly Writer[]): Promise<void> {
    const patience = performance.now() + patienceMs
    const own = `${this.lock}.${process.pid}-${randomBytes(4).toString('hex')}`
    await writeFile(own, JSON.stringify(writers))
    try {
      for (;;) {
        try {
          return await link(own, this.lock)
        } catch (error) {
          if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
        }
        const text = await readFile(this.lock, 'utf8').catch(() => null)
        if (text === null) continue // released meanwhile
        try {
          await this.refuseLive(JSON.parse(text) as Writer[])
        } catch (error) {
          if (performance.now() > patience) throw error
          await setTimeout(100)
          continue
        }
        // Of several processes that find a dead lock one moves it away; what it has moved must be what it has read.
        const aside = `${own}.aside`
        await rename(this.lock, aside).catch(() => {})
        const moved = await readFile(aside, 'utf8').catch(() => text)
        if (moved !== text) await link(aside, this.lock).catch(() => {})
        await rm(aside, { force: true })
      }
    } finally {
      await rm(own, { force: true })
    }
  }

  private async refuseLive(writers: readonly Writer[]): Promise<void> {
    const here = writers.filter((writer) => writer.host === hostname())
    const live = (await Promise.all(here.map(isLive))).findIndex((alive) => alive)
    const blocking = live >= 0 ? here[live] : here.length === 0 ? writers[0] : undefined
    if (blocking === undefined) return
    throw new ViaductError(
      'ERR_TARGET_BUSY',
      'target',
      `expected no other process to write ${this.target}, got process ${blocking.pid} on ${blocking.host}: wait for it or end it${live >= 0 ? '' : `; if it is gone, remove ${this.lock}`}`,
      { target: this.target, pid: blocking.pid, host: blocking.host },
    )
  }
}

/** Removes all files of a folder but the named ones, and folders that are empty then. */
export async function keepOnly(folder: string, names: ReadonlySet<string>, below = ''): Promise<void> {
  for (const entry of await readdir(join(folder, below), { withFileTypes: true })) {
    const name = below === '' ? entry.name : `${below}/${entry.name}`
    if (entry.isDirectory()) {
      await keepOnly(folder, names, name)
      await rmdir(join(folder, name)).catch(() => {})
    } else if (!names.has(name)) await rm(join(folder, name))
  }
}
