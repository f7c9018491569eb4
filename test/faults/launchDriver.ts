// `viaduct run` without the command line: launches what its argument says as JSON and ends with the launcher's exit code.
import { ViaductError } from '../../lib/base/errors.js'
import { type LaunchOptions, launch } from '../../lib/launch/launcher.js'

try {
  process.exitCode = await launch(JSON.parse(process.argv[2] as string) as LaunchOptions)
} catch (error) {
  if (!(error instanceof ViaductError)) throw error
  console.error(`${error.code} ${error.message}`)
  process.exitCode = error.exitCode
}
