// Running programs and reporting steps, for the scripts of this folder. Node built-ins only; nothing of Viaduct's library.
import { spawnSync } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readFileSync } from 'node:fs'
import { dirname } from 'node:path'

/** A failure that the user can mend: printed without a stack. */
export class SetupError extends Error {}

/** Runs a program and returns { ok, out, err, status }; never throws. */
export function capture(program, args, options = {}) {
  const result = spawnSync(program, args, { encoding: 'utf8', maxBuffer: 1 << 28, ...options })
  return { ok: result.status === 0, out: result.stdout ?? '', err: result.stderr ?? '', status: result.status }
}

/** Runs a program with its output going to the terminal, or to `log` with the tail shown on failure. Throws SetupError. */
export function run(program, args, { log, what, ...options } = {}) {
  const line = [program, ...args].join(' ')
  let stdio = 'inherit'
  let file
  if (log) {
    mkdirSync(dirname(log), { recursive: true })
    file = openSync(log, 'w')
    stdio = ['ignore', file, file]
  }
  const result = spawnSync(program, args, { stdio, ...options })
  if (file !== undefined) closeSync(file)
  if (result.status === 0) return
  const why = result.error ? result.error.message : result.signal ? `signal ${result.signal}` : `exit ${result.status}`
  const tail = log ? `\n${excerpt(readFileSync(log, 'utf8'))}\n(all of it: ${log})` : ''
  throw new SetupError(`${what ?? 'command'} failed (${why}): ${line}${tail}`)
}

// The end of a log, and before it the first errors: a compiler's lie far above what make says last.
function excerpt(text) {
  const lines = text.trimEnd().split('\n')
  const head = lines
    .slice(0, -30)
    .filter((line) => /\berror\b/i.test(line))
    .slice(0, 10)
  return [...head, ...(head.length > 0 ? ['…'] : []), ...lines.slice(-30)].join('\n')
}

/** Where a program is, or undefined. */
export function which(program) {
  const found = capture('/bin/sh', ['-c', `command -v ${program}`])
  return found.ok ? found.out.trim() : undefined
}

/** Prints one line per step with the time it took. */
export class Steps {
  constructor(total, quiet) {
    this.total = total
    this.quiet = quiet
    this.index = 0
    this.start = Date.now()
  }

  /** Runs `work`; its return value is the detail that the line shows. Announced first when it may take long. */
  async step(title, work, announce) {
    this.index++
    const begun = Date.now()
    const head = `[${this.index}/${this.total}] ${title}`
    if (announce && !this.quiet) process.stdout.write(`${head}: ${announce} …\n`)
    const detail = await work()
    if (!this.quiet) console.log(`${head}: ${detail} (${((Date.now() - begun) / 1000).toFixed(1)} s)`)
    return detail
  }
}
