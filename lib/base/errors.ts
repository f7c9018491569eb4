// The one error class and the table of its codes. A code is stable: programs may match on it. Its kind decides the exit code.

/** Kind of a fault: decides the command line's exit code. */
export type ErrorKind = 'check' | 'usage' | 'input' | 'fault'

const codes = {
  // the program was called wrongly
  ERR_USAGE: 'usage',
  ERR_CONFIG: 'usage',
  ERR_LAYOUT_INVALID: 'usage',
  ERR_TARGET_EXISTS: 'usage',
  ERR_TARGET_BUSY: 'usage',
  ERR_OFFLINE: 'usage',
  // a tensor program is wrong
  ERR_HANDLE: 'fault',
  ERR_VERSION: 'fault',
  ERR_SHAPE: 'fault',
  ERR_DTYPE: 'fault',
  ERR_LAYOUT: 'fault',
  ERR_UNSUPPORTED: 'fault',
  ERR_ASSERT: 'fault',
  // the run failed
  ERR_OUT_OF_MEMORY: 'fault',
  ERR_COMM: 'fault',
  ERR_TIMEOUT: 'fault',
  ERR_RANK_FAILED: 'fault',
  ERR_ABORTED: 'fault',
  ERR_NOT_FINITE: 'fault',
  ERR_IO: 'fault',
  ERR_NO_SPACE: 'fault',
  ERR_NETWORK: 'fault',
  ERR_NATIVE: 'fault',
  ERR_ADDON: 'fault',
  // input from outside is broken
  ERR_SAFETENSORS_HEADER: 'input',
  ERR_SAFETENSORS_LAYOUT: 'input',
  ERR_SAFETENSORS_SIZE: 'input',
  ERR_SAFETENSORS_DTYPE: 'input',
  ERR_INDEX: 'input',
  ERR_PATH_ESCAPE: 'input',
  ERR_FILE_MISSING: 'input',
  ERR_JSON: 'input',
  ERR_HF_CONFIG: 'input',
  ERR_ARCHITECTURE: 'input',
  ERR_COVERAGE: 'input',
  ERR_TENSOR_SHAPE: 'input',
  ERR_TENSOR_DTYPE: 'input',
  ERR_TIED: 'input',
  ERR_PICKLE: 'input',
  ERR_TORCH_FILE: 'input',
  ERR_TOKENIZER: 'input',
  ERR_TOKEN_ID: 'input',
  ERR_LABEL: 'input',
  ERR_DATA: 'input',
  ERR_CHECKPOINT: 'input',
  ERR_CHECKPOINT_HASH: 'input',
  ERR_HTTP: 'input',
  ERR_HUB_ACCESS: 'input',
  ERR_HUB_NOT_FOUND: 'input',
  ERR_DOWNLOAD_HASH: 'input',
  // a check was made and failed
  ERR_VERIFY: 'check',
} as const satisfies Record<string, ErrorKind>

/** Stable code of an error. */
export type ErrorCode = keyof typeof codes

/** Exit code of the command line for each kind of error. */
export const exitCodes: Readonly<Record<ErrorKind, number>> = { check: 1, usage: 2, input: 3, fault: 4 }

/** JSON-safe facts of an error: file, tensor, line, rank, field, expected, actual. */
export type ErrorDetails = Readonly<Record<string, unknown>>

/**
 * Every error that Viaduct throws on purpose. The message reads `[where] expected E, got A: what to do`.
 */
export class ViaductError extends Error {
  readonly code: ErrorCode
  /** The part that noticed, e.g. `parallel`, `safetensors`, `rmsNormForward`. */
  readonly where: string
  readonly details: ErrorDetails

  constructor(code: ErrorCode, where: string, message: string, details: ErrorDetails = {}, options?: ErrorOptions) {
    super(`[${where}] ${message}`, options)
    this.name = 'ViaductError'
    this.code = code
    this.where = where
    this.details = details
  }

  get kind(): ErrorKind {
    return codes[this.code]
  }

  get exitCode(): number {
    return exitCodes[this.kind]
  }

  toJSON(): Record<string, unknown> {
    return { code: this.code, where: this.where, message: this.message, details: this.details }
  }
}

/** True if `code` is one of the table's codes. */
export function isErrorCode(code: string): code is ErrorCode {
  return Object.hasOwn(codes, code)
}

/** An invariant of our own code; never for what a user can cause. */
export function assert(condition: unknown, why: string): asserts condition {
  if (!condition) throw new ViaductError('ERR_ASSERT', 'assert', why)
}

/** @throws ERR_ABORTED when the signal was aborted; its reason is the cause. */
export function stopIfAborted(signal: AbortSignal | undefined, where: string): void {
  if (signal?.aborted)
    throw new ViaductError('ERR_ABORTED', where, 'the signal was aborted', {}, { cause: signal.reason })
}

/** The name among `known` nearest to `name` (edit distance at most 3 and a third of its length), for "did you mean". */
export function nearest(name: string, known: Iterable<string>): string | undefined {
  let best: string | undefined
  let bestDistance = Math.min(3, Math.ceil(name.length / 3)) + 1
  for (const candidate of known) {
    const distance = editDistance(name.toLowerCase(), candidate.toLowerCase())
    if (distance < bestDistance) {
      best = candidate
      bestDistance = distance
    }
  }
  return best
}

function editDistance(a: string, b: string): number {
  let previous = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    for (let j = 1; j <= b.length; j++) {
      const change = (previous[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1)
      row.push(Math.min(change, (previous[j] as number) + 1, (row[j - 1] as number) + 1))
    }
    previous = row
  }
  return previous[b.length] as number
}
