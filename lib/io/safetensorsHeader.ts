// The header of a safetensors file: 8 bytes of length (little endian), JSON, then the tensors' bytes without gaps. Parsing trusts
// nothing; each fault has a code and names file, tensor and byte offset. Encoding gives the same layout. No file is opened here.
import { type DType, dtypeFromSafetensors, dtypes, safetensorsDtypes } from '../base/dtype.js'
import { type ErrorCode, ViaductError } from '../base/errors.js'
import { decodeUtf8, JsonReader } from './jsonReader.js'

/** Longest header, in bytes, as in the safetensors package. */
export const maxHeaderBytes = 100_000_000

/** One tensor of a file. `begin` and `end` count bytes from the first byte after the header. */
export interface TensorEntry {
  readonly name: string
  readonly dtype: DType
  readonly shape: readonly number[]
  readonly begin: number
  readonly end: number
}

export interface SafetensorsHeader {
  /** In the order of the bytes. */
  readonly entries: ReadonlyMap<string, TensorEntry>
  readonly metadata: ReadonlyMap<string, string> | null
  /** Length field, JSON and padding: everything before the first tensor. */
  readonly bytes: Uint8Array
  /** Bytes of the whole file. */
  readonly fileBytes: number
}

function refuse(code: ErrorCode, file: string, message: string, details: Record<string, unknown> = {}): never {
  throw new ViaductError(code, 'safetensors', `${message} (${file})`, { file, ...details })
}

/**
 * Length of the JSON, from the first 8 bytes of a file.
 * @throws ERR_SAFETENSORS_HEADER when it is more than the file or than 100 MB; nothing was allocated by then.
 */
export function headerLength(first: Uint8Array, fileBytes: number, file: string): number {
  if (fileBytes < 8 || first.length < 8) {
    refuse(
      'ERR_SAFETENSORS_HEADER',
      file,
      `expected at least 8 bytes of header length, got a file of ${fileBytes} bytes`,
      { byteOffset: 0 },
    )
  }
  const length = new DataView(first.buffer, first.byteOffset, 8).getBigUint64(0, true)
  if (length > BigInt(fileBytes - 8)) {
    refuse(
      'ERR_SAFETENSORS_HEADER',
      file,
      `expected a header inside of the file of ${fileBytes} bytes, got a header length of ${length}`,
      { byteOffset: 0 },
    )
  }
  if (length > BigInt(maxHeaderBytes)) {
    refuse(
      'ERR_SAFETENSORS_HEADER',
      file,
      `expected a header of at most ${maxHeaderBytes} bytes, got ${length}: too large`,
      { byteOffset: 0 },
    )
  }
  return Number(length)
}

/**
 * Parses and proves a header: each tensor's bytes equal its shape times its dtype, and all of them tile the rest of the file.
 * @param bytes - everything before the tensors: length field and JSON.
 * @throws ERR_SAFETENSORS_HEADER, ERR_SAFETENSORS_DTYPE, ERR_SAFETENSORS_LAYOUT, ERR_SAFETENSORS_SIZE
 */
export function parseHeader(bytes: Uint8Array, fileBytes: number, file: string): SafetensorsHeader {
  const source = { code: 'ERR_SAFETENSORS_HEADER', where: 'safetensors', file, offset: 8 } as const
  const text = decodeUtf8(bytes.subarray(8), source)
  const reader = new JsonReader(text, source)
  if (!text.startsWith('{')) reader.fail(`expected the header to begin with "{", got ${reader.found()}`)
  const entries: TensorEntry[] = []
  let metadata: Map<string, string> | null = null
  reader.object((name, at) => {
    if (name === '__metadata__') metadata = readMetadata(reader)
    else entries.push(readEntry(reader, name, at))
  })
  reader.end()
  return { entries: tiled(entries, fileBytes - bytes.length, fileBytes, file), metadata, bytes, fileBytes }
}

function readMetadata(reader: JsonReader): Map<string, string> {
  const metadata = new Map<string, string>()
  if (reader.peek() !== 'object') reader.fail(`expected __metadata__ to be an object of strings, got ${reader.found()}`)
  reader.object((key) => {
    if (reader.peek() !== 'string')
      reader.fail(`expected __metadata__[${JSON.stringify(key)}] to be a string, got ${reader.found()}`)
    metadata.set(key, reader.string())
  })
  return metadata
}

