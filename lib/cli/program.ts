// Builds the program and runs one command line. Apart from main.ts so that tests can call it in process.
import { Command } from 'commander'
import { addCommands } from './commands.js'
import { reportError } from './report.js'

/** The program with all commands. */
export function createProgram(version: string): Command {
  const program = new Command('viaduct')
    .description(
      'Carries language models between Hugging Face checkpoints and a Megatron-style parallel layout, ' +
        'proves that it carried them exactly, and trains them there.',
    )
    .version(version)
    .option('--debug', 'print stacks of errors')
    .enablePositionalOptions()
    .showHelpAfterError('(add --help for the options)')
    .addHelpText(
      'after',
      '\nExit codes: 0 done, 1 the check failed, 2 wrong use, 3 bad input, 4 a fault at run time, 128+n after signal n.',
    )
  addCommands(program)
  const strict = (command: Command) => {
    command.exitOverride()
    command.commands.forEach(strict)
  }
  strict(program)
  return program
}

/** Runs one command line and gives the exit code; never throws. @param argv - without node and script. */
export async function runCommandLine(argv: readonly string[], version: string): Promise<number> {
  try {
    const program = createProgram(version)
    await program.parseAsync(argv, { from: 'user' })
    const code = process.exitCode
    return typeof code === 'number' ? code : 0
  } catch (error) {
    const before = argv.indexOf('--') === -1 ? argv : argv.slice(0, argv.indexOf('--'))
    return reportError(error, { json: before.includes('--json'), debug: before.includes('--debug') })
  }
}
