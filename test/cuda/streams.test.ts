// Streams, memory and host copies of the CUDA backend on the GPU of gpu.ts: order, events, failures, limits, files.
import { execFileSync } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, beforeEach, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import type { ViaductError } from '../../lib/base/errors.js'
import { Device } from '../../lib/tensor/device.js'
import { gpuSetupTimeout, useGpu } from './gpu.js'

const F32 = 0
const BF16 = 1
let device = 0
let stream = 0
let folder = ''

beforeAll(async () => {
  await useGpu()
  device = Device.open('cuda').index
  folder = await mkdtemp(join(tmpdir(), 'cuda-streams-'))
}, gpuSetupTimeout)
afterAll(() => rm(folder, { recursive: true }))

beforeEach(() => {
  stream = native.createStream(device)
  return () => native.destroyStream(stream)
})

const failure = (promise: Promise<unknown>) =>
  promise.then(
    () => undefined,
    (error: unknown) => error as ViaductError,
  )
const read = async (s: number, x: number) => [...new Float32Array(await native.download(s, x))]

test('commands run in order; host bytes are copied before upload returns', async () => {
  const x = native.empty(stream, [2], F32)
  const host = new Float32Array([1, 2])
  native.debugDelay(stream, 10_000)
  native.upload(stream, x, host)
  host.fill(0)
  for (let i = 0; i < 20; i++) native.add(stream, x, x, x)
  expect(await read(stream, x)).toEqual([2 ** 20, 2 ** 21])
  native.free(x)
})

test('a tensor may be freed right after its last use is enqueued', async () => {
  const x = native.empty(stream, [2], F32)
  native.debugDelay(stream, 10_000)
  native.fill(stream, x, 3)
  const bytes = read(stream, x)
  native.free(x)
  const y = native.empty(stream, [2], F32)
  native.fill(stream, y, 4)
  expect(await bytes).toEqual([3, 3])
  native.free(y)
})

test('transfers larger than the staging memory arrive whole', async () => {
  const n = 3_000_001 // 12 MB: three blocks of staging memory and a bit
  const data = Float32Array.from({ length: n }, (_, i) => i * 3)
  const x = native.empty(stream, [n], F32)
  native.upload(stream, x, data)
  const back = new Float32Array(await native.download(stream, x))
  expect(Buffer.compare(Buffer.from(back.buffer), Buffer.from(data.buffer))).toBe(0)
  native.free(x)
})

test('events order streams of the GPU, and of the GPU and the CPU', async () => {
  const cpu = native.openDevice('cpu')
  for (const other of [native.createStream(device), native.createStream(cpu)]) {
    const [x, y] = [native.empty(stream, [1], F32), native.empty(other, [1], F32)]
    native.debugDelay(other, 20_000)
    native.fill(other, y, 7)
    const made = native.recordEvent(other)
    expect(native.eventDone(made)).toBe(false)
    native.waitEvent(stream, made)
    native.fill(stream, x, 1)
    const passed = native.recordEvent(stream)
    native.waitEvent(other, passed)
    await native.syncStream(stream)
    expect(native.eventDone(made)).toBe(true)
    expect(await read(other, y)).toEqual([7])
    for (const event of [made, passed]) native.destroyEvent(event)
    for (const t of [x, y]) native.free(t)
    native.destroyStream(other)
  }
})

test('a failure poisons the stream with op and place, and streams that wait for it', async () => {
  const other = native.createStream(device)
  const x = native.empty(stream, [1], F32)
  native.fill(stream, x, 1)
  native.setPlace(stream, 'decoder.layers.3.mlp, step 12')
  native.debugFail(stream, 'a test of failures')
  native.fill(stream, x, 2)
  const event = native.recordEvent(stream)
  native.waitEvent(other, event)
  const wanted = /a test of failures \(in decoder\.layers\.3\.mlp, step 12\)/
  expect((await failure(native.syncStream(stream)))?.message).toMatch(wanted)
  expect((await failure(native.download(stream, x)))?.message).toMatch(wanted)
  expect((await failure(native.syncStream(other)))?.message).toMatch(wanted)
  expect(() => native.checkStream(stream)).toThrow(wanted)
  for (const s of [stream, other]) native.resetStream(s)
  expect(await read(stream, x)).toEqual([1])
  native.destroyEvent(event)
  native.free(x)
  native.destroyStream(other)
})

