// Which file may import which. The order of lib's layers stands here and nowhere else in code (docs/architecture.md has
// the same list for people; a test compares them). Rules are functions over files, so that each can be shown to fail.
import { posix } from 'node:path'
import type { Problem, SourceFile } from './sources.js'

/** lib's layers from the lowest to the highest. */
export const layers: readonly string[] = [
  'base',
  'addon',
  'tensor',
  'ops',
  'nn',
  'parallel',
  'peft',
  'models',
  'io',
  'config',
  'checkpoint',
  'bridge',
  'data',
  'optim',
  'plan',
  'train',
  'inference',
  'launch',
  'cli',
]

interface Import {
  readonly specifier: string
  readonly line: number
}

/** Static, dynamic, re-exporting and `import type` specifiers of a TypeScript file. */
export function importsOf(file: SourceFile): Import[] {
  const pattern =
    /(?:^|[\s;}])(?:import|export)\s*(?:type\s+)?(?:[\w*\s{},$]+\s+from\s*)?['"]([^'"\n]+)['"]|\b(?:import|require)\(\s*['"]([^'"\n]+)['"]/g
  // Comments may hold examples; strings with imports in them do not occur outside this folder.
  const code = file.text.replace(/\/\*[\s\S]*?\*\//g, (c) => c.replace(/[^\n]/g, ' ')).replace(/^\s*\/\/.*$/gm, '')
  return [...code.matchAll(pattern)].map((match) => ({
    specifier: (match[1] ?? match[2]) as string,
    line: code.slice(0, match.index).split('\n').length + (/^\n/.test(match[0]) ? 1 : 0),
  }))
}

function layerOf(path: string): string | undefined {
  const match = /^lib\/([^/]+)\//.exec(path)
  return match?.[1]
}

/** lib's files import their own folder or a lower layer; recipes import lib below train, examples the package's name and each other. */
export function layerProblems(files: readonly SourceFile[]): Problem[] {
  const problems: Problem[] = []
  for (const file of files.filter((f) => f.path.endsWith('.ts'))) {
    const [top] = file.path.split('/') as [string]
    if (!['lib', 'recipes', 'examples'].includes(top)) continue
    const own = layerOf(file.path)
    if (top === 'lib' && own !== undefined && !layers.includes(own)) {
      problems.push({ path: file.path, message: `lib/${own} is not a layer: one of ${layers.join(', ')}` })
      continue
    }
    for (const { specifier, line } of importsOf(file)) {
      const say = (message: string) =>
        problems.push({ path: file.path, line, message: `imports ${specifier}: ${message}` })
      if (top === 'examples') {
        if (!/^(viaduct(\/|$)|node:|\.\/)/.test(specifier))
          say('examples use the package by its name and files beside them')
        continue
      }
      if (!specifier.startsWith('.')) {
        if (/^viaduct(\/|$)/.test(specifier)) say('lib and recipes import each other by relative paths')
        continue
      }
      const target = posix.normalize(posix.join(posix.dirname(file.path), specifier))
      const [targetTop] = target.split('/') as [string]
      const theirs = layerOf(target)
      if (top === 'recipes') {
        const allowed =
          targetTop === 'recipes' || (theirs !== undefined && layers.indexOf(theirs) < layers.indexOf('train'))
        if (!allowed) say('recipes import recipes and the layers of lib below train')
      } else if (targetTop === 'recipes') {
        if (own !== undefined && own !== 'cli') say('only lib/cli looks at recipes')
      } else if (targetTop !== 'lib') {
        say('lib imports lib only')
      } else if (own !== undefined) {
        if (theirs === undefined) say('a layer imports a layer, not the entry point')
        else if (layers.indexOf(theirs) > layers.indexOf(own)) say(`${own} is below ${theirs}`)
      }
    }
  }
  return problems
}

/** lib and recipes use runtime dependencies only; everything else is for development. */
export function dependencyProblems(files: readonly SourceFile[], dependencies: readonly string[]): Problem[] {
  const problems: Problem[] = []
  for (const file of files.filter((f) => /^(lib|recipes)\/.*\.ts$/.test(f.path))) {
    for (const { specifier, line } of importsOf(file)) {
      if (/^(\.|node:|viaduct(\/|$))/.test(specifier)) continue
      const name = specifier
        .split('/')
        .slice(0, specifier.startsWith('@') ? 2 : 1)
        .join('/')
      if (!dependencies.includes(name)) {
        problems.push({
          path: file.path,
          line,
          message: `imports ${name}, which package.json does not list in dependencies`,
        })
      }
    }
  }
  return problems
}

/** The layers that the table of docs/architecture.md names, in its order. */
export function documentedLayers(markdown: string): string[] {
  return [...markdown.matchAll(/^\| `lib\/(\w+)` \|/gm)].map((match) => match[1] as string)
}
