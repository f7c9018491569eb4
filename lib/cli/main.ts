#!/usr/bin/env node
// The command line's entry.
import { packageVersion } from '../base/packageRoot.js'
import { runCommandLine } from './program.js'

runCommandLine(process.argv.slice(2), packageVersion()).then((code) => {
  process.exitCode = code
})
