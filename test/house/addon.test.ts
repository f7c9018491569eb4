// The built addon's table against its typed rows, and bad samples that the rule must catch.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { loadAddon } from '../../lib/addon/load.js'
import { tableProblems, typedRows } from './addonRules.js'
import { root, shown } from './sources.js'

const typed = typedRows(readFileSync(join(root, 'lib/addon/functions.ts'), 'utf8'))

describe('the addon', () => {
  it('has typed rows', () => expect(typed.length).toBeGreaterThan(50))
  it('and its typed rows agree', () => expect(shown(tableProblems(loadAddon().table(), typed))).toEqual([]))
  it('has no function outside its table', () => {
    const functions = Object.entries(loadAddon()).filter(([, value]) => typeof value === 'function')
    const names = new Set(
      loadAddon()
        .table()
        .map((row) => row.name),
    )
    expect(functions.map(([name]) => name).filter((name) => !names.has(name))).toEqual([])
  })
})

describe('the rule can fail', () => {
  const rows = [
    { name: 'add', args: ['Stream', 'Out', 'In', 'In'] },
    { name: 'setErrorFactory', args: ['any'] },
  ]
  const text = (body: string) => `/** all */\nexport interface Addon {\n${body}\n}\n`
  const good =
    '  // ops (x.h)\n  add(\n    s: Stream,\n    y: Out, // the sum\n    a: In,\n    b: In,\n  ): void\n  setErrorFactory(f: unknown): void'
  it('reads rows over several lines', () => {
    expect(tableProblems(rows, typedRows(text(good)))).toEqual([])
  })
  it.each([
    ['a kind differs', good.replace('b: In', 'b: Out')],
    ['an argument is missing', good.replace('    b: In,\n', '')],
    ['a row is missing', good.replace(/ {2}setErrorFactory.*/, '')],
    ['a row is too many', `${good}\n  extra(): void`],
    ['a row is there twice', `${good}\n  setErrorFactory(f: unknown): void`],
  ])('%s', (_, body) => {
    expect(tableProblems(rows, typedRows(text(body)))).toHaveLength(1)
  })
})
