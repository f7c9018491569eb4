// A strict JSON reader that pulls value by value: positions are kept, numbers stay text, duplicate keys are refused. It does
// not build trees; jsonDocument.ts and safetensorsHeader.ts do. Positions are indices into the decoded text.
import type { ErrorCode } from '../base/errors.js'
import { ViaductError } from '../base/errors.js'

/** What a text is and which error to throw when it is broken. */
export interface JsonSource {
  readonly code: ErrorCode
  readonly where: string
  /** File name for messages. */
  readonly file: string
  /** Bytes of the file before the text: added to positions in messages. */
  readonly offset?: number
  /** Admits NaN, Infinity and -Infinity, as Python's json module writes them. */
  readonly nonFinite?: boolean
}

const whitespace = /[ \t\n\r]*/y
const number = /-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y
/** Characters that may not follow a number: digits, dot, e, E, plus. */
const runsOn = new Set([...'0123456789.eE+'].map((c) => c.charCodeAt(0)))
const literal = /true|false|null/y
const nonFinite = /NaN|-?Infinity/y
const escapes: Readonly<Record<string, string>> = {
  '"': '"',
  '\\': '\\',
  '/': '/',
  b: '\b',
  f: '\f',
  n: '\n',
  r: '\r',
  t: '\t',
}
const special = /[\\\u0000-\u001f]/
const deepest = 128

/** Decodes UTF-8, refusing what is not. @throws the source's code with the byte offset of the first bad byte. */
export function decodeUtf8(bytes: Uint8Array, source: JsonSource): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch {
    let low = 0
    let high = bytes.length
    // The longest prefix that decodes: streaming mode lets a cut character pass.
    while (low < high) {
      const middle = Math.ceil((low + high) / 2)
      try {
        new TextDecoder('utf-8', { fatal: true }).decode(bytes.subarray(0, middle), { stream: true })
        low = middle
      } catch {
        high = middle - 1
      }
    }
    const at = (source.offset ?? 0) + low
    throw new ViaductError(
      source.code,
      source.where,
      `expected UTF-8, got byte 0x${(bytes[low] ?? 0).toString(16)} at byte ${at} of ${source.file}`,
      {
        file: source.file,
        byteOffset: at,
      },
    )
  }
}

/** The keys of one object. Most objects have few: a list is enough for them. */
class Keys {
  readonly #few: string[] = []
  #many: Set<string> | null = null