test('memory is counted, reused at once by its stream, and given back by trim', () => {
  native.trimMemory(device)
  const before = native.memoryStats(device)
  const x = native.empty(stream, [1 << 20], F32)
  const first = native.tensorInfo(x).address
  const during = native.memoryStats(device)
  expect(during.liveBytes - before.liveBytes).toBeGreaterThanOrEqual(4 << 20)
  expect(during.liveBlocks).toBe(before.liveBlocks + 1)
  native.free(x)
  const y = native.empty(stream, [1 << 20], F32)
  expect(native.tensorInfo(y).address).toBe(first)
  native.free(y)
  expect(native.memoryStats(device).liveBytes).toBe(before.liveBytes)
  const big = native.empty(stream, [25 << 20], F32)
  const reserved = native.memoryStats(device).reservedBytes
  native.free(big)
  expect(native.trimMemory(device)).toBeGreaterThanOrEqual(64 << 20)
  expect(native.memoryStats(device).reservedBytes).toBeLessThan(reserved)
  const again = native.empty(stream, [25 << 20], F32)
  native.free(again)
})

test('more than the GPU has, and more than the limit, is an error at the call', () => {
  for (const limit of [0, 1 << 20]) {
    native.setMemoryLimit(device, limit)
    expect(() => native.empty(stream, [1 << 20, 1 << 20], F32)).toThrow(
      /room for 43980465\d+ bytes, got none: (the reserved|the limit)/,
    )
  }
  native.setMemoryLimit(device, 0)
  native.free(native.empty(stream, [4], F32))
})

test('boxes of files go to the GPU and come back, cast, into strided memory', async () => {
  const path = join(folder, 'block')
  const [rows, columns] = [2100, 2048] // 17 MB: more than one piece
  const values = Float32Array.from({ length: rows * columns }, (_, i) => i % 251)
  await writeFile(path, values)
  const wide = native.empty(stream, [rows, columns + 8], BF16)
  native.fill(stream, wide, -1)
  await native.syncStream(stream)
  const whole = native.view(wide, [rows, columns], [columns + 8, 1], 8)
  await native.readBlock(path, 0, F32, [rows, columns], [0, 0], [rows, columns], whole, [0, 0])
  const turned = native.empty(stream, [3, 5], F32)
  const transposed = native.view(turned, [5, 3], [1, 5], 0)
  await native.syncStream(stream)
  await native.readBlock(path, 0, F32, [rows, columns], [7, 11], [5, 3], transposed, [0, 0])
  expect(await read(stream, turned)).toEqual(
    [0, 1, 2].flatMap((c) => [0, 1, 2, 3, 4].map((r) => ((7 + r) * columns + 11 + c) % 251)),
  )
  const out = join(folder, 'out')
  await writeFile(out, new Uint8Array(rows * (columns + 8) * 2))
  await native.writeBlock(out, 0, BF16, [rows, columns + 8], [0, 0], [rows, columns + 8], wide, [0, 0])
  const written = await readFile(out)
  const back = new Uint16Array(written.buffer, written.byteOffset, rows * (columns + 8))
  const value = (r: number, c: number) => new Float32Array(Uint32Array.of(back[r * (columns + 8) + c]! << 16).buffer)[0]
  let wrong = 0
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns + 8; c++) {
      if (value(r, c) !== (c < 8 ? -1 : (r * columns + c - 8) % 251)) wrong++
    }
  }
  expect(wrong).toBe(0)
  for (const t of [wide, whole, turned, transposed]) native.free(t)
})

test('times of commands are those of the GPU', async () => {
  const x = native.empty(stream, [1000], F32)
  native.startProfile(stream)
  for (let i = 0; i < 3; i++) native.fill(stream, x, i)
  native.add(stream, x, x, x)
  await native.syncStream(stream)
  const times = native.endProfile(stream)
  expect(Object.fromEntries(times.map((t) => [t.op, t.count]))).toEqual({ fill: 3, add: 1 })
  for (const { seconds } of times) expect(seconds).toBeGreaterThan(0)
  native.free(x)
})

test('a file that is no plug-in of this build is refused with what to do', async () => {
  const path = join(folder, 'libviaduct_cuda.so')
  await writeFile(path, 'not a library')
  expect(() => native.pluginDevices(path)).toThrow(/to be a device plug-in of this build, got .*npm run build:cuda/)
  expect(() => native.pluginDevices(join(folder, 'none.so'))).toThrow(/npm run build:cuda/)
  const other = join(folder, 'other')
  await writeFile(
    `${other}.cc`,
    'extern "C" const char* viaductPluginInterface() { return "older"; }\nextern "C" void* viaductPlugin() { return nullptr; }\n',
  )
  execFileSync(process.env.CXX ?? 'g++', ['-shared', '-fPIC', '-o', `${other}.so`, `${other}.cc`])
  expect(() => native.pluginDevices(`${other}.so`)).toThrow(
    /one for interface older, the addon has \w{32}: npm run build:cuda/,
  )
})