/** A whole number from 0 to 2^53 - 1, exactly. */
function readCount(reader: JsonReader, tensor: string, what: string): number {
  const plain = reader.digits()
  if (plain >= 0) return plain
  const kind = reader.peek()
  const at = reader.position
  const spelled = kind === 'number' ? reader.number() : ''
  const value = Number(spelled)
  if (kind !== 'number' || !/^(0|[1-9][0-9]*)$/.test(spelled)) {
    reader.fail(
      `expected ${what} of tensor ${JSON.stringify(tensor)} to be whole and not negative, got ${reader.found(at)}`,
      at,
      { tensor },
    )
  }
  if (!Number.isSafeInteger(value)) {
    reader.fail(`expected ${what} of tensor ${JSON.stringify(tensor)} to be below 2^53, got ${spelled}`, at, { tensor })
  }
  return value
}

function readEntry(reader: JsonReader, name: string, nameAt: number): TensorEntry {
  const { file } = reader.source
  const quoted = name.length < 200 ? JSON.stringify(name) : shortName(name)
  let dtype: DType | undefined
  let shape: number[] | undefined
  let offsets: number[] | undefined
  if (reader.peek() !== 'object')
    reader.fail(`expected tensor ${quoted} to be an object, got ${reader.found()}`, reader.position, { tensor: name })
  reader.object((field, at) => {
    if (field === 'dtype') {
      if (reader.peek() !== 'string')
        reader.fail(`expected the dtype of tensor ${quoted} to be a string, got ${reader.found()}`, at, {
          tensor: name,
        })
      const spelled = reader.string()
      dtype = dtypeFromSafetensors(spelled)
      if (dtype === undefined) {
        refuse(
          'ERR_SAFETENSORS_DTYPE',
          file,
          `expected the dtype of tensor ${quoted} to be one of ${safetensorsDtypes.join(', ')}, got ${JSON.stringify(spelled)}`,
          { tensor: name },
        )
      }
    } else if (field === 'shape' || field === 'data_offsets') {
      if (reader.peek() !== 'array')
        reader.fail(`expected ${field} of tensor ${quoted} to be a list, got ${reader.found()}`, at, { tensor: name })
      const list: number[] = []
      reader.array(() => list.push(readCount(reader, name, field)))
      if (field === 'shape') shape = list
      else offsets = list
    } else {
      reader.fail(`expected dtype, shape and data_offsets for tensor ${quoted}, got ${JSON.stringify(field)}`, at, {
        tensor: name,
      })
    }
  })
  if (dtype === undefined || shape === undefined || offsets === undefined || offsets.length !== 2) {
    reader.fail(`expected dtype, shape and two data_offsets for tensor ${quoted}`, nameAt, { tensor: name })
  }
  const [begin, end] = offsets as [number, number]
  if (end < begin)
    reader.fail(`expected data_offsets of tensor ${quoted} in order, got [${begin}, ${end}]`, nameAt, { tensor: name })
  const bits = bitsOf(dtype, shape)
  if (typeof bits === 'bigint' || bits % 8 !== 0) {
    const odd = BigInt(bits) % 8n !== 0n
    if (odd)
      refuse(
        'ERR_SAFETENSORS_DTYPE',
        file,
        `expected whole bytes for tensor ${quoted}, got ${bits} bits of ${dtypes[dtype].safetensors} [${shape}]: misaligned`,
        { tensor: name },
      )
  }
  if (typeof bits === 'bigint' || bits / 8 !== end - begin) {
    refuse(
      'ERR_SAFETENSORS_LAYOUT',
      file,
      `expected ${BigInt(bits) / 8n} bytes for tensor ${quoted} of ${dtypes[dtype].safetensors} [${shape}], got data_offsets [${begin}, ${end}]: ${end - begin} bytes`,
      { tensor: name, byteOffset: begin },
    )
  }
  return { name, dtype, shape, begin, end }
}

/** Bits of a tensor, exactly: a bigint beyond 2^53, which no file holds. */
function bitsOf(dtype: DType, shape: readonly number[]): number | bigint {
  const bits = shape.reduce<number>((n, dim) => n * dim, dtypes[dtype].bits)
  return Number.isSafeInteger(bits) ? bits : shape.reduce((n, dim) => n * BigInt(dim), BigInt(dtypes[dtype].bits))
}

