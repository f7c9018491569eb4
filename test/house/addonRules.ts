// The addon's own table against the typed rows of lib/addon/functions.ts: same names, same number and kinds of arguments.
import type { Problem } from './sources.js'

/** A function of the addon: its name and the kinds of its arguments. */
export interface Row {
  readonly name: string
  readonly args: readonly string[]
}

/** The methods of `interface Addon`, with the names of their parameters' types. */
export function typedRows(source: string): Row[] {
  const text = source.replace(/\/\*[\s\S]*?\*\//g, '').replace(/\/\/.*$/gm, '')
  const start = text.indexOf('interface Addon {')
  if (start < 0) return []
  const body = text.slice(start, text.indexOf('\n}', start))
  return [...body.matchAll(/^ {2}(\w+)\(([^)]*)\):/gm)].map((match) => ({
    name: match[1] as string,
    args: (match[2] as string)
      .split(',')
      .map((parameter) => parameter.trim())
      .filter((parameter) => parameter !== '')
      .map((parameter) => parameter.slice(parameter.indexOf(':') + 1).trim()),
  }))
}

// Kinds of the addon's table that TypeScript spells in another way.
const spelling: Readonly<Record<string, string>> = { any: 'unknown' }

/** Rows that only one side has, and rows whose arguments differ. */
export function tableProblems(native: readonly Row[], typed: readonly Row[]): Problem[] {
  const path = 'lib/addon/functions.ts'
  const problems: Problem[] = []
  const typedByName = new Map(typed.map((row) => [row.name, row]))
  const names = new Set(native.map((row) => row.name))
  for (const row of native) {
    const ours = typedByName.get(row.name)
    const args = row.args.map((kind) => spelling[kind] ?? kind)
    if (!ours) problems.push({ path, message: `lacks ${row.name}(${args.join(', ')}), which the addon has` })
    else if (ours.args.join() !== args.join()) {
      problems.push({ path, message: `has ${row.name}(${ours.args.join(', ')}), the addon has (${args.join(', ')})` })
    }
  }
  for (const { name } of typed)
    if (!names.has(name)) problems.push({ path, message: `has ${name}, which the addon lacks` })
  for (const rows of [native, typed]) {
    const seen = new Set<string>()
    for (const { name } of rows) {
      if (seen.has(name)) problems.push({ path, message: `${name} is there twice` })
      seen.add(name)
    }
  }
  return problems
}
