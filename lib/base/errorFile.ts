// The file in which a failing rank tells its launcher why, in the form that torchrun reads too: `message` and `timestamp` in
// seconds. What is written here is read by lib/launch.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { envInt, envText } from './env.js'

/** Contents of an error file, as far as they could be read. */
export interface RankError {
  readonly message: string
  /** Of a ViaductError. */
  readonly code: string | null
  /** When, in ms since 1970; null when the writer did not say. */
  readonly timeMs: number | null
}

/** A script may come with a copy of Viaduct of its own, so with another class of this name. */
function codeOf(error: Error & { readonly code?: unknown }): string | null {
  return error.name === 'ViaductError' && typeof error.code === 'string' ? error.code : null
}

/** Writes the error to TORCHELASTIC_ERROR_FILE; nothing where that is not set. The first error of a process stays. Never throws. */
export function writeErrorFile(error: unknown): void {
  const file = envText('TORCHELASTIC_ERROR_FILE')
  if (file === undefined) return
  const shown = error instanceof Error ? error : new Error(String(error))
  const now = Date.now()
  const code = codeOf(shown)
  const contents = {
    message: code === null ? `${shown.name}: ${shown.message}` : `${code} ${shown.message}`,
    timestamp: Math.floor(now / 1000),
    timestampMs: now,
    code,
    stack: shown.stack ?? null,
    rank: envInt('RANK') ?? null,
  }
  try {
    mkdirSync(dirname(file), { recursive: true })
    writeFileSync(file, JSON.stringify(contents), { flag: 'wx' })
  } catch {
    // There is one already, or no place for it: the error itself still shows on the terminal.
  }
}

let watching = false

/** Writes the error file when an error ends this process. Idempotent; changes nothing about how the process ends. */
export function writeErrorFileWhenUncaught(): void {
  if (watching) return
  watching = true
  process.on('uncaughtExceptionMonitor', writeErrorFile)
}

/** Reads an error file, ours or torchrun's; null when there is none or it is no such file. */
export function readErrorFile(file: string): RankError | null {
  try {
    const data = JSON.parse(readFileSync(file, 'utf8')) as Record<string, unknown>
    const nested = data.message as { message?: unknown; extraInfo?: { timestamp?: unknown } } | string
    const message = typeof nested === 'string' ? nested : String(nested?.message ?? '')
    const seconds = typeof nested === 'string' ? data.timestamp : nested?.extraInfo?.timestamp
    const timeMs = typeof data.timestampMs === 'number' ? data.timestampMs : Number(seconds) * 1000
    return {
      message,
      code: typeof data.code === 'string' ? data.code : null,
      timeMs: Number.isFinite(timeMs) && timeMs > 0 ? timeMs : null,
    }
  } catch {
    return null
  }
}
