// One file of torch.save, opened without running it: the tensors of a flat state dict and where their bytes lie. Both formats:
// a zip archive (since torch 1.6) and a stream of pickles with raw storages after them. No tensor byte is read.
import { crc32 } from 'node:zlib'
import { dtypes } from '../../base/dtype.js'
import type { TensorEntry } from '../safetensorsHeader.js'
import { ByteFile } from './byteFile.js'
import { pickleLimits, readPickle } from './pickleMachine.js'
import { Dict, List, type PickleValue, type Storage, StoredTensor } from './pickleValues.js'
import { TorchObjects } from './torchNames.js'
import { readZip, type ZipEntry } from './zipArchive.js'

const magicNumber = 0x1950a86a20f9469cfc6cn
const protocolVersion = 1001
/** Newest version of the zip format that is known. */
const newestVersion = 10
/** Keys under which a training script may keep the state dict. */
const wrappers = ['state_dict', 'model']

/**
 * The tensors of a file in the order of its dict; `begin` and `end` count from the first byte of the file. Tensors that share a
 * storage may lie over each other.
 * @throws ERR_PICKLE at what is no plain state dict; ERR_TORCH_FILE where the file is damaged or a tensor is not contiguous.
 */
export function openTorchFile(path: string, name: string): Promise<ReadonlyMap<string, TensorEntry>> {
  return ByteFile.during(path, name, async (file) => {
    const head = await file.read(0, Math.min(4, file.size), 'a file of torch.save')
    const isZip = head.length === 4 && head.readUInt32LE(0) === 0x04034b50
    const { value, objects, offsets } = await (isZip ? readArchive(file) : readStream(file))
    const entries = new Map<string, TensorEntry>()
    for (const [tensor, stored] of stateTensors(file, value, objects)) {
      entries.set(tensor, locate(file, tensor, stored, offsets.get(stored.storage) as number))
    }
    return entries
  })
}

interface Contents {
  readonly value: PickleValue
  readonly objects: TorchObjects
  /** Byte offset of each storage in the file. */
  readonly offsets: ReadonlyMap<Storage, number>
}

async function readArchive(file: ByteFile): Promise<Contents> {
  const entries = await readZip(file)
  const text = async (name: string) => {
    const entry = entries.get(name)
    if (entry && entry.bytes > 16) file.refuse(`expected a word in ${name}, got ${entry.bytes} bytes`, entry.offset)
    return entry ? (await file.read(entry.offset, entry.bytes, name)).toString('latin1').trim() : null
  }
  const version = (await text('version')) ?? '3'
  if (!/^\d{1,2}$/.test(version) || Number(version) > newestVersion)
    file.refuse(`expected a version up to ${newestVersion}, got ${JSON.stringify(version)}`, 0)
  const order = (await text('byteorder')) ?? 'little'
  if (order !== 'little') file.refuse(`expected little-endian tensors, got ${JSON.stringify(order)}`, 0)

  const pickle = entries.get('data.pkl')
  if (pickle === undefined) return file.refuse('expected data.pkl in the zip archive, found none', 0)
  const bytes = await readPickleBytes(file, pickle)
  const objects = new TorchObjects()
  const { value, end } = readPickle(bytes, 0, `data.pkl in ${file.name}`, objects)
  if (end !== bytes.length) file.refuse('expected nothing after the pickle in data.pkl', pickle.offset + end)
  const offsets = new Map<Storage, number>()
  for (const [key, storage] of objects.storages) {
    const entry = entries.get(`data/${key}`)
    if (entry?.bytes !== storage.bytes)
      return file.refuse(
        `expected ${storage.bytes} bytes in data/${key.slice(0, 100)}, got ${entry?.bytes ?? 'no such entry'}`,
        entry?.offset ?? 0,
      )
    offsets.set(storage, entry.offset)
  }
  return { value, objects, offsets }
}

async function readPickleBytes(file: ByteFile, entry: ZipEntry): Promise<Buffer> {
  if (entry.bytes > pickleLimits.bytes)
    file.refuse(`expected data.pkl of at most ${pickleLimits.bytes} bytes, got ${entry.bytes}`, entry.offset)
  const bytes = await file.read(entry.offset, entry.bytes, 'data.pkl')
  if (crc32(bytes) !== entry.crc32) file.refuse('expected data.pkl with the CRC-32 of the zip directory', entry.offset)
  return bytes
}

