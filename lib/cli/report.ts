// Errors at the edge of the command line: one readable line (or JSON), and the exit code.
import { CommanderError } from 'commander'
import { writeErrorFile } from '../base/errorFile.js'
import { ViaductError } from '../base/errors.js'
import { flagsNamed } from './layoutFlagNames.js'
import { say, styled } from './terminal.js'

const aboutLayouts: readonly string[] = ['ERR_LAYOUT_INVALID', 'ERR_CONFIG']

/**
 * Prints an error for people, or as one JSON line on stdout, and gives the exit code.
 * @param debug - prints the stack of errors that are not ours on purpose.
 */
export function reportError(error: unknown, options: { json?: boolean; debug?: boolean } = {}): number {
  if (error instanceof CommanderError) {
    if (error.exitCode === 0) return 0
    // Commander has printed it for people already.
    const body = { code: 'ERR_USAGE', message: error.message.replace(/^error: /, '') }
    if (options.json) process.stdout.write(`${JSON.stringify({ error: body })}\n`)
    return 2
  }
  writeErrorFile(error)
  const ours = error instanceof ViaductError
  if (options.json) {
    const body = ours
      ? error.toJSON()
      : { code: 'ERR_UNEXPECTED', message: error instanceof Error ? error.message : String(error) }
    process.stdout.write(`${JSON.stringify({ error: body })}\n`)
  }
  if (ours) {
    say(`${styled('red', 'error')} ${error.code} ${error.message}`)
    const flags = aboutLayouts.includes(error.code) ? flagsNamed(error.message) : ''
    if (flags !== '') say(flags)
    if (options.debug && error.stack) say(error.stack)
    return error.exitCode
  }
  const shown = error instanceof Error ? (error.stack ?? error.message) : String(error)
  say(`${styled('red', 'error')} ${shown}`)
  return 4
}
