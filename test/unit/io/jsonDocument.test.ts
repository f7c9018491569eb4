// JSON that keeps its bytes: untouched the same text, edited only the changed members, spelling and order kept.
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { JsonDocument, type JsonValue, jsonEqual } from '../../../lib/io/jsonDocument.js'

const text = `{
  "b": 1e-05,
  "a" : 1000000.0, "big": 12345678901234567890,
  "inf": Infinity, "nan": NaN, "minus": -Infinity,
  "five": {"__float__": "Infinity"},
  "list": [1, 2.0,
    3],
  "nested": {
    "x": 1.0,
    "y": "\\u00e9\\/"
  },
  "__proto__": 3,
  "empty": {}
}\r\n`
const document = JsonDocument.parse(text, 'config.json')
const record = (d: JsonDocument) => d.value as Record<string, JsonValue>
const change = (changes: Record<string, JsonValue>) =>
  document.with(Object.assign(Object.create(null), record(document), changes))

describe('JsonDocument', () => {
  it('gives the same text when nothing changed', () => {
    expect(document.with(document.value).text).toBe(text)
    expect(record(document)['__proto__']).toBe(3)
    expect(record(document)['inf']).toBe(Number.POSITIVE_INFINITY)
  })
  it('changes one number and nothing else, in its spelling', () => {
    expect(change({ b: 2e-6 }).text).toBe(text.replace('1e-05', '2e-06'))
    expect(change({ a: 500000 }).text).toBe(text.replace('1000000.0', '500000.0'))
    expect(change({ big: 7 }).text).toBe(text.replace('12345678901234567890', '7'))
  })
  it('changes inside of nested objects', () => {
    const nested = { ...(record(document)['nested'] as Record<string, JsonValue>), x: 2 }
    expect(change({ nested }).text).toBe(text.replace('"x": 1.0', '"x": 2.0'))
  })
  it('adds at the end and removes with the comma', () => {
    const more = change({ added: 'é' })
    expect(more.text).toBe(text.replace('"empty": {}\n', '"empty": {},\n  "added": "é"\n'))
    const { empty: _, ...rest } = record(more)
    const less = more.with(Object.assign(Object.create(null), rest))
    expect(less.text).toBe(text.replace('"empty": {}', '"added": "é"'))
    expect(JsonDocument.parse(less.text, 'x').value).toEqual(Object.assign(Object.create(null), rest))
  })
  it('spells new texts as Python does', () => {
    const value = { a: 1e-5, b: 1e16, c: 0.1, d: 1e22, e: [], f: {}, g: [1, { h: null }], i: -0 }
    expect(JsonDocument.from(value).text).toBe(
      '{\n  "a": 1e-05,\n  "b": 1e+16,\n  "c": 0.1,\n  "d": 1e+22,\n  "e": [],\n  "f": {},\n  "g": [\n    1,\n    {\n      "h": null\n    }\n  ],\n  "i": -0.0\n}\n',
    )
  })
  it('any edit of any value reads back as that value', () => {
    const values = fc.jsonValue().map((v) => JSON.parse(JSON.stringify(v)) as JsonValue)
    fc.assert(
      fc.property(values, values, fc.constantFrom(undefined, 1, 2, '\t'), (from, to, indent) => {
        const edited = JsonDocument.parse(JSON.stringify(from, null, indent), 'x').with(to)
        expect(jsonEqual(edited.value, JsonDocument.parse(JSON.stringify(to), 'x').value)).toBe(true)
      }),
      { seed: 3, numRuns: 300 },
    )
  })
  it.each([
    '{"a":1,"a":2}',
    '{"a":01}',
    '{"a":+1}',
    '{a:1}',
    "{'a':1}",
    '[1,]',
    '"\\x"',
    '"\n"',
    '1 2',
    '',
    'nul',
    '\ufeff{}',
    '-',
    '1.',
    '.5',
    '1e',
  ])('refuses %j', (bad) => {
    expect(() => JsonDocument.parse(bad, 'x')).toThrow(/x/)
  })
})