  /** False when the key is there already. */
  add(key: string): boolean {
    if (this.#many !== null) return this.#many.size !== this.#many.add(key).size
    if (this.#few.includes(key)) return false
    if (this.#few.push(key) > 8) this.#many = new Set(this.#few)
    return true
  }
}

/** Reads one JSON text from the left to the right. */
export class JsonReader {
  position = 0
  #depth = 0

  constructor(
    readonly text: string,
    readonly source: JsonSource,
  ) {}

  /** Throws the source's error at a position. */
  fail(message: string, at = this.position, details: Record<string, unknown> = {}): never {
    const { code, where, file, offset = 0 } = this.source
    const byteOffset = offset + Buffer.byteLength(this.text.slice(0, at))
    const line = this.text.slice(0, at).split('\n').length
    throw new ViaductError(
      code,
      where,
      `${message} at byte ${byteOffset}${line > 1 ? ` (line ${line})` : ''} of ${file}`,
      {
        file,
        byteOffset,
        line,
        ...details,
      },
    )
  }

  /** What stands at the current position, in words. */
  found(at = this.position): string {
    const rest = this.text.slice(at, at + 12)
    return rest === '' ? 'the end of the text' : JSON.stringify(rest)
  }

  skipSpace(): void {
    const code = this.text.charCodeAt(this.position)
    if (code > 32) return
    whitespace.lastIndex = this.position
    whitespace.test(this.text)
    this.position = whitespace.lastIndex
  }

  /** The kind of the value that comes next. */
  peek(): 'object' | 'array' | 'string' | 'number' | 'literal' {
    this.skipSpace()
    const c = this.text.charCodeAt(this.position)
    if (c === 0x7b) return 'object'
    if (c === 0x5b) return 'array'
    if (c === 0x22) return 'string'
    if (c >= 0x30 && c <= 0x39) return 'number'
    if (c === 0x2d) return this.source.nonFinite && this.text.startsWith('-I', this.position) ? 'literal' : 'number'
    if (c >= 0x41) return 'literal'
    return this.fail(`expected a JSON value, got ${this.found()}`)
  }

  #expect(char: string): void {
    this.skipSpace()
    if (this.text.charCodeAt(this.position) !== char.charCodeAt(0))
      this.fail(`expected ${JSON.stringify(char)}, got ${this.found()}`)
    this.position++
  }

  /** Calls `member` for each member of an object; it must read the value. `keyStart` is the position of the key's quote. */
  object(member: (key: string, keyStart: number) => void): void {
    this.#expect('{')
    if (++this.#depth > deepest) this.fail(`expected at most ${deepest} nested values`)
    const seen = new Keys()
    this.skipSpace()
    if (this.text[this.position] === '}') {
      this.position++
    } else {
      for (;;) {
        this.skipSpace()
        const keyStart = this.position
        const key = this.string()
        if (!seen.add(key)) this.fail(`expected each key once, got ${JSON.stringify(key)} again`, keyStart, { key })
        this.#expect(':')
        member(key, keyStart)
        this.skipSpace()
        if (this.text[this.position] === '}') break
        this.#expect(',')
      }
      this.position++
    }
    this.#depth--
  }

  /** Calls `element` for each element of an array; it must read the value. */
  array(element: (index: number) => void): void {
    this.#expect('[')
    if (++this.#depth > deepest) this.fail(`expected at most ${deepest} nested values`)
    this.skipSpace()
    if (this.text[this.position] === ']') {
      this.position++
    } else {
      for (let index = 0; ; index++) {
        element(index)
        this.skipSpace()
        if (this.text[this.position] === ']') break
        this.#expect(',')
      }
      this.position++
    }
    this.#depth--
  }

  string(): string {
    this.skipSpace()
    if (this.text[this.position] !== '"') this.fail(`expected a string, got ${this.found()}`)
    const start = this.position
    const end = this.text.indexOf('"', start + 1)
    if (end < 0) this.fail('expected the end of a string, got the end of the text', this.text.length)
    const simple = this.text.slice(start + 1, end)
    if (!special.test(simple)) {
      this.position = end + 1
      return simple
    }
    return this.#escapedString(start)
  }

  #escapedString(start: number): string {
    const parts: string[] = []
    let at = start + 1
    let from = at
    for (;;) {
      const c = this.text.charCodeAt(at)
      if (Number.isNaN(c)) this.fail('expected the end of a string, got the end of the text', at)
      if (c < 0x20) this.fail('expected control characters in strings to be escaped', at)
      if (c === 0x22) break
      if (c !== 0x5c) {
        at++
        continue
      }
      parts.push(this.text.slice(from, at))
      const kind = this.text[at + 1] ?? ''
      if (kind === 'u') {
        const hex = this.text.slice(at + 2, at + 6)
        if (!/^[0-9a-fA-F]{4}$/.test(hex)) this.fail('expected four hexadecimal digits after \\u', at)
        parts.push(String.fromCharCode(Number.parseInt(hex, 16)))
        at += 6
      } else {
        const plain = escapes[kind]
        if (plain === undefined) this.fail(`expected an escape of JSON, got ${JSON.stringify(`\\${kind}`)}`, at)
        parts.push(plain)
        at += 2
      }
      from = at
    }
    parts.push(this.text.slice(from, at))
    this.position = at + 1
    const value = parts.join('')
    if (/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/.test(value)) {
      this.fail('expected whole characters, got half of a surrogate pair', start)
    }
    return value
  }

  /** A number as it is spelled. */
  number(): string {
    this.skipSpace()
    number.lastIndex = this.position
    const match = number.exec(this.text)
    if (match === null || runsOn.has(this.text.charCodeAt(number.lastIndex)))
      this.fail(`expected a number, got ${this.found()}`)
    this.position = number.lastIndex
    return match[0]
  }

  /** A whole number spelled with 1 to 15 digits, or -1 without moving when something else stands here. */
  digits(): number {
    this.skipSpace()
    const start = this.position
    let at = start
    let value = 0
    for (let c = this.text.charCodeAt(at); c >= 0x30 && c <= 0x39; c = this.text.charCodeAt(++at))
      value = value * 10 + (c - 0x30)
    const count = at - start
    const leadingZero = count > 1 && this.text.charCodeAt(start) === 0x30
    if (count === 0 || count > 15 || leadingZero || runsOn.has(this.text.charCodeAt(at))) return -1
    this.position = at
    return value
  }

  /** true, false, null, and where the source admits them NaN, Infinity, -Infinity, as they are spelled. */
  literal(): string {
    this.skipSpace()
    for (const pattern of this.source.nonFinite ? [literal, nonFinite] : [literal]) {
      pattern.lastIndex = this.position
      const match = pattern.exec(this.text)
      if (match === null) continue
      this.position = pattern.lastIndex
      return match[0]
    }
    return this.fail(`expected a JSON value, got ${this.found()}`)
  }

  /** Reads past one value. */
  skip(): void {
    const kind = this.peek()
    if (kind === 'object') this.object(() => this.skip())
    else if (kind === 'array') this.array(() => this.skip())
    else if (kind === 'string') this.string()
    else if (kind === 'number') this.number()
    else this.literal()
  }

  /** Only white space may follow. */
  end(): void {
    this.skipSpace()
    if (this.position < this.text.length) this.fail(`expected the end of the text, got ${this.found()}`)
  }
}
