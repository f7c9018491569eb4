// The zip archives that torch.save writes: stored entries in one folder, ZIP64. Entries are only located; what a general zip
// reader would allow beyond that (compression, comments, several disks, bytes around the archive) is refused.
import { checkFileName } from '../paths.js'
import type { ByteFile } from './byteFile.js'

/** Where an entry's bytes lie in the file. */
export interface ZipEntry {
  readonly offset: number
  readonly bytes: number
  readonly crc32: number
}

interface Listed extends ZipEntry {
  readonly name: string
  /** Offset of the local header. */
  readonly local: number
}

const maxDirectoryBytes = 32 << 20
const endBytes = 22
const end64Bytes = 56
const locatorBytes = 20
const localBytes = 30
const listedBytes = 46
const full16 = 0xffff
const full32 = 0xffffffff
/** General flags: sizes follow the data, UTF-8 names. Others (encryption, patches, masked headers) are refused. */
const allowedFlags = 0x0808

/**
 * The entries of an archive, by name without the one folder that all of them lie in.
 * @throws ERR_TORCH_FILE, ERR_PATH_ESCAPE for a name that leaves the folder.
 */
export async function readZip(file: ByteFile): Promise<Map<string, ZipEntry>> {
  const { start, bytes, count, fileEnd } = await findDirectory(file)
  if (bytes > maxDirectoryBytes) file.refuse(`expected a zip directory of at most ${maxDirectoryBytes} bytes`, start)
  if (count * listedBytes > bytes) file.refuse(`expected ${count} zip entries in ${bytes} bytes`, start)
  if (start + bytes !== fileEnd) file.refuse('expected the zip directory before its end record', start)
  const listed = parseDirectory(file, await file.read(start, bytes, 'the zip directory'), start, count)
  listed.sort((a, b) => a.local - b.local)
  const entries = new Map<string, ZipEntry>()
  const folder = /^[^/]+\//.exec(listed[0]?.name ?? '')?.[0]
  let free = 0
  for (const { name, local, bytes: length, crc32 } of listed) {
    checkFileName(name, file.name)
    if (folder === undefined || !name.startsWith(folder)) file.refuse(`expected zip entries in one folder`, local)
    if (local < free) file.refuse(`expected zip entries apart, got ${quoted(name)} at ${local} before ${free}`, local)
    const offset = await dataOffset(file, name, local, length)
    free = offset + length
    if (free > start) file.refuse(`expected ${quoted(name)} to end before ${start}, got ${free}`, local)
    const inner = name.slice(folder.length)
    if (entries.has(inner)) file.refuse(`expected zip names once, got ${quoted(name)} twice`, local)
    entries.set(inner, { offset, bytes: length, crc32 })
  }
  return entries
}

/** The directory's place, from the records at the end of the file. */
async function findDirectory(
  file: ByteFile,
): Promise<{ start: number; bytes: number; count: number; fileEnd: number }> {
  const tail = Math.min(file.size, endBytes + locatorBytes)
  const records = await file.read(file.size - tail, tail, 'the end of a zip archive')
  const endAt = file.size - endBytes
  const end = records.subarray(tail - endBytes)
  if (tail < endBytes || end.readUInt32LE(0) !== 0x06054b50)
    file.refuse(`expected the end record of a zip archive in the last ${endBytes} bytes`, Math.max(endAt, 0))
  if (end.readUInt32LE(4) !== 0 || end.readUInt16LE(8) !== end.readUInt16LE(10) || end.readUInt16LE(20) !== 0)
    file.refuse('expected a zip archive on one disk without a comment', endAt)
  const plain = { count: end.readUInt16LE(10), bytes: end.readUInt32LE(12), start: end.readUInt32LE(16) }
  if (tail < endBytes + locatorBytes || records.readUInt32LE(0) !== 0x07064b50) return { ...plain, fileEnd: endAt }

  const at = endAt - locatorBytes
  const end64At = number64(file, records, 8, at)
  if (end64At + end64Bytes !== at) file.refuse('expected the ZIP64 end record before its locator', at)
  const end64 = await file.read(end64At, end64Bytes, 'the ZIP64 end record')
  if (end64.readUInt32LE(0) !== 0x06064b50 || number64(file, end64, 4, end64At) !== end64Bytes - 12)
    file.refuse('expected a ZIP64 end record', end64At)
  if (records.readUInt32LE(4) !== 0 || end64.readBigUInt64LE(16) !== 0n)
    file.refuse('expected a zip archive on one disk', end64At)
  const wide = {
    count: number64(file, end64, 32, end64At),
    bytes: number64(file, end64, 40, end64At),
    start: number64(file, end64, 48, end64At),
  }
  const agree = (narrow: number, full: number, value: number) => narrow === full || narrow === value
  if (
    number64(file, end64, 24, end64At) !== wide.count ||
    !agree(plain.count, full16, wide.count) ||
    !agree(plain.bytes, full32, wide.bytes) ||
    !agree(plain.start, full32, wide.start)
  )
    file.refuse('expected both zip end records to agree', end64At)
  return { ...wide, fileEnd: end64At }
}

