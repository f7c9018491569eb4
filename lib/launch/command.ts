// The command line of a rank: TypeScript through tsx, JavaScript through Node, anything else as it is with --no-python.
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { extname } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { ViaductError } from '../base/errors.js'

export interface RankCommand {
  readonly program: string
  readonly args: readonly string[]
  /** Shows that it lives from its start on. */
  readonly beats: boolean
}

const typescript = ['.ts', '.mts', '.cts', '.tsx']
const javascript = ['.js', '.mjs', '.cjs']

function tsx(): string {
  return pathToFileURL(createRequire(import.meta.url).resolve('tsx')).href
}

/** The file that each rank of a script loads first; a source while this file is one. */
function preload(): string {
  return new URL(`./rankPreload${extname(fileURLToPath(import.meta.url))}`, import.meta.url).href
}

/**
 * How a rank runs `script`.
 * @throws ERR_FILE_MISSING, ERR_USAGE for a file that is neither TypeScript nor JavaScript.
 */
export function rankCommand(script: string, args: readonly string[], noPython: boolean): RankCommand {
  if (noPython) return { program: script, args, beats: false }
  const kind = extname(script).toLowerCase()
  if (!typescript.includes(kind) && !javascript.includes(kind)) {
    throw new ViaductError(
      'ERR_USAGE',
      'run',
      `expected a script that ends in ${[...typescript, ...javascript].join(', ')}, got ${script}: --no-python runs any program`,
    )
  }
  if (!existsSync(script)) {
    throw new ViaductError('ERR_FILE_MISSING', 'run', `expected a script at ${script}, found none`, { file: script })
  }
  const hook = preload()
  const loads = typescript.includes(kind) || hook.endsWith('.ts') ? ['--import', tsx()] : []
  return { program: process.execPath, args: [...loads, '--import', hook, script, ...args], beats: true }
}
