// Assembles pickles opcode by opcode and zip archives of stored entries, as bytes, so that tests hold what a hostile file holds
// without a program that would make it. Nothing here reads or runs a pickle.
import { crc32 } from 'node:zlib'

const u32 = (n: number) => {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32LE(n)
  return bytes
}
const u16 = (n: number) => {
  const bytes = Buffer.alloc(2)
  bytes.writeUInt16LE(n)
  return bytes
}

/** Opcodes as bytes; joined by `pickle`. */
export const op = {
  proto: (version = 2) => Buffer.from([0x80, version]),
  global: (module: string, name: string) => Buffer.from(`c${module}\n${name}\n`),
  inst: (module: string, name: string) => Buffer.from(`i${module}\n${name}\n`),
  text: (value: string) => Buffer.concat([Buffer.from('X'), u32(Buffer.byteLength(value)), Buffer.from(value)]),
  shortText: (value: string) => Buffer.concat([Buffer.from([0x8c, Buffer.byteLength(value)]), Buffer.from(value)]),
  byte: (value: number) => Buffer.from([0x4b, value]),
  int: (value: number) => Buffer.concat([Buffer.from('J'), u32(value >>> 0)]),
  put: (index: number) => Buffer.from([0x71, index]),
  get: (index: number) => Buffer.from([0x68, index]),
  stackGlobal: Buffer.from([0x93]),
  memoize: Buffer.from([0x94]),
  mark: Buffer.from('('),
  tuple: Buffer.from('t'),
  tuple1: Buffer.from([0x85]),
  tuple2: Buffer.from([0x86]),
  emptyTuple: Buffer.from(')'),
  emptyDict: Buffer.from('}'),
  emptyList: Buffer.from(']'),
  reduce: Buffer.from('R'),
  build: Buffer.from('b'),
  obj: Buffer.from('o'),
  newObj: Buffer.from([0x81]),
  newObjEx: Buffer.from([0x92]),
  ext1: (code: number) => Buffer.from([0x82, code]),
  persistent: Buffer.from('Q'),
  persistentLine: (id: string) => Buffer.from(`P${id}\n`),
  setItem: Buffer.from('s'),
  setItems: Buffer.from('u'),
  append: Buffer.from('a'),
  none: Buffer.from('N'),
  false: Buffer.from([0x89]),
  stop: Buffer.from('.'),
}

/** Opcodes between PROTO 2 and STOP. */
export const pickle = (...opcodes: readonly Uint8Array[]) => Buffer.concat([op.proto(), ...opcodes, op.stop])

/** A tensor of float32 as torch.save describes it. */
export function tensorOpcodes(o: {
  readonly key: string
  readonly count: number
  readonly shape: readonly number[]
  readonly strides?: readonly number[]
  readonly offset?: number
  readonly type?: string
}): Buffer {
  const strides = o.strides ?? o.shape.map((_, i) => o.shape.slice(i + 1).reduce((n, d) => n * d, 1))
  const numbers = (list: readonly number[]) => [op.mark, ...list.map(op.int), op.tuple]
  return Buffer.concat([
    op.global('torch._utils', '_rebuild_tensor_v2'),
    op.mark,
    op.mark,
    op.text('storage'),
    op.global('torch', o.type ?? 'FloatStorage'),
    op.text(o.key),
    op.text('cpu'),
    op.int(o.count),
    op.tuple,
    op.persistent,
    op.int(o.offset ?? 0),
    ...numbers(o.shape),
    ...numbers(strides),
    op.false,
    op.global('collections', 'OrderedDict'),
    op.emptyTuple,
    op.reduce,
    op.tuple,
    op.reduce,
  ])
}

export interface ZipPart {
  readonly name: string
  readonly data: Uint8Array
  /** Instead of what is true. */
  readonly method?: number
  readonly flags?: number
  readonly bytes?: number
  readonly packed?: number
  readonly local?: number
  readonly localName?: string
}

/** An archive of stored entries, as Python's zipfile writes it. */
export function zip(parts: readonly ZipPart[], end: { readonly count?: number; readonly start?: number } = {}): Buffer {
  const files: Buffer[] = []
  const directory: Buffer[] = []
  let at = 0
  for (const part of parts) {
    const { name, data, method = 0, flags = 0 } = part
    const bytes = part.bytes ?? data.length
    const facts = [u16(flags), u16(method), u32(0), u32(crc32(data)), u32(part.packed ?? bytes), u32(bytes)]
    const localName = part.localName ?? name
    const head = Buffer.concat([
      u32(0x04034b50),
      u16(20),
      ...facts,
      u16(Buffer.byteLength(localName)),
      u16(0),
      Buffer.from(localName),
    ])
    files.push(head, Buffer.from(data))
    directory.push(
      Buffer.concat([
        u32(0x02014b50),
        u16(20),
        u16(20),
        ...facts,
        u16(Buffer.byteLength(name)),
        ...[0, 0, 0, 0].map(u16),
        u32(0),
        u32(part.local ?? at),
        Buffer.from(name),
      ]),
    )
    at += head.length + data.length
  }
  const listed = Buffer.concat(directory)
  const count = end.count ?? parts.length
  const tail = [
    u32(0x06054b50),
    u16(0),
    u16(0),
    u16(count),
    u16(count),
    u32(listed.length),
    u32(end.start ?? at),
    u16(0),
  ]
  return Buffer.concat([...files, listed, ...tail])
}

/** A file of torch.save around a pickle, with storages by key. */
export function torchZip(data: Uint8Array, storages: Readonly<Record<string, Uint8Array>> = {}): Buffer {
  return zip([
    { name: 'archive/data.pkl', data },
    { name: 'archive/byteorder', data: Buffer.from('little') },
    ...Object.entries(storages).map(([key, bytes]) => ({ name: `archive/data/${key}`, data: bytes })),
    { name: 'archive/version', data: Buffer.from('3\n') },
  ])
}
