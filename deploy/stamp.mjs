// What is up to date: a hash of each part's inputs in .viaduct/setup.json, and a lock so that two set-ups do not mix.
// Knows files only; what the parts do stands in setup.mjs.
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { ROOT } from './libraries.mjs'
import { SetupError } from './shell.mjs'

const STATE = join(ROOT, '.viaduct')
const STAMP = join(STATE, 'setup.json')
const LOCK = join(STATE, 'lock')

/** All files below `folder` (relative to the root), sorted, that `wanted` accepts. */
export function filesBelow(folder, wanted = () => true) {
  const absolute = join(ROOT, folder)
  if (!existsSync(absolute)) return []
  if (!statSync(absolute).isDirectory()) return wanted(folder) ? [folder] : []
  const names = readdirSync(absolute, { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1))
  return names.flatMap((entry) => {
    const path = `${folder}/${entry.name}`
    if (entry.isDirectory()) return filesBelow(path, wanted)
    return wanted(path) ? [path] : []
  })
}

/** A hash over the names and contents of files, and over further values. */
export function hashOf(files, ...values) {
  const hash = createHash('sha256')
  for (const file of files) {
    if (!existsSync(join(ROOT, file))) continue
    hash
      .update(`${file}\0`)
      .update(readFileSync(join(ROOT, file)))
      .update('\0')
  }
  for (const value of values) hash.update(`${JSON.stringify(value) ?? 'undefined'}\0`)
  return hash.digest('hex').slice(0, 32)
}

/** The stamps of the parts that are done: { part: hash }. */
export function readStamps() {
  try {
    return JSON.parse(readFileSync(STAMP, 'utf8'))
  } catch {
    return {}
  }
}

/** Notes that a part is done for these inputs; `hash` undefined forgets it. */
export function writeStamp(part, hash) {
  mkdirSync(STATE, { recursive: true })
  const temporary = `${STAMP}.${process.pid}`
  writeFileSync(temporary, `${JSON.stringify({ ...readStamps(), [part]: hash }, null, 2)}\n`)
  renameSync(temporary, STAMP)
}

function holder() {
  try {
    return JSON.parse(readFileSync(join(LOCK, 'holder.json'), 'utf8'))
  } catch {
    return undefined
  }
}

function alive(pid) {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return error.code === 'EPERM'
  }
}

function stale() {
  const by = holder()
  if (by) return by.host === hostname() && !alive(by.pid)
  // Between mkdir and the note of the holder, or after a kill just there.
  try {
    return Date.now() - statSync(LOCK).mtimeMs > 10_000
  } catch {
    return false
  }
}

/** Runs `work` while holding the set-up's lock; waits for another set-up, takes over from a dead one. */
export async function withLock(work, { limitMs = 30 * 60_000 } = {}) {
  mkdirSync(STATE, { recursive: true })
  const begun = Date.now()
  let told = false
  for (;;) {
    try {
      mkdirSync(LOCK)
      break
    } catch (error) {
      if (error.code !== 'EEXIST') throw error
    }
    if (stale()) {
      // Only one of several waiting processes wins the rename.
      const aside = `${LOCK}.${process.pid}`
      try {
        renameSync(LOCK, aside)
        rmSync(aside, { recursive: true, force: true })
      } catch {}
      continue
    }
    if (!told) console.log(`waiting for another set-up (process ${holder()?.pid ?? '?'}) to end …`)
    told = true
    if (Date.now() - begun > limitMs) {
      throw new SetupError(
        `[set-up] expected ${LOCK} to become free, got none in ${limitMs / 60_000} minutes: remove it if no set-up runs`,
      )
    }
    await new Promise((wake) => setTimeout(wake, 200))
  }
  const release = () => rmSync(LOCK, { recursive: true, force: true })
  const onSignal = (signal) => {
    release()
    process.kill(process.pid, signal)
  }
  try {
    writeFileSync(join(LOCK, 'holder.json'), JSON.stringify({ pid: process.pid, host: hostname() }))
    process.once('SIGINT', onSignal).once('SIGTERM', onSignal)
    return await work()
  } finally {
    process.removeListener('SIGINT', onSignal).removeListener('SIGTERM', onSignal)
    release()
  }
}
