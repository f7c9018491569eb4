// The caching allocator through the addon: reuse, merging, counters, limits, and memory that crosses streams.
import { beforeEach, expect, test } from 'vitest'
import { native } from '../../../lib/addon/load.js'

const F32 = 0
const MiB = 2 ** 20
const device = native.openDevice('cpu')
let stream = 0

beforeEach(() => {
  stream = native.createStream(device)
  return () => {
    native.setMemoryLimit(device, 0)
    native.destroyStream(stream)
  }
})

const address = (handle: number) => native.tensorInfo(handle).address
const floats = (mebibytes: number) => [(mebibytes * MiB) / 4]

test('a freed block serves its stream again at once, at the same address', () => {
  const x = native.empty(stream, floats(1), F32)
  const where = address(x)
  native.fill(stream, x, 1)
  native.free(x)
  const y = native.empty(stream, floats(1), F32)
  expect(address(y)).toBe(where)
  expect(where % 512).toBe(0)
  native.free(y)
})

test('neighbours that are free merge, so that nothing new is taken from the system', () => {
  const parts = Array.from({ length: 32 }, () => native.empty(stream, floats(1), F32))
  const { reservedBytes } = native.memoryStats(device)
  const lowest = Math.min(...parts.map(address))
  for (const part of [...parts.filter((_, i) => i % 2 === 0), ...parts.filter((_, i) => i % 2 === 1)]) native.free(part)
  const whole = native.empty(stream, floats(32), F32)
  expect(address(whole)).toBe(lowest)
  expect(native.memoryStats(device).reservedBytes).toBe(reservedBytes)
  native.free(whole)
})

test('live, peak and blocks are counted', () => {
  const start = native.memoryStats(device)
  native.resetPeak(device)
  const x = native.empty(stream, floats(3), F32)
  const y = native.empty(stream, [1], F32)
  native.free(x)
  const now = native.memoryStats(device)
  expect(now.liveBytes - start.liveBytes).toBe(512)
  expect(now.peakBytes - start.liveBytes).toBe(3 * MiB + 512)
  expect(now.liveBlocks - start.liveBlocks).toBe(1)
  native.free(y)
  native.resetPeak(device)
  expect(native.memoryStats(device).peakBytes).toBe(start.liveBytes)
})

test('beyond the limit an allocation is refused with the numbers, and the program goes on', () => {
  const { liveBytes } = native.memoryStats(device)
  native.setMemoryLimit(device, liveBytes + 4 * MiB)
  const x = native.empty(stream, floats(3), F32)
  let error: (Error & { code?: string }) | undefined
  try {
    native.empty(stream, floats(2), F32)
  } catch (e) {
    error = e as Error
  }
  expect(error?.code).toBe('ERR_OUT_OF_MEMORY')
  expect(error?.message).toContain(`${2 * MiB} bytes`)
  expect(error?.message).toContain(`live ${liveBytes + 3 * MiB}`)
  expect(error?.message).toContain(`limit ${liveBytes + 4 * MiB}`)
  native.free(x)
  native.free(native.empty(stream, floats(2), F32))
})

test('more than the machine can give is an error, not the end of the process', () => {
  expect(() => native.empty(stream, [2 ** 46], F32)).toThrow(/expected room for/)
  native.free(native.empty(stream, floats(1), F32))
})

test('a block that another stream still uses waits for it', async () => {
  const other = native.createStream(device)
  const x = native.empty(stream, floats(1), F32)
  native.fill(stream, x, 5)
  const ready = native.recordEvent(stream)
  native.waitEvent(other, ready)
  native.destroyEvent(ready)
  const where = address(x)
  const copy = native.empty(other, floats(1), F32)
  native.debugDelay(other, 100_000)
  native.copy(other, copy, x)
  native.free(x)
  const y = native.empty(stream, floats(1), F32)
  expect(address(y)).not.toBe(where)
  native.fill(stream, y, 6)
  const seen = new Float32Array(await native.download(other, copy))
  expect(seen.every((value) => value === 5)).toBe(true)
  // The other stream has passed: the next allocation finds the block at home.
  const z = native.empty(stream, floats(1), F32)
  expect(address(z)).toBe(where)
  for (const handle of [y, z, copy]) native.free(handle)
  native.destroyStream(other)
})

test('a block serves its stream at once when that waits for the last use on another one, and not for an earlier one', async () => {
  const other = native.createStream(device)
  const waitFor = (point: number) => {
    native.waitEvent(stream, point)
    native.destroyEvent(point)
  }
  const [x, copy] = [native.empty(stream, floats(1), F32), native.empty(other, floats(1), F32)]
  native.fill(stream, x, 5)
  await native.syncStream(stream)
  const where = address(x)
  native.debugDelay(other, 100_000)
  const early = native.recordEvent(other)
  native.copy(other, copy, x)
  const last = native.recordEvent(other)
  waitFor(early)
  const alias = native.view(x, floats(1), [1], 0)
  native.free(x)
  waitFor(last)
  native.free(alias)
  const y = native.empty(stream, floats(1), F32)
  expect(address(y)).toBe(where)
  native.fill(stream, y, 6)
  expect(new Float32Array(await native.download(other, copy)).every((value) => value === 5)).toBe(true)

  native.debugDelay(other, 100_000)
  const before = native.recordEvent(other)
  native.copy(other, copy, y)
  waitFor(before)
  native.free(y)
  const z = native.empty(stream, floats(1), F32)
  expect(address(z)).not.toBe(where)
  await native.syncStream(other)
  for (const handle of [z, copy]) native.free(handle)
  native.destroyStream(other)
})

test('memory freed by a stream that ended serves the others', () => {
  const other = native.createStream(device)
  const x = native.empty(other, floats(8), F32)
  const where = address(x)
  native.free(x)
  native.destroyStream(other)
  const { reservedBytes } = native.memoryStats(device)
  const y = native.empty(stream, floats(8), F32)
  expect(native.memoryStats(device).reservedBytes).toBe(reservedBytes)
  expect(Math.abs(address(y) - where)).toBeLessThan(reservedBytes)
  native.free(y)
})

test('trim gives unused pages back, and they come back as needed', async () => {
  const x = native.empty(stream, floats(16), F32)
  native.fill(stream, x, 1)
  await native.syncStream(stream)
  native.free(x)
  expect(native.trimMemory(device)).toBeGreaterThanOrEqual(14 * MiB)
  const y = native.empty(stream, floats(16), F32)
  native.fill(stream, y, 2)
  const last = native.view(y, [1], [1], (16 * MiB) / 4 - 1)
  expect(new Float32Array(await native.download(stream, last))[0]).toBe(2)
  native.free(last)
  native.free(y)
})
