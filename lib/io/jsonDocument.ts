// A JSON text that keeps its bytes: untouched it comes back as it was, edited only the changed members differ. Order, white
// space, number spelling (`1e-05`, 20 digits), NaN and Infinity survive. Values are seen as plain objects without prototype.
import { readFile } from 'node:fs/promises'
import type { ErrorCode } from '../base/errors.js'
import { ViaductError } from '../base/errors.js'
import { decodeUtf8, JsonReader } from './jsonReader.js'

/** A plain JSON value; numbers are doubles. Objects have no prototype, so that no key is special. */
export type JsonValue = null | boolean | number | string | readonly JsonValue[] | { readonly [key: string]: JsonValue }

interface Member {
  readonly key: string
  readonly keyStart: number
  readonly value: Node
}
type Node = { readonly start: number; readonly end: number } & (
  | { readonly kind: 'object'; readonly members: readonly Member[] }
  | { readonly kind: 'array'; readonly items: readonly Node[] }
  | { readonly kind: 'leaf'; readonly value: null | boolean | number | string }
)

/** One JSON text. Immutable: `with` gives a new document. */
export class JsonDocument {
  readonly value: JsonValue
  readonly #root: Node

  private constructor(readonly text: string) {
    const reader = new JsonReader(text, { code: 'ERR_JSON', where: 'json', file: 'text', nonFinite: true })
    this.#root = parse(reader)
    reader.end()
    this.value = plain(this.#root)
  }

  /**
   * Parses a text.
   * @param file - its name, for messages.
   * @throws `code` (ERR_JSON) naming file, byte offset and line.
   */
  static parse(text: string | Uint8Array, file: string, code: ErrorCode = 'ERR_JSON'): JsonDocument {
    const source = { code, where: 'json', file, nonFinite: true } as const
    const decoded = typeof text === 'string' ? text : decodeUtf8(text, source)
    const reader = new JsonReader(decoded, source)
    parse(reader)
    reader.end()
    return new JsonDocument(decoded)
  }

  /** Reads a file. @throws ERR_FILE_MISSING; `code` when it is not JSON. */
  static async read(path: string, code: ErrorCode = 'ERR_JSON'): Promise<JsonDocument> {
    let bytes: Uint8Array
    try {
      bytes = await readFile(path)
    } catch (cause) {
      throw new ViaductError(
        'ERR_FILE_MISSING',
        'json',
        `cannot read ${path}: ${(cause as Error).message}`,
        { file: path },
        { cause },
      )
    }
    return JsonDocument.parse(bytes, path, code)
  }

  /** A new text of a value, indented by two spaces, numbers as Python spells them. */
  static from(value: JsonValue): JsonDocument {
    return new JsonDocument(`${format(value, '')}\n`)
  }

  /** The document with another value: members that are equal keep their text, others are replaced, added at the end, removed. */
  with(value: JsonValue): JsonDocument {
    const text =
      this.text.slice(0, this.#root.start) + edit(this.text, this.#root, value, '') + this.text.slice(this.#root.end)
    return new JsonDocument(text)
  }
}

function parse(reader: JsonReader): Node {
  const kind = reader.peek()
  const start = reader.position
  if (kind === 'object') {
    const members: Member[] = []
    reader.object((key, keyStart) => members.push({ key, keyStart, value: parse(reader) }))
    return { kind, start, end: reader.position, members }
  }
  if (kind === 'array') {
    const items: Node[] = []
    reader.array(() => items.push(parse(reader)))
    return { kind, start, end: reader.position, items }
  }
  let value: null | boolean | number | string
  if (kind === 'string') value = reader.string()
  else if (kind === 'number') value = Number(reader.number())
  else {
    const word = reader.literal()
    value = word === 'null' ? null : word === 'true' ? true : word === 'false' ? false : Number(word)
  }
  return { kind: 'leaf', start, end: reader.position, value }
}

function plain(node: Node): JsonValue {
  if (node.kind === 'leaf') return node.value
  if (node.kind === 'array') return node.items.map(plain)
  const record = Object.create(null) as Record<string, JsonValue>
  for (const { key, value } of node.members) record[key] = plain(value)
  return record
}

/** Deep equality of plain values; NaN equals NaN, -0 differs from 0. */
export function jsonEqual(a: JsonValue | undefined, b: JsonValue | undefined): boolean {
  if (a === undefined || b === undefined) return a === b
  if (Array.isArray(a) || Array.isArray(b)) {
    return Array.isArray(a) && Array.isArray(b) && a.length === b.length && a.every((item, i) => jsonEqual(item, b[i]))
  }
  if (a === null || b === null || typeof a !== 'object' || typeof b !== 'object') return Object.is(a, b)
  const left = a as Record<string, JsonValue>
  const right = b as Record<string, JsonValue>
  const keys = Object.keys(left)
  return (
    keys.length === Object.keys(right).length &&
    keys.every((key) => Object.hasOwn(right, key) && jsonEqual(left[key], right[key]))
  )
}

function edit(text: string, node: Node, value: JsonValue, indent: string): string {
  const old = text.slice(node.start, node.end)
  if (jsonEqual(plain(node), value)) return old
  if (node.kind !== 'object' || value === null || typeof value !== 'object' || Array.isArray(value)) {
    const floating = node.kind === 'leaf' && typeof node.value === 'number' && /[.eE]/.test(old)
    return format(value, indent, floating)
  }
  const record = value as Record<string, JsonValue>
  const parts: string[] = []
  let lead = `\n${indent}  `
  let colon = ': '
  let from = node.start + 1
  let trail = `\n${indent}`
  const kept = new Set<string>()
  node.members.forEach((member, i) => {
    const key = keyText(text, member)
    const keyEnd = member.keyStart + key.length
    lead = text.slice(from, member.keyStart)
    colon = text.slice(keyEnd, member.value.start)
    const next = node.members[i + 1]
    const after = text.slice(member.value.end, next ? next.keyStart : node.end)
    const comma = next ? after.indexOf(',') : after.length - 1
    if (next === undefined) trail = after.slice(0, comma)
    from = member.value.end + comma + 1
    kept.add(member.key)
    if (!Object.hasOwn(record, member.key)) return
    const inner = /[^\n]*$/.exec(lead)?.[0] ?? ''
    parts.push(lead + key + colon + edit(text, member.value, record[member.key] as JsonValue, inner))
  })
  const inner = /[^\n]*$/.exec(lead)?.[0] ?? ''
  for (const key of Object.keys(record)) {
    if (!kept.has(key)) parts.push(`${lead}${JSON.stringify(key)}${colon}${format(record[key] as JsonValue, inner)}`)
  }
  return parts.length === 0 ? '{}' : `{${parts.join(',')}${trail}}`
}

/** The key as it is spelled, with its quotes. */
function keyText(text: string, member: Member): string {
  const reader = new JsonReader(text, { code: 'ERR_JSON', where: 'json', file: 'text' })
  reader.position = member.keyStart
  reader.string()
  return text.slice(member.keyStart, reader.position)
}

/** A value as Python's json module with an indent of 2 writes it. `floating`: a whole number is written as `1.0`. */
function format(value: JsonValue, indent: string, floating = false): string {
  if (typeof value === 'number') return formatNumber(value, floating)
  if (value === null || typeof value !== 'object') return JSON.stringify(value)
  const inner = `${indent}  `
  if (Array.isArray(value)) {
    if (value.length === 0) return '[]'
    return `[\n${value.map((item: JsonValue) => inner + format(item, inner)).join(',\n')}\n${indent}]`
  }
  const record = value as Record<string, JsonValue>
  const keys = Object.keys(record)
  if (keys.length === 0) return '{}'
  return `{\n${keys.map((key) => `${inner}${JSON.stringify(key)}: ${format(record[key] as JsonValue, inner)}`).join(',\n')}\n${indent}}`
}

/** As Python's repr: exponents from 1e16 and below 1e-4, two digits in the exponent at least. */
function formatNumber(value: number, floating: boolean): string {
  if (!Number.isFinite(value)) return String(value)
  if (Number.isInteger(value) && Math.abs(value) < 1e16)
    return floating || Object.is(value, -0) ? `${Object.is(value, -0) ? '-0' : value}.0` : String(value)
  const magnitude = Math.abs(value)
  if (magnitude >= 1e-4 && magnitude < 1e16) return String(value)
  const [digits, exponent] = value.toExponential().split('e') as [string, string]
  const power = Number(exponent)
  return `${digits}e${power < 0 ? '-' : '+'}${String(Math.abs(power)).padStart(2, '0')}`
}
