// Handles, storages and versions as the slot table keeps them; raw addon functions, no Tensor objects.
import { beforeEach, expect, test } from 'vitest'
import { native } from '../../../lib/addon/load.js'

const F32 = 0
const I64 = 4
const device = native.openDevice('cpu')
let stream = 0

beforeEach(() => {
  stream = native.createStream(device)
  return () => native.destroyStream(stream)
})

function code(f: () => unknown): string {
  try {
    f()
  } catch (error) {
    return (error as { code: string }).code
  }
  return 'nothing was thrown'
}

test('a stale handle, a double free and a made-up handle are refused', () => {
  const x = native.empty(stream, [4], F32)
  native.free(x)
  expect(code(() => native.free(x))).toBe('ERR_HANDLE')
  expect(code(() => native.version(x))).toBe('ERR_HANDLE')
  expect(code(() => native.fill(stream, x, 1))).toBe('ERR_HANDLE')
  for (const handle of [0, -1, 1, 5, 2 ** 20, 2 ** 52 + 1, 2 ** 53 - 1, 0.5, Number.NaN]) {
    expect(['ERR_HANDLE', 'ERR_USAGE']).toContain(code(() => native.version(handle)))
  }
})

test('a slot that is used again does not answer to its old handle', () => {
  const x = native.empty(stream, [4], F32)
  native.free(x)
  const y = native.empty(stream, [4], F32)
  expect(y % 2 ** 20).toBe(x % 2 ** 20)
  expect(y).not.toBe(x)
  expect(code(() => native.version(x))).toBe('ERR_HANDLE')
  expect(native.version(y)).toBe(0)
  native.free(y)
})

test('views share the storage, which lives until the last one is freed', async () => {
  const before = native.memoryStats(device).liveBytes
  const x = native.empty(stream, [2, 3], F32)
  native.upload(stream, x, new Float32Array([1, 2, 3, 4, 5, 6]))
  const row = native.view(x, [3], [1], 3)
  expect(native.sharers(x)).toBe(2)
  native.free(x)
  expect(native.memoryStats(device).liveBytes).toBe(before + 512)
  native.fill(stream, row, 9)
  expect([...new Float32Array(await native.download(stream, row))]).toEqual([9, 9, 9])
  expect(native.sharers(row)).toBe(1)
  native.free(row)
  expect(native.memoryStats(device).liveBytes).toBe(before)
})

test('a view may not reach outside of the storage', () => {
  const x = native.empty(stream, [2, 3], F32)
  expect(code(() => native.view(x, [7], [1], 0))).toBe('ERR_SHAPE')
  expect(code(() => native.view(x, [1], [1], 6))).toBe('ERR_SHAPE')
  expect(code(() => native.view(x, [2], [1], -1))).toBe('ERR_SHAPE')
  expect(code(() => native.view(x, [2, 3], [4, 1], 0))).toBe('ERR_SHAPE')
  const last = native.view(x, [1], [1], 5)
  expect(native.tensorInfo(last).offset).toBe(5)
  const back = native.view(last, [6], [1], -5)
  native.free(last)
  native.free(back)
  native.free(x)
})

test('writes raise the version of every view, reads do not', () => {
  const x = native.empty(stream, [4], F32)
  const y = native.empty(stream, [4], F32)
  const half = native.view(x, [2], [1], 0)
  expect(native.version(x)).toBe(0)
  native.fill(stream, half, 1)
  expect(native.version(x)).toBe(1)
  native.add(stream, y, x, x)
  expect(native.version(x)).toBe(1)
  expect(native.version(y)).toBe(1)
  native.accumulate(stream, x, y)
  expect(native.version(half)).toBe(2)
  for (const handle of [x, y, half]) native.free(handle)
})

test('an op that refuses its arguments changes no version', () => {
  const x = native.empty(stream, [4], F32)
  const y = native.empty(stream, [5], F32)
  expect(code(() => native.add(stream, y, x, x))).toBe('ERR_SHAPE')
  expect(native.version(y)).toBe(0)
  native.free(x)
  native.free(y)
})

test('arguments of a wrong type are named', () => {
  const x = native.empty(stream, [4], F32)
  expect(() => native.fill(stream, x, 'one' as unknown as number)).toThrow('[fill] argument 3: expected a number')
  expect(() => (native.fill as (s: number) => void)(stream)).toThrow('expected more arguments')
  expect(code(() => native.empty(stream, [1, 1, 1, 1, 1, 1, 1], F32))).toBe('ERR_SHAPE')
  expect(code(() => native.empty(stream, [-1], F32))).toBe('ERR_SHAPE')
  expect(code(() => native.empty(stream, [2 ** 40, 2 ** 40], F32))).toBe('ERR_SHAPE')
  expect(code(() => native.empty(stream, [1], 99))).toBe('ERR_USAGE')
  expect(code(() => native.upload(stream, x, new Float32Array(3)))).toBe('ERR_SHAPE')
  native.free(x)
})

test('zero elements and scalars are tensors like others', async () => {
  const none = native.empty(stream, [0, 3], F32)
  const scalar = native.empty(stream, [], I64)
  native.upload(stream, none, new Float32Array(0))
  native.upload(stream, scalar, new BigInt64Array([7n]))
  expect((await native.download(stream, none)).byteLength).toBe(0)
  expect(new BigInt64Array(await native.download(stream, scalar))[0]).toBe(7n)
  native.free(none)
  native.free(scalar)
})

test('a million tensors made and freed leave nothing behind', () => {
  const slots = native.liveSlots()
  const { liveBytes, reservedBytes } = native.memoryStats(device)
  const resident = process.memoryUsage().rss
  for (let i = 0; i < 1_000_000; i++) native.free(native.empty(stream, [1 + (i % 1000)], F32))
  expect(native.liveSlots()).toBe(slots)
  expect(native.memoryStats(device).liveBytes).toBe(liveBytes)
  expect(native.memoryStats(device).reservedBytes).toBeLessThanOrEqual(Math.max(reservedBytes, 64 * 2 ** 20))
  // A leak of one block header a tensor would be 48 MB; garbage of the engine stays well under half of that.
  expect(process.memoryUsage().rss - resident).toBeLessThan(24e6)
})
