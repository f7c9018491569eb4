// What Ctrl-C and SIGTERM do to work that writes folders: it ends through its AbortSignal, which takes away what is half written or says
// how to go on with it. A second Ctrl-C ends the process at once; other signals that follow do not (a launcher sends several).
import { constants } from 'node:os'
import { ViaductError } from '../base/errors.js'
import { say } from './terminal.js'

const names = ['SIGINT', 'SIGTERM'] as const

/** Runs `work`; after a signal the exit code is 128 + its number and nothing is thrown. */
export async function interruptible(work: (signal: AbortSignal) => Promise<void>): Promise<void> {
  const controller = new AbortController()
  let caught: NodeJS.Signals | null = null
  const listen = (name: NodeJS.Signals) => {
    if (caught === 'SIGINT' && name === 'SIGINT') process.exit(128 + constants.signals[name])
    caught ??= name
    controller.abort()
  }
  for (const name of names) process.on(name, listen)
  try {
    await work(controller.signal)
  } catch (error) {
    if (caught === null) throw error
    const kept = error instanceof ViaductError && error.details['resumable'] === true
    say(`stopped by ${caught}: ${kept ? error.message : 'what was half written is gone'}`)
    process.exitCode = 128 + constants.signals[caught]
  } finally {
    for (const name of names) process.off(name, listen)
  }
}
