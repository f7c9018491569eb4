#!/usr/bin/env node
// The command line's entry.
import { packageVersion } from '../base/packageRoot.js'
import { runCommandLine } from './program.js'

// A reader that closes the pipe early (`| head`) ends the program quietly.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error
  process.exit(0)
})

runCommandLine(process.argv.slice(2), packageVersion()).then((code) => {
  process.exitCode = code
})
