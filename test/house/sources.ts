// The files that the house rules look at: everything that git knows or would take, less what is generated. Knows no rule.
import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync, statSync } from 'node:fs'
import { join, resolve } from 'node:path'

/** The repository's root. */
export const root = resolve(import.meta.dirname, '../..')

/** One file: its path from the root with `/`, and its text. */
export interface SourceFile {
  readonly path: string
  readonly text: string
}

/** A broken rule: where, and what to do. */
export interface Problem {
  readonly path: string
  readonly line?: number
  readonly message: string
}

const textual = /\.(ts|mjs|js|cc|h|cu|cuh|py|sh|md|json|ya?ml|gyp|txt)$|^\.ci\/run$|^LICENSE$/

/** All text files of the repository. An archive without git's folder gives none: the rules are for the repository. */
export function repositoryFiles(): SourceFile[] {
  const listed = execFileSync('git', ['ls-files', '-z', '--cached', '--others', '--exclude-standard'], {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 1 << 26,
  })
  return listed
    .split('\0')
    .filter((path) => textual.test(path) && path !== 'package-lock.json')
    .filter((path) => existsSync(join(root, path)) && statSync(join(root, path)).isFile())
    .map((path) => ({ path, text: readFileSync(join(root, path), 'utf8') }))
}

/** One line per problem, for a failed expectation that can be read. */
export function shown(problems: readonly Problem[]): string[] {
  return problems.map((p) => `${p.path}${p.line ? `:${p.line}` : ''} ${p.message}`)
}