function parseDirectory(file: ByteFile, directory: Buffer, start: number, count: number): Listed[] {
  const listed: Listed[] = []
  let at = 0
  for (let i = 0; i < count; i++) {
    const place = start + at
    if (at + listedBytes > directory.length || directory.readUInt32LE(at) !== 0x02014b50)
      file.refuse(`expected ${count} entries in the zip directory, got ${i}`, place)
    const nameLength = directory.readUInt16LE(at + 28)
    const extraLength = directory.readUInt16LE(at + 30)
    const next = at + listedBytes + nameLength + extraLength
    if (next > directory.length) file.refuse('expected a zip name inside of the directory', place)
    const name = directory.toString('utf8', at + listedBytes, at + listedBytes + nameLength)
    const extra = directory.subarray(at + listedBytes + nameLength, next)
    if (directory.readUInt16LE(at + 32) !== 0 || directory.readUInt16LE(at + 34) !== 0)
      file.refuse(`expected ${quoted(name)} without a comment, on one disk`, place)
    checkStored(file, name, directory.readUInt16LE(at + 8), directory.readUInt16LE(at + 10), place)
    const wide = wideValues(file, extra, place)
    const value = (offset: number) => {
      const narrow = directory.readUInt32LE(at + offset)
      return narrow === full32 ? (wide.shift() ?? narrow) : narrow
    }
    const bytes = value(24)
    if (value(20) !== bytes) file.refuse(`expected ${quoted(name)} stored, got it compressed`, place)
    listed.push({ name, bytes, local: value(42), offset: 0, crc32: directory.readUInt32LE(at + 16) })
    at = next
  }
  if (at !== directory.length) file.refuse(`expected ${count} entries in the zip directory, got more`, start + at)
  return listed
}

/** The ZIP64 field's values: in order, those that do not fit in 32 bits. */
function wideValues(file: ByteFile, extra: Buffer, place: number): number[] {
  for (let at = 0; at + 4 <= extra.length; ) {
    const length = extra.readUInt16LE(at + 2)
    if (at + 4 + length > extra.length) file.refuse('expected a zip extra field inside of its entry', place)
    if (extra.readUInt16LE(at) === 1) {
      const count = Math.floor(length / 8)
      return Array.from({ length: count }, (_, i) => number64(file, extra, at + 4 + 8 * i, place))
    }
    at += 4 + length
  }
  return []
}

/** Where an entry's bytes begin: after its local header, which must tell what the directory tells. */
async function dataOffset(file: ByteFile, name: string, local: number, bytes: number): Promise<number> {
  const spelled = Buffer.from(name)
  const head = await file.read(local, localBytes + spelled.length, `the zip header of ${quoted(name)}`)
  if (head.readUInt32LE(0) !== 0x04034b50 || head.readUInt16LE(26) !== spelled.length)
    file.refuse(`expected the zip header of ${quoted(name)}`, local)
  if (!head.subarray(localBytes).equals(spelled))
    file.refuse(`expected one name in header and directory, got ${quoted(head.toString('utf8', localBytes))}`, local)
  checkStored(file, name, head.readUInt16LE(6), head.readUInt16LE(8), local)
  const sizesFollow = (head.readUInt16LE(6) & 8) !== 0
  const [packed, size] = [head.readUInt32LE(18), head.readUInt32LE(22)]
  if (!sizesFollow && [packed, size].some((n) => n !== full32 && n !== bytes))
    file.refuse(`expected ${bytes} bytes in the zip header of ${quoted(name)}, got ${packed} and ${size}`, local)
  return local + localBytes + spelled.length + head.readUInt16LE(28)
}

function checkStored(file: ByteFile, name: string, flags: number, method: number, at: number): void {
  if ((flags & ~allowedFlags) !== 0) file.refuse(`expected ${quoted(name)} neither encrypted nor patched`, at)
  if (method !== 0) file.refuse(`expected ${quoted(name)} stored, got compression method ${method}`, at)
}

function number64(file: ByteFile, bytes: Buffer, at: number, place: number): number {
  const value = bytes.readBigUInt64LE(at)
  if (value > BigInt(Number.MAX_SAFE_INTEGER)) file.refuse(`expected a size or offset in the file, got ${value}`, place)
  return Number(value)
}

function quoted(name: string): string {
  return JSON.stringify(name.slice(0, 200))
}
