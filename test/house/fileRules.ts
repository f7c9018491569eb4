// What holds for each file by itself: size, place, name, opening comment, words, environment variables.
import type { Problem, SourceFile } from './sources.js'

const code = /\.(ts|mjs|cc|h|cu|cuh|py|sh)$|^\.ci\/run$/

/** No source file is longer than 500 lines. */
export function sizeProblems(files: readonly SourceFile[], limit = 500): Problem[] {
  return files
    .filter((file) => code.test(file.path))
    .map((file) => ({ path: file.path, lines: file.text.split('\n').length - (file.text.endsWith('\n') ? 1 : 0) }))
    .filter(({ lines }) => lines > limit)
    .map(({ path, lines }) => ({
      path,
      message: `has ${lines} lines, ${limit} are allowed: cut it where two subjects meet`,
    }))
}

/** No folder is called after nothing in particular. */
export function folderProblems(files: readonly SourceFile[]): Problem[] {
  const forbidden = ['utils', 'util', 'common', 'helpers', 'misc']
  return files.flatMap((file) => {
    const folder = file.path
      .split('/')
      .slice(0, -1)
      .find((name) => forbidden.includes(name.toLowerCase()))
    return folder
      ? [{ path: file.path, message: `lies in a folder called ${folder}: name it after what it holds` }]
      : []
  })
}

/** camelCase.ts and snake_case.cc. */
export function nameProblems(files: readonly SourceFile[]): Problem[] {
  return files.flatMap((file) => {
    const name = file.path.split('/').at(-1) as string
    if (
      /^(lib|recipes|examples|test)\/.*\.ts$/.test(file.path) &&
      !/^[a-z][A-Za-z0-9]*(\.test|\.config)?\.ts$/.test(name)
    ) {
      return [{ path: file.path, message: 'is TypeScript: its name is camelCase.ts' }]
    }
    if (/^native\/.*\.(cc|h|cu|cuh)$/.test(file.path) && !/^[a-z][a-z0-9_]*\.(cc|h|cu|cuh)$/.test(name)) {
      return [{ path: file.path, message: 'is C++: its name is snake_case' }]
    }
    return []
  })
}

/** Each file opens with a few comment lines: what lives here, what does not, the one convention to know. */
export function openingProblems(files: readonly SourceFile[]): Problem[] {
  return files
    .filter((file) => code.test(file.path))
    .flatMap((file) => {
      const lines = file.text.split('\n')
      if (lines[0]?.startsWith('#!')) lines.shift()
      if (file.path.endsWith('.py') && /^"""\S/.test(lines[0] ?? '')) return []
      const marker = /\.(py|sh)$|^\.ci\/run$/.test(file.path) ? '#' : '//'
      let count = 0
      // A bare marker ends the opening: a longer guide may follow it.
      while (lines[count]?.startsWith(marker) && lines[count] !== marker) count++
      if (count === 0)
        return [{ path: file.path, line: 1, message: `opens without a comment (${marker} what lives here)` }]
      if (count > 6) return [{ path: file.path, line: 1, message: `opens with ${count} comment lines: 6 at most` }]
      return []
    })
}

const unfinished = /\b(TODO|FIXME|XXX)\b|\bnot (yet )?implemented\b|\bplaceholder\b/i
// Each is cut by a class of one character, so that this file does not hold what it forbids.
const foreign = /[/]wor[k]\/|[/]tmp[/]viaduc[t]|[/]roo[t]\/|DESIGN[.]md|\bthe brie[f]\b|\bissue #?\d+/i

/** No unfinished work in shipped code; no path or paper of the machine on which something was written, anywhere. */
export function wordProblems(files: readonly SourceFile[]): Problem[] {
  const problems: Problem[] = []
  for (const file of files) {
    if (file.path.startsWith('test/fixtures/')) continue
    const shipped = /^(lib|native|recipes)\//.test(file.path)
    file.text.split('\n').forEach((line, index) => {
      const word = (shipped ? unfinished.exec(line) : null) ?? foreign.exec(line)
      if (word) problems.push({ path: file.path, line: index + 1, message: `holds "${word[0]}"` })
    })
  }
  return problems
}

/** Environment variables are read in lib/base/env.ts only: one row each. */
export function environmentProblems(files: readonly SourceFile[]): Problem[] {
  const problems: Problem[] = []
  for (const file of files) {
    if (!/^(lib|recipes|native)\//.test(file.path) || file.path === 'lib/base/env.ts') continue
    file.text.split('\n').forEach((line, index) => {
      if (
        /\bprocess\s*\.\s*env\b|\bprocess\s*\[\s*['"]env|\bimport\s*\{[^}]*\benv\b[^}]*\}\s*from\s*'node:process'|\b(secure_)?getenv\s*\(/.test(
          line,
        )
      ) {
        problems.push({
          path: file.path,
          line: index + 1,
          message: 'reads the environment: add a row to lib/base/env.ts and pass the value',
        })
      }
    })
  }
  return problems
}

/** Files of kernels that the emulation does not run, each with a twin; docs/cuda.md lists them. */
const notEmulated: readonly string[] = []

/** Kernels start through Launch and use nothing that the emulation cannot run. */
export function kernelProblems(files: readonly SourceFile[]): Problem[] {
  const forbidden = /<<<|\basm\b|#include\s*<(?:cub|cooperative_groups|mma|cuda\/)/
  return files
    .filter((file) => /^native\/cuda\/.*\.(cu|cuh)$/.test(file.path) && !notEmulated.includes(file.path))
    .flatMap((file) =>
      file.text.split('\n').flatMap((line, index) => {
        const found = forbidden.exec(line.replace(/\/\/.*/, ''))
        const message = `holds ${found?.[0]}, which the tests cannot run: start kernels through Launch, see docs/cuda.md`
        return found ? [{ path: file.path, line: index + 1, message }] : []
      }),
    )
}

/** `require('viaduct')` works only while no module of the package awaits at its top level. */
export function awaitProblems(files: readonly SourceFile[]): Problem[] {
  const atTop = /^(?:(?:export\s+)?(?:const|let|var)\s[^=]*=\s*)?await\b|^for\s+await\b/
  return files
    .filter((file) => /^(lib|recipes)\/.*\.ts$/.test(file.path))
    .flatMap((file) =>
      file.text.split('\n').flatMap((line, index) => {
        const message = 'awaits at the top level, so that require() of the package fails: await in a function'
        return atTop.test(line) ? [{ path: file.path, line: index + 1, message }] : []
      }),
    )
}

/** Codes in native/tensor.h's `enum class DType`: { F32: 0, ... }. */
export function nativeDtypes(header: string): Record<string, number> {
  const body = /enum class DType[^{]*\{([^}]*)\}/.exec(header)?.[1] ?? ''
  return Object.fromEntries(
    [...body.matchAll(/(\w+)\s*=\s*(\d+)/g)].map((match) => [match[1] as string, Number(match[2])]),
  )
}
