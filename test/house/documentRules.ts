// What documents claim, against what exists: npm scripts, `viaduct` commands with their flags, files, links, code blocks.
// Rules are functions over a document and the facts, so that each can be shown to fail.
import { posix } from 'node:path'
import type { Problem, SourceFile } from './sources.js'

/** A flag of a command: whether a value follows it. */
export type Flags = ReadonlyMap<string, { readonly takesValue: boolean }>

/** What exists. Paths are from the repository's root. */
export interface Facts {
  readonly scripts: readonly string[]
  readonly commands: ReadonlyMap<string, Flags>
  exists(path: string): boolean
}

/** One fenced block of a Markdown file. */
export interface Block {
  readonly language: string
  readonly line: number
  readonly text: string
}

/** The fenced blocks of a document. `line` is that of the block's first line of content. */
export function blocksOf(markdown: string): Block[] {
  const blocks: Block[] = []
  const lines = markdown.split('\n')
  for (let i = 0; i < lines.length; i++) {
    const fence = /^\s*(`{3,}|~{3,})\s*(\w*)/.exec(lines[i] as string)
    if (!fence) continue
    const start = i + 1
    while (++i < lines.length && !(lines[i] as string).trim().startsWith(fence[1] as string)) {}
    blocks.push({
      language: (fence[2] as string).toLowerCase(),
      line: start + 1,
      text: lines.slice(start, i).join('\n'),
    })
  }
  return blocks
}

/** The single commands of a shell block: prompts, comments, variables in front and joined lines taken apart. */
export function commandsOf(block: Block): { words: string[]; line: number }[] {
  const found: { words: string[]; line: number }[] = []
  const joined = block.text.replace(/\\\n/g, '  ')
  joined.split('\n').forEach((raw, index) => {
    const line = raw.replace(/^\s*\$ /, '').replace(/(^|\s)#.*$/, '')
    for (const part of line.split(/&&|\|\|?|;|(?<!<[^>]*)>(?![^<]*>)/)) {
      const words = [...part.matchAll(/"[^"]*"|'[^']*'|\S+/g)].map((m) => m[0])
      while (words[0] && /^[A-Z_][A-Z0-9_]*=/.test(words[0])) words.shift()
      if (words.length > 0) found.push({ words, line: block.line + index })
    }
  })
  return found
}

function viaductFault(words: readonly string[], facts: Facts): string | undefined {
  const [name, ...rest] = words
  if (name === undefined || name === '--help' || name === '--version') return undefined
  const flags = facts.commands.get(name)
  if (!flags) return `viaduct has no command ${name}: one of ${[...facts.commands.keys()].join(', ')}`
  for (let i = 0; i < rest.length; i++) {
    const word = rest[i] as string
    if (word === '--') return undefined
    if (!/^--?[a-z]/i.test(word)) {
      // What follows the script of `viaduct run` is the script's.
      if (name === 'run') return undefined
      continue
    }
    const flag = word.split('=')[0] as string
    if (flag === '--help') continue
    const known = flags.get(flag)
    if (!known) return `viaduct ${name} has no flag ${flag}`
    if (known.takesValue && !word.includes('=')) i++
  }
  return undefined
}

function commandFault(words: readonly string[], facts: Facts): string | undefined {
  let [program, ...rest] = words
  if (program === 'npx') [program, ...rest] = rest
  if (program === 'npm') {
    const script = rest[0] === 'run' ? rest[1] : ['test', 'start'].includes(rest[0] ?? '') ? rest[0] : undefined
    if (script !== undefined && !facts.scripts.includes(script)) return `package.json has no script ${script}`
    return undefined
  }
  if (program === 'viaduct') return viaductFault(rest, facts)
  if (program === 'node' && rest[0] === 'dist/lib/cli/main.js') return viaductFault(rest.slice(1), facts)
  const file = ['node', 'tsx', 'bash', 'sh'].includes(program ?? '')
    ? rest.find((word) => !word.startsWith('-'))
    : program
  if (
    file !== undefined &&
    /^\.{0,2}\/?[\w.-]+\//.test(file) &&
    !/^(dist|\.viaduct)\//.test(file) && // made by programs
    !facts.exists(posix.normalize(file))
  ) {
    return `there is no file ${file}`
  }
  return undefined
}

const shells = ['sh', 'bash', 'shell', 'console']

/** Commands of shell blocks and of inline code that name a script, command, flag or file which does not exist. */
export function commandProblems(file: SourceFile, facts: Facts): Problem[] {
  const problems: Problem[] = []
  for (const block of blocksOf(file.text).filter((b) => shells.includes(b.language))) {
    for (const { words, line } of commandsOf(block)) {
      const message = commandFault(words, facts)
      if (message) problems.push({ path: file.path, line, message })
    }
  }
  for (const { code, line } of inlineCode(file.text)) {
    if (!/^(npm (run|test)|(npx )?viaduct [a-z])/.test(code)) continue
    // Several names at once, or a pattern of a command, are not a command line.
    const words = code.split(/\s+/).filter((word) => !/^\[.*\]?$|[|…]/.test(word))
    const message = commandFault(words, facts)
    if (message) problems.push({ path: file.path, line, message })
  }
  return problems
}

function inlineCode(markdown: string): { code: string; line: number }[] {
  let fenced = false
  return markdown.split('\n').flatMap((text, index) => {
    if (/^\s*(```|~~~)/.test(text)) fenced = !fenced
    if (fenced) return []
    return [...text.matchAll(/`([^`]+)`/g)].map((m) => ({ code: m[1] as string, line: index + 1 }))
  })
}

/** Relative links and, where `paths` says so, inline code that looks like a path of the repository, to nothing. */
export function pathProblems(file: SourceFile, facts: Facts, paths = true): Problem[] {
  const problems: Problem[] = []
  const folder = posix.dirname(file.path)
  file.text.split('\n').forEach((text, index) => {
    for (const match of text.matchAll(/\]\(([^)\s]+)\)/g)) {
      const target = (match[1] as string).replace(/#.*$/, '')
      if (target === '' || /^[a-z]+:/i.test(target)) continue
      if (!facts.exists(posix.normalize(posix.join(folder, target)))) {
        problems.push({ path: file.path, line: index + 1, message: `links to ${target}, which does not exist` })
      }
    }
  })
  if (!paths) return problems
  for (const { code, line } of inlineCode(file.text)) {
    const path = /^(?:lib|docs|native|test|recipes|examples|deploy|bench|\.ci)\/[\w./-]*$/.exec(code)?.[0]
    if (path && !facts.exists(path))
      problems.push({ path: file.path, line, message: `names ${path}, which does not exist` })
  }
  return problems
}

/** The `ts` blocks of a document, each a module of its own. */
export function typescriptBlocks(markdown: string): Block[] {
  return blocksOf(markdown).filter((block) => ['ts', 'typescript'].includes(block.language))
}

/** Targets of package.json's `exports`, `bin`, `main` and `types` whose source is not there. */
export function manifestProblems(manifest: Record<string, unknown>, exists: (path: string) => boolean): Problem[] {
  const targets = new Set<string>()
  const collect = (value: unknown): void => {
    if (typeof value === 'string') targets.add(value)
    else if (value && typeof value === 'object') Object.values(value).forEach(collect)
  }
  for (const key of ['exports', 'bin', 'main', 'types']) collect(manifest[key])
  return [...targets].flatMap((target) => {
    const path = target.replace(/^\.\//, '')
    const source = path.replace(/^dist\//, '').replace(/(\.d\.ts|\.js)$/, '.ts')
    const there = source.includes('*') ? exists(source.slice(0, source.indexOf('*'))) : exists(source)
    return there || exists(path) ? [] : [{ path: 'package.json', message: `${target} has no source ${source}` }]
  })
}