function tiled(entries: TensorEntry[], dataBytes: number, fileBytes: number, file: string): Map<string, TensorEntry> {
  entries.sort((a, b) => a.begin - b.begin || a.end - b.end)
  let position = 0
  let previous: TensorEntry | null = null
  for (const entry of entries) {
    if (entry.begin !== position) refuseGap(entry, position, previous, file)
    position = entry.end
    previous = entry
  }
  if (position !== dataBytes) {
    const expected = fileBytes - dataBytes + position
    const what = dataBytes < position ? 'the file is cut' : 'bytes follow the last tensor'
    const named = previous ? `, last tensor ${shortName(previous.name)}` : ''
    refuse('ERR_SAFETENSORS_SIZE', file, `expected ${expected} bytes, got ${fileBytes}: ${what}${named}`, {
      expected,
      actual: fileBytes,
      tensor: previous?.name ?? null,
      byteOffset: Math.min(expected, fileBytes),
    })
  }
  return new Map(entries.map((entry) => [entry.name, entry]))
}

/** A tensor that begins where the one before it does not end: they overlap, or a hole lies between them. */
function refuseGap(entry: TensorEntry, position: number, previous: TensorEntry | null, file: string): never {
  const quoted = shortName(entry.name)
  const details = { tensor: entry.name, other: previous?.name ?? null, byteOffset: Math.min(entry.begin, position) }
  if (entry.begin < position) {
    refuse(
      'ERR_SAFETENSORS_LAYOUT',
      file,
      `expected tensors apart, got ${quoted} at [${entry.begin}, ${entry.end}] overlapping ${shortName(previous?.name ?? '')} which ends at ${position}`,
      details,
    )
  }
  refuse(
    'ERR_SAFETENSORS_LAYOUT',
    file,
    `expected tensor ${quoted} to begin at ${position}, got ${entry.begin}: a hole of ${entry.begin - position} bytes`,
    details,
  )
}

/** A name for messages: quoted, cut when it is long. */
function shortName(name: string): string {
  return JSON.stringify(name.length > 200 ? `${name.slice(0, 200)}… (${name.length} characters)` : name)
}

/** What a new file is to hold. */
export interface TensorPlan {
  readonly name: string
  readonly dtype: DType
  readonly shape: readonly number[]
}

/** Bytes of a tensor. @throws ERR_DTYPE when they are not whole. */
export function tensorBytes(dtype: DType, shape: readonly number[]): number {
  const bits = dtypes[dtype].bits * shape.reduce((n, dim) => n * dim, 1)
  if (bits % 8 !== 0)
    throw new ViaductError('ERR_DTYPE', 'safetensors', `expected whole bytes, got ${bits} bits of ${dtype} [${shape}]`)
  return bits / 8
}

/**
 * The header of a new file. Tensors lie in the given order, wider dtypes first, so that each is aligned to its own dtype.
 * The JSON is padded with spaces to 8 bytes, as the safetensors package does.
 */
export function encodeHeader(
  plans: readonly TensorPlan[],
  metadata: ReadonlyMap<string, string> | null = null,
): SafetensorsHeader {
  const ordered = [...plans].sort((a, b) => dtypes[b.dtype].bits - dtypes[a.dtype].bits)
  return encodeInOrder(ordered, metadata)
}

/** As encodeHeader, with the bytes in exactly the given order: a source's order is kept. */
export function encodeInOrder(
  plans: readonly TensorPlan[],
  metadata: ReadonlyMap<string, string> | null,
): SafetensorsHeader {
  const parts: string[] = []
  if (metadata !== null) parts.push(`"__metadata__":${JSON.stringify(Object.fromEntries(metadata))}`)
  const entries = new Map<string, TensorEntry>()
  let position = 0
  for (const { name, dtype, shape } of plans) {
    if (name === '__metadata__' || entries.has(name)) {
      throw new ViaductError(
        'ERR_ASSERT',
        'safetensors',
        `a file cannot hold the tensor ${shortName(name)} ${entries.has(name) ? 'twice' : 'by this name'}`,
      )
    }
    const end = position + tensorBytes(dtype, shape)
    entries.set(name, { name, dtype, shape: [...shape], begin: position, end })
    parts.push(
      `${JSON.stringify(name)}:{"dtype":"${dtypes[dtype].safetensors}","shape":[${shape}],"data_offsets":[${position},${end}]}`,
    )
    position = end
  }
  let json = Buffer.from(`{${parts.join(',')}}`)
  if (json.length % 8 !== 0) json = Buffer.concat([json, Buffer.alloc(8 - (json.length % 8), ' ')])
  if (json.length > maxHeaderBytes)
    throw new ViaductError(
      'ERR_UNSUPPORTED',
      'safetensors',
      `expected a header of at most ${maxHeaderBytes} bytes, got ${json.length}: use more files`,
    )
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(json.length))
  const bytes = Buffer.concat([length, json])
  return { entries, metadata, bytes, fileBytes: bytes.length + position }
}
