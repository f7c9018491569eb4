// The files that the house rules look at: everything that git knows or would take, less what is generated. Knows no rule.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
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

const generated = ['.git', 'node_modules', 'dist', 'build', '.deps', '.viaduct']

// The same list without git, for an unpacked archive.
function walked(folder = ''): string[] {
  return readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = folder === '' ? entry.name : `${folder}/${entry.name}`
    if (entry.isDirectory()) return generated.includes(entry.name) ? [] : walked(path)
    return [path]
  })
}

function listed(): string[] {
  // A checkout that belongs to another user is fine to read.
  const args = ['-c', 'safe.directory=*', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
  const result = spawnSync('git', args, { cwd: root, encoding: 'utf8', maxBuffer: 1 << 26 })
  return result.status === 0 ? result.stdout.split('\0') : walked()
}

/** All text files of the repository: what git knows and what it would take. */
export function repositoryFiles(): SourceFile[] {
  return listed()
    .filter((path) => textual.test(path) && path !== 'package-lock.json')
    .filter((path) => existsSync(join(root, path)) && statSync(join(root, path)).isFile())
    .map((path) => ({ path, text: readFileSync(join(root, path), 'utf8') }))
}

/** One line per problem, for a failed expectation that can be read. */
export function shown(problems: readonly Problem[]): string[] {
  return problems.map((p) => `${p.path}${p.line ? `:${p.line}` : ''} ${p.message}`)
}
