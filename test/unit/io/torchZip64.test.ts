// An archive beyond 4 GB: sizes and offsets that only ZIP64 fields can hold. The file is sparse, so it takes no space.
import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { crc32 } from 'node:zlib'
import { expect, it } from 'vitest'
import { openTorchFile } from '../../../lib/io/torch/torchFile.js'
import { op, pickle, tensorOpcodes } from '../../hostile/pickleBytes.js'
import { errorOf, temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()
const full = 0xffffffff
const large = 5 * 2 ** 30

/** Numbers of 2, 4 or 8 bytes, little endian, and texts. */
function fields(...list: readonly (readonly [bytes: 2 | 4 | 8, value: number] | string | Uint8Array)[]): Buffer {
  return Buffer.concat(
    list.map((item) => {
      if (typeof item === 'string') return Buffer.from(item, 'latin1')
      if (item instanceof Uint8Array) return item
      const bytes = Buffer.alloc(8)
      bytes.writeBigUInt64LE(BigInt(item[1]))
      return bytes.subarray(0, item[0])
    }),
  )
}

/** Writes the archive as torch.save does: sizes after the data, ZIP64 fields for what 32 bits do not hold. */
function write(path: string, entries: readonly { name: string; bytes: number; data?: Buffer }[], end = 0): void {
  const file = openSync(path, 'w')
  const directory: Buffer[] = []
  let at = 0
  for (const { name, bytes, data = Buffer.alloc(0) } of entries) {
    const crc = crc32(data)
    const flags = [
      [2, 0x0808],
      [2, 0],
      [4, 0],
    ] as const
    const local = fields('PK\x03\x04', [2, 45], ...flags, [4, 0], [4, 0], [4, 0], [2, name.length], [2, 0], name)
    writeSync(file, local, 0, local.length, at)
    writeSync(file, data, 0, data.length, at + local.length)
    const [wideBytes, wideAt] = [bytes >= full, at >= full]
    const values = [...(wideBytes ? [bytes, bytes] : []), ...(wideAt ? [at] : [])]
    const extra =
      values.length === 0 ? '' : fields([2, 1], [2, 8 * values.length], ...values.map((v) => [8, v] as const))
    const size = wideBytes ? full : bytes
    directory.push(
      fields(
        'PK\x01\x02',
        ...([[2, 45], [2, 45], ...flags, [4, crc], [4, size], [4, size], [2, name.length], [2, extra.length]] as const),
        ...([
          [2, 0],
          [2, 0],
          [2, 0],
          [4, 0],
          [4, wideAt ? full : at],
        ] as const),
        name,
        extra,
      ),
    )
    at += local.length + bytes
  }
  const list = Buffer.concat(directory)
  const count = entries.length
  const place = at + list.length
  const records = fields(
    list,
    ...(['PK\x06\x06', [8, 44], [2, 45], [2, 45], [4, 0], [4, 0], [8, count], [8, count], [8, list.length]] as const),
    [8, at + end],
    ...(['PK\x06\x07', [4, 0], [8, place], [4, 1]] as const),
    ...(['PK\x05\x06', [2, 0], [2, 0], [2, count], [2, count], [4, list.length], [4, full], [2, 0]] as const),
  )
  ftruncateSync(file, at)
  writeSync(file, records, 0, records.length, at)
  closeSync(file)
}

const tensors = [
  ['big', tensorOpcodes({ key: '0', count: large / 4, shape: [large / 4] })],
  ['behind', tensorOpcodes({ key: '1', count: 2, shape: [2] })],
] as const
const data = pickle(op.emptyDict, ...tensors.flatMap(([name, tensor]) => [op.text(name), tensor, op.setItem]))
const entries = [
  { name: 'a/data.pkl', bytes: data.length, data },
  { name: 'a/data/0', bytes: large },
  { name: 'a/data/1', bytes: 8, data: Buffer.from('12345678') },
]

it('locates tensors beyond 4 GB', async () => {
  const path = join(home, 'large.bin')
  write(path, entries)
  const found = await openTorchFile(path, 'large.bin')
  const big = found.get('big')
  expect((big?.end ?? 0) - (big?.begin ?? 0)).toBe(large)
  expect(found.get('behind')?.begin).toBe((big?.end ?? 0) + 30 + 'a/data/1'.length)
})

it('refuses end records that point elsewhere', async () => {
  const path = join(home, 'wrong.bin')
  write(path, entries, 1)
  expect(await errorOf(() => openTorchFile(path, 'wrong.bin'))).toMatchObject({ code: 'ERR_TORCH_FILE' })
})
