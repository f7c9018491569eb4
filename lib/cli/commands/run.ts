// `viaduct run`: torchrun's flags to the launcher.
import { type LaunchOptions, launch } from '../../launch/launcher.js'

interface Flags extends Omit<LaunchOptions, 'script' | 'args' | 'noPython'> {
  /** False with --no-python. */
  readonly python: boolean
}

export async function runCommand(script: string, args: string[], flags: Flags): Promise<void> {
  const { python, ...given } = flags
  const camel = (name: string) => name.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase())
  const options = Object.fromEntries(Object.entries(given).map(([name, value]) => [camel(name), value]))
  process.exitCode = await launch({ ...options, script, args, noPython: !python })
}