/** Magic number, version, facts of the system, value, keys of the storages; then for each key its count and bytes. */
async function readStream(file: ByteFile): Promise<Contents> {
  const bytes = await file.read(0, Math.min(file.size, pickleLimits.bytes), 'a file of torch.save')
  const objects = new TorchObjects()
  let position = 0
  const next = () => {
    const { value, end } = readPickle(bytes, position, file.name, objects)
    position = end
    return value
  }
  if (next() !== magicNumber) file.refuse('expected a zip archive or the magic number of torch.save', 0)
  const version = next()
  if (version !== protocolVersion) file.refuse(`expected protocol version ${protocolVersion}`, position)
  const system = next()
  if (!(system instanceof Dict) || system.values[system.keys.indexOf('little_endian')] !== true)
    file.refuse('expected little-endian tensors', position)
  const value = next()
  const keys = next()
  if (!(keys instanceof List) || keys.items.length !== objects.storages.size)
    return file.refuse(`expected the keys of ${objects.storages.size} storages`, position)
  const offsets = new Map<Storage, number>()
  for (const key of keys.items) {
    const storage = typeof key === 'string' ? objects.storages.get(key) : undefined
    if (storage === undefined || offsets.has(storage)) return file.refuse('expected each storage once', position)
    const count = (await file.read(position, 8, 'the size of a storage')).readBigInt64LE(0)
    if (count !== BigInt(storage.count))
      file.refuse(`expected ${storage.count} elements in storage ${key}, got ${count}`, position)
    offsets.set(storage, position + 8)
    position += 8 + storage.bytes
    if (position > file.size) file.refuse(`expected ${position} bytes at least, got ${file.size}`, file.size)
  }
  if (position !== file.size) file.refuse(`expected ${position} bytes, got ${file.size}`, position)
  return { value, objects, offsets }
}

/** The tensors of a flat dict, or of the one dict under a wrapper's key; every tensor of the file must be among them. */
function stateTensors(file: ByteFile, root: PickleValue, objects: TorchObjects): Map<string, StoredTensor> {
  const refuse = (message: string, details: Record<string, unknown> = {}): never =>
    file.refuse(`expected a flat dict of tensors by name, ${message}`, 0, details)
  if (!(root instanceof Dict)) return refuse('got another value')
  let dict = root
  if (!root.values.some((value) => value instanceof StoredTensor)) {
    const wrapped = root.values.filter(
      (value, i) => value instanceof Dict && wrappers.includes(root.keys[i] as string),
    ) as Dict[]
    if (wrapped.length === 1) dict = wrapped[0] as Dict
  }
  const tensors = new Map<string, StoredTensor>()
  for (const [i, key] of dict.keys.entries()) {
    const value = dict.values[i]
    if (typeof key !== 'string' || key === '__metadata__') return refuse('got a key that names none')
    const short = JSON.stringify(key.slice(0, 200))
    if (tensors.has(key)) refuse(`got ${short} twice`, { tensor: key })
    if (!(value instanceof StoredTensor)) return refuse(`got another value under ${short}`, { key })
    tensors.set(key, value)
  }
  if (tensors.size === 0) refuse('got none')
  const held = new Set(tensors.values()).size
  if (held !== objects.tensors) refuse(`got ${objects.tensors - held} tensors elsewhere: save the state dict alone`)
  return tensors
}

/** A tensor's bytes, proved to lie in its storage without gaps. */
function locate(file: ByteFile, name: string, tensor: StoredTensor, storageOffset: number): TensorEntry {
  const { dtype, shape, strides, storage } = tensor
  const width = dtypes[dtype].bits / 8
  const short = JSON.stringify(name.slice(0, 200))
  let count = 1
  let contiguous = true
  for (let axis = shape.length - 1; axis >= 0; axis--) {
    const size = shape[axis] as number
    if (size !== 1 && strides[axis] !== count) contiguous = false
    count *= size
  }
  const begin = tensor.offset * width
  if (!(begin + count * width <= storage.bytes)) {
    file.refuse(
      `expected ${short} of ${dtype} [${shape}] at element ${tensor.offset} in its storage of ${storage.bytes} bytes`,
      storageOffset,
      { tensor: name },
    )
  }
  if (!contiguous && count > 0) {
    file.refuse(
      `expected ${short} contiguous, got strides [${strides}] for shape [${shape}]: save it after .contiguous()`,
      storageOffset,
      { tensor: name },
    )
  }
  return { name, dtype, shape, begin: storageOffset + begin, end: storageOffset + begin + count * width }
}
