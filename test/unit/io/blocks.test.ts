// Boxes between files and tensors against a plain reference: gather, scatter, read and write with every pair of dtypes, hashes
// taken on the way, bytes counted, sources that end early.
import { createHash, randomBytes } from 'node:crypto'
import { readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { type DType, dtypes } from '../../../lib/base/dtype.js'
import {
  type BoxMove,
  copyRegion,
  type FileTensor,
  gatherBox,
  hashRange,
  ioCounters,
  readHashed,
  readRegion,
  scatterBox,
  sha256Range,
  writeRegion,
} from '../../../lib/io/blocks.js'
import { Ctx } from '../../../lib/tensor/ctx.js'
import { identityRegion, type Region, volume } from '../../../lib/tensor/region.js'
import { Tensor } from '../../../lib/tensor/tensor.js'
import { errorOf, temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()
let count = 0
const fresh = () => join(home, `file${count++}`)

const moved = (Object.keys(dtypes) as DType[]).filter((dtype) => dtypes[dtype].code >= 0)
const pairs = moved.flatMap((from) =>
  moved.filter((to) => dtypes[from].isFloat === dtypes[to].isFloat).map((to) => [from, to] as const),
)

/** Bits of a small whole number as a float of these widths. */
function floatBits(value: number, exponentBits: number, mantissaBits: number): bigint {
  if (value === 0) return 0n
  const exponent = Math.floor(Math.log2(value))
  const bias = 2 ** (exponentBits - 1) - 1
  const mantissa = Math.round((value / 2 ** exponent - 1) * 2 ** mantissaBits)
  return BigInt(exponent + bias) * 2n ** BigInt(mantissaBits) + BigInt(mantissa)
}

const floats: Partial<Record<DType, readonly [number, number]>> = {
  float64: [11, 52],
  float32: [8, 23],
  bfloat16: [8, 7],
  float16: [5, 10],
  float8_e4m3fn: [4, 3],
  float8_e5m2: [5, 2],
}

/** Whole numbers 0 to 7 (exact in every dtype) as the bytes of a file. */
function encode(values: readonly number[], dtype: DType): Buffer {
  const width = dtypes[dtype].bits / 8
  const out = Buffer.alloc(values.length * width)
  const widths = floats[dtype]
  values.forEach((value, i) => {
    let bits = widths ? floatBits(value, ...widths) : BigInt(dtype === 'bool' ? Number(value !== 0) : value)
    for (let k = 0; k < width; k++, bits >>= 8n) out[i * width + k] = Number(bits & 255n)
  })
  return out
}

/** Values as they are after a stay in `dtype`. */
const seen = (values: readonly number[], dtype: DType) =>
  dtype === 'bool' ? values.map((v) => Number(v !== 0)) : [...values]

/** to[region.to] = from[region.from] */
function moveValues(
  from: readonly number[],
  fromShape: readonly number[],
  to: number[],
  toShape: readonly number[],
  { from: fromStart, to: toStart, size }: Region,
) {
  const walk = (d: number, fromAt: number, toAt: number) => {
    for (let i = 0; i < (size[d] as number); i++) {
      const a = fromAt * (fromShape[d] as number) + (fromStart[d] as number) + i
      const b = toAt * (toShape[d] as number) + (toStart[d] as number) + i
      if (d === size.length - 1) to[b] = from[a] as number
      else walk(d + 1, a, b)
    }
  }
  walk(0, 0, 0)
}

/** A file with `values` after `offset` other bytes, and some behind. */
function fileTensor(values: readonly number[], dtype: DType, shape: readonly number[], offset: number): FileTensor {
  const path = fresh()
  writeFileSync(path, Buffer.concat([Buffer.alloc(offset, 0xee), encode(values, dtype), Buffer.alloc(5, 0xee)]))
  return { path, offset, dtype, shape }
}

const bytesOf = (place: FileTensor) =>
  readFileSync(place.path).subarray(place.offset, place.offset + (volume(place.shape) * dtypes[place.dtype].bits) / 8)

const numbers = (n: number, seed: number) => Array.from({ length: n }, (_, i) => ((i + seed) * 2654435761) % 8)

/** A box cut into a grid; each cell lies somewhere in one of the other tensors, which are larger. */
const cases = fc
  .record({
    dims: fc.array(
      fc.record({ cuts: fc.array(fc.integer({ min: 1, max: 4 }), { minLength: 1, maxLength: 3 }), margin: fc.nat(2) }),
      { minLength: 1, maxLength: 4 },
    ),
    pair: fc.constantFrom(...pairs),
    others: fc.integer({ min: 1, max: 3 }),
    seed: fc.nat(1000),
    offset: fc.nat(40),
  })
  .map(({ dims, pair, others, seed, offset }) => {
    const shape = dims.map(({ cuts }) => cuts.reduce((a, b) => a + b))
    let cells: { start: number[]; size: number[] }[] = [{ start: [], size: [] }]
    for (const { cuts } of dims) {
      cells = cells.flatMap(({ start, size }) => {
        let at = 0
        return cuts.map((n) => {
          const cell = { start: [...start, at], size: [...size, n] }
          at += n
          return cell
        })
      })
    }
    // Each cell has a slot of its own along dim 0 of its tensor.
    const slot = Math.max(...cells.map(({ size }) => size[0] as number))
    const tensors = Array.from({ length: others }, (_, k) => {
      const mine = cells.filter((_, i) => (i + seed) % others === k)
      const otherShape = dims.map(({ cuts, margin }, d) => (d === 0 ? slot * mine.length : Math.max(...cuts)) + margin)
      return {
        shape: otherShape,
        cells: mine.map(({ start, size }, i) => ({
          box: start,
          other: start.map((_, d) => (d === 0 ? i * slot : 0) + (dims[d]?.margin as number)),
          size,
        })),
      }
    })
    return { shape, tensors, pair, seed, offset }
  })

describe('gather and scatter', () => {
  it('gatherBox fills a box from many files, and its hash is that of the file', async () => {
    await fc.assert(
      fc.asyncProperty(cases, async ({ shape, tensors, pair: [from, to], seed, offset }) => {
        const expected: number[] = []
        const sources: BoxMove[] = tensors.map((tensor, k) => {
          const values = seen(numbers(volume(tensor.shape), seed + 7 * k), from)
          const regions = tensor.cells.map(({ box, other, size }) => ({ from: other, to: box, size }))
          for (const region of regions) moveValues(values, tensor.shape, expected, shape, region)
          return { place: fileTensor(values, from, tensor.shape, offset + k), regions }
        })
        const target = fileTensor(Array(volume(shape)).fill(0), to, shape, offset)
        const { xxh3 } = await gatherBox(target, sources, { hash: true })
        const bytes = encode(seen(expected, to), to)
        expect(bytesOf(target).equals(bytes)).toBe(true)
        expect(xxh3).toBe(await hashRange(target.path, offset, bytes.length))
        expect(readFileSync(target.path).subarray(offset + bytes.length)).toEqual(Buffer.alloc(5, 0xee))
      }),
      { numRuns: 200 },
    )
  })

  it('scatterBox spreads a box over many files, and its hash is that of the source', async () => {
    await fc.assert(
      fc.asyncProperty(cases, async ({ shape, tensors, pair: [from, to], seed, offset }) => {
        const values = seen(numbers(volume(shape), seed), from)
        const source = fileTensor(values, from, shape, offset)
        const expected: Buffer[] = []
        const targets: BoxMove[] = tensors.map((tensor, k) => {
          const before = seen(numbers(volume(tensor.shape), seed + 3 * k), to)
          const place = fileTensor(before, to, tensor.shape, offset + k)
          const regions = tensor.cells.map(({ box, other, size }) => ({ from: box, to: other, size }))
          for (const region of regions) moveValues(values, shape, before, tensor.shape, region)
          expected.push(encode(seen(before, to), to))
          return { place, regions }
        })
        const { xxh3 } = await scatterBox(source, targets, { hash: true })
        expect(Buffer.concat(targets.map(({ place }) => bytesOf(place))).equals(Buffer.concat(expected))).toBe(true)
        expect(xxh3).toBe(await hashRange(source.path, offset, encode(values, from).length))
      }),
      { numRuns: 200 },
    )
  })

  it('boxes of several megabytes, in stretches: columns of four files and back', async () => {
    const [rows, columns] = [120, 3000]
    const parts = [0, 1, 2, 3].map((k) => {
      const values = numbers(rows * 750, k)
      return { values, place: fileTensor(values, 'bfloat16', [rows, 750], 3) }
    })
    const regions = parts.map((_, k) => [{ from: [0, 0], to: [0, 750 * k], size: [rows, 750] }])
    const target = fileTensor([], 'float32', [rows, columns], 8)
    const before = ioCounters()
    const sources = parts.map(({ place }, k) => ({ place, regions: regions[k] as Region[] }))
    const { xxh3 } = await gatherBox(target, sources, { hash: true })
    const after = ioCounters()
    expect(after.bytesWritten - before.bytesWritten).toBe(rows * columns * 4)
    expect(after.bytesRead - before.bytesRead).toBe(rows * columns * 2)
    const expected: number[] = []
    parts.forEach(({ values }, k) => {
      moveValues(values, [rows, 750], expected, [rows, columns], (regions[k] as Region[])[0] as Region)
    })
    expect(bytesOf(target).equals(encode(expected, 'float32'))).toBe(true)
    const back = parts.map(() => fileTensor([], 'bfloat16', [rows, 750], 1))
    const returned = await scatterBox(
      target,
      back.map((place) => ({
        place,
        regions: [{ from: [0, 750 * back.indexOf(place)], to: [0, 0], size: [rows, 750] }],
      })),
      { hash: true },
    )
    expect(returned.xxh3).toBe(xxh3)
    back.forEach((place, k) => {
      expect(bytesOf(place).equals(encode(parts[k]?.values as number[], 'bfloat16'))).toBe(true)
    })
  })

  it('refuses holes, regions outside, other ranks, other kinds of dtypes, files that end early', async () => {
    const source = fileTensor(numbers(24, 0), 'float32', [4, 6], 0)
    const target = fileTensor(numbers(24, 1), 'float32', [4, 6], 0)
    const move = (region: Region, place = source) =>
      errorOf(() => gatherBox(target, [{ place, regions: [region] }], { hash: false }))
    const whole = identityRegion([4, 6])
    expect(await move({ ...whole, size: [4, 5] })).toMatchObject({ code: 'ERR_COVERAGE' })
    expect(await move({ ...whole, to: [1, 0] })).toMatchObject({ code: 'ERR_SHAPE' })
    expect(await move({ ...whole, from: [0, 1] })).toMatchObject({ code: 'ERR_SHAPE' })
    expect(await move(identityRegion([24]))).toMatchObject({ code: 'ERR_SHAPE' })
    expect(await move(whole, { ...source, dtype: 'int32' })).toMatchObject({ code: 'ERR_DTYPE' })
    truncateSync(source.path, 90)
    const short = await move(whole)
    expect(short).toMatchObject({ code: 'ERR_IO' })
    expect(String(short)).toContain(source.path)
    expect(await errorOf(() => scatterBox(source, [], { hash: true }))).toMatchObject({ code: 'ERR_IO' })
    expect(await move(whole, { ...source, path: join(home, 'none') })).toMatchObject({ code: 'ERR_FILE_MISSING' })
  })

  it('stops when the signal is aborted, before and during a move', async () => {
    const size = 64 * 2 ** 20
    const place = { path: fresh(), offset: 0, dtype: 'uint8', shape: [size] } as const
    writeFileSync(place.path, '')
    truncateSync(place.path, size)
    const controller = new AbortController()
    const { signal } = controller
    const before = ioCounters().bytesRead
    const moving = errorOf(() => scatterBox(place, [], { hash: true, signal }))
    controller.abort()
    expect(await moving).toMatchObject({ code: 'ERR_ABORTED' })
    expect(ioCounters().bytesRead - before).toBeLessThan(size)
    expect(await errorOf(() => scatterBox(place, [], { hash: true, signal }))).toMatchObject({ code: 'ERR_ABORTED' })
  })
})

describe('tensors', () => {
  it('read and write boxes of any dtype', async () => {
    const ctx = Ctx.create()
    await fc.assert(
      fc.asyncProperty(cases, async ({ shape, tensors, pair: [from, to], seed, offset }) => {
        const values = seen(numbers(volume(shape), seed), from)
        const source = fileTensor(values, from, shape, offset)
        const tensor = Tensor.empty(ctx, shape, to)
        await readRegion(source, tensor, identityRegion(shape))
        expect(Buffer.from(await tensor.bytes()).equals(encode(seen(values, to), to))).toBe(true)
        for (const { shape: otherShape, cells } of tensors) {
          const expected = seen(numbers(volume(otherShape), seed + 1), from)
          const place = fileTensor(expected, from, otherShape, offset)
          for (const { box, other, size } of cells) {
            const region = { from: box, to: other, size }
            moveValues(seen(values, to), shape, expected, otherShape, region)
            await writeRegion(tensor, place, region)
          }
          expect(bytesOf(place).equals(encode(seen(expected, from), from))).toBe(true)
        }
        tensor.dispose()
      }),
      { numRuns: 150 },
    )
  })
})

describe('readHashed', () => {
  it('places regions of any dtypes, touches nothing else, and its hash is that of the whole source', async () => {
    const ctx = Ctx.create()
    await fc.assert(
      fc.asyncProperty(cases, async ({ shape, tensors, pair: [from, to], seed, offset }) => {
        const values = seen(numbers(volume(shape), seed), from)
        const source = fileTensor(values, from, shape, offset)
        const bytes = encode(values, from).length
        for (const { shape: targetShape, cells } of tensors) {
          const expected = seen(numbers(volume(targetShape), seed + 1), to)
          const tensor = Tensor.empty(ctx, targetShape, to)
          await readRegion(fileTensor(expected, to, targetShape, 0), tensor, identityRegion(targetShape))
          const regions = cells.map(({ box, other, size }) => ({ from: box, to: other, size }))
          for (const region of regions) moveValues(values, shape, expected, targetShape, region)
          const before = ioCounters().bytesRead
          const { xxh3 } = await readHashed(source, tensor, regions)
          expect(ioCounters().bytesRead - before).toBe(bytes)
          expect(Buffer.from(await tensor.bytes()).equals(encode(seen(expected, to), to))).toBe(true)
          expect(xxh3).toBe(await hashRange(source.path, offset, bytes))
          tensor.dispose()
        }
      }),
      { numRuns: 150 },
    )
  })

  it.each([
    [[], 'int64'],
    [[3, 0], 'uint8'],
    [[1, 1100, 2 ** 12 + 3], 'int16'],
    [[2 ** 22 + 1], 'int64'],
  ] as const)('of the shape %j, in stretches', async (shape, dtype) => {
    const bytes = randomBytes((volume(shape) * dtypes[dtype].bits) / 8)
    const source: FileTensor = { path: fresh(), offset: 16, dtype, shape }
    writeFileSync(source.path, Buffer.concat([Buffer.alloc(16), bytes]))
    const tensor = Tensor.empty(Ctx.create(), shape, dtype)
    const { xxh3 } = await readHashed(source, tensor, [identityRegion(shape)])
    expect(bytes.equals(Buffer.from(await tensor.bytes()))).toBe(true)
    expect(xxh3).toBe(await hashRange(source.path, 16, bytes.length))
    tensor.dispose()
    rmSync(source.path)
  })

  it('columns into a transposed tensor, cast', async () => {
    const [rows, columns] = [700, 1000]
    const values = numbers(rows * columns, 5)
    const source = fileTensor(values, 'float32', [rows, columns], 4)
    const ctx = Ctx.create()
    const whole = Tensor.empty(ctx, [300, rows], 'bfloat16')
    const across = whole.view(ctx, [rows, 300], [1, rows])
    const { xxh3 } = await readHashed(source, across, [{ from: [0, 400], to: [0, 0], size: [rows, 300] }])
    const expected = Array.from({ length: 300 * rows }, (_, i) => {
      return values[(i % rows) * columns + 400 + Math.floor(i / rows)] as number
    })
    expect(Buffer.from(await whole.bytes()).equals(encode(expected, 'bfloat16'))).toBe(true)
    expect(xxh3).toBe(await hashRange(source.path, 4, rows * columns * 4))
  })

  it('refuses regions outside, other ranks, other kinds of dtypes, files that end early; stops when aborted', async () => {
    const source = fileTensor(numbers(24, 0), 'float32', [4, 6], 0)
    const tensor = Tensor.empty(Ctx.create(), [4, 6], 'float32')
    const whole = identityRegion([4, 6])
    const read = (region: Region, place = source, signal = new AbortController().signal) =>
      errorOf(() => readHashed(place, tensor, [region], { signal }))
    expect(await read({ ...whole, from: [1, 0] })).toMatchObject({ code: 'ERR_SHAPE' })
    expect(await read({ ...whole, to: [0, 1] })).toMatchObject({ code: 'ERR_SHAPE' })
    expect(await read(identityRegion([24]))).toMatchObject({ code: 'ERR_SHAPE' })
    expect(await read(whole, { ...source, dtype: 'int32' })).toMatchObject({ code: 'ERR_DTYPE' })
    expect(await read(whole, { ...source, path: join(home, 'none') })).toMatchObject({ code: 'ERR_FILE_MISSING' })
    truncateSync(source.path, 90)
    const short = await read({ ...whole, size: [1, 6] })
    expect(short).toMatchObject({ code: 'ERR_IO' })
    expect(String(short)).toContain(source.path)

    const size = 64 * 2 ** 20
    const place = { path: fresh(), offset: 0, dtype: 'float32', shape: [size / 4, 1] } as const
    writeFileSync(place.path, '')
    truncateSync(place.path, size)
    const controller = new AbortController()
    const before = ioCounters().bytesRead
    const reading = read({ from: [0, 0], to: [0, 0], size: [4, 1] }, place, controller.signal)
    controller.abort()
    expect(await reading).toMatchObject({ code: 'ERR_ABORTED' })
    expect(ioCounters().bytesRead - before).toBeLessThan(size)
  })
})

describe('large reads', () => {
  it.each([
    [1, 1100, 2 ** 15 + 3],
    [40 * 2 ** 20 + 1, 1, 1],
    [3, 8, 2 ** 20],
  ])('are cut without loss: %i × %i × %i', async (...shape) => {
    const bytes = randomBytes(volume(shape))
    const place: FileTensor = { path: fresh(), offset: 0, dtype: 'uint8', shape }
    writeFileSync(place.path, bytes)
    const tensor = Tensor.empty(Ctx.create(), shape, 'uint8')
    await readRegion(place, tensor, identityRegion(shape))
    expect(bytes.equals(Buffer.from(await tensor.bytes()))).toBe(true)
    tensor.dispose()
    rmSync(place.path)
  })
})

describe('reads are exact', () => {
  it.each([4, 100, 1000, 4096])('columns of %i elements are read without their neighbours', async (columns) => {
    const rows = Math.ceil(2 ** 16 / columns)
    const source = fileTensor(numbers(rows * 2 * columns, 0), 'uint8', [rows, 2 * columns], 0)
    const target = fileTensor([], 'uint8', [rows, columns], 0)
    const before = ioCounters().bytesRead
    await copyRegion(source, target, { from: [0, columns], to: [0, 0], size: [rows, columns] })
    expect(ioCounters().bytesRead - before).toBeLessThanOrEqual(1.01 * rows * columns)
    const expected: number[] = []
    moveValues(numbers(rows * 2 * columns, 0), source.shape, expected, target.shape, {
      from: [0, columns],
      to: [0, 0],
      size: [rows, columns],
    })
    expect(bytesOf(target).equals(encode(expected, 'uint8'))).toBe(true)
  })
})

describe('sha256Range', () => {
  it.each([0, 1, 1000, 2 ** 20 + 17])('is what Node computes, of %i bytes', async (n) => {
    const path = fresh()
    const bytes = randomBytes(n + 11)
    writeFileSync(path, bytes)
    const digest = createHash('sha256').update(bytes.subarray(11)).digest('hex')
    expect(await sha256Range(path, 11, n)).toBe(digest)
    expect(await errorOf(() => sha256Range(path, 11, n + 1))).toMatchObject({ code: 'ERR_IO' })
  })
})
