// Ways to spoil a Hugging Face folder and its checkpoint in one place: bits, tensors, text, headers, the index.
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect } from 'vitest'
import { openWeights } from '../../lib/io/weightFolder.js'

/** A pair to spoil: the folder, the checkpoint's root and its iter_* folder. */
export interface Pair {
  readonly hf: string
  readonly root: string
  readonly iter: string
}

export const layer = (i: number, part: string) => `model.layers.${i}.${part}.weight`

/** Rewrites the bytes of tensors of a folder: their old bytes in, their new ones out. */
export async function rewrite(
  hf: string,
  names: readonly string[],
  change: (old: Buffer[]) => Buffer[],
): Promise<void> {
  const { tensors } = await openWeights(hf)
  const places = names.map((name) => tensors.get(name) as NonNullable<ReturnType<typeof tensors.get>>)
  const old = places.map(({ path, offset, entry }) =>
    Buffer.from(readFileSync(path).subarray(offset, offset + entry.end - entry.begin)),
  )
  change(old).forEach((bytes, i) => {
    const { path, offset } = places[i] as (typeof places)[number]
    const file = readFileSync(path)
    bytes.copy(file, offset)
    writeFileSync(path, file)
  })
}

export const swap = (a: string, b: string) => (pair: Pair) => rewrite(pair.hf, [a, b], ([x, y]) => [y, x] as Buffer[])
export const edit = (name: string, change: (old: Buffer) => Buffer) => (pair: Pair) =>
  rewrite(pair.hf, [name], ([old]) => [change(old as Buffer)])

/** Flips one bit of a file, `at` from its start, or from its end where negative. */
export function flip(file: string, at: number): void {
  const bytes = readFileSync(file)
  const place = at < 0 ? bytes.length + at : at
  bytes[place] = (bytes[place] as number) ^ 4
  writeFileSync(file, bytes)
}

/** Rows of `width` bytes turned into columns: a square matrix of bfloat16. */
export function transpose(old: Buffer): Buffer {
  const n = Math.sqrt(old.length / 2)
  const out = Buffer.alloc(old.length)
  for (let i = 0; i < n; i++)
    for (let j = 0; j < n; j++) old.copy(out, 2 * (j * n + i), 2 * (i * n + j), 2 * (i * n + j) + 2)
  return out
}

/** Rows of a matrix moved down by `rows`, the last to the top. */
export function rotate(old: Buffer, bytes: number): Buffer {
  return Buffer.concat([old.subarray(old.length - bytes), old.subarray(0, old.length - bytes)])
}

export function editText(file: string, change: (text: string) => string): void {
  const [before, after] = [readFileSync(file, 'utf8'), change(readFileSync(file, 'utf8'))]
  expect(after).not.toBe(before)
  writeFileSync(file, after)
}

export type Header = Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>
/** Rewrites a safetensors header; the data stays. */
export function editHeader(file: string, change: (header: Header) => void): void {
  const bytes = readFileSync(file)
  const length = Number(bytes.readBigUInt64LE(0))
  const header = JSON.parse(bytes.subarray(8, 8 + length).toString()) as Header
  change(header)
  const json = Buffer.from(JSON.stringify(header).padEnd(length))
  const size = Buffer.alloc(8)
  size.writeBigUInt64LE(BigInt(json.length))
  writeFileSync(file, Buffer.concat([size, json, bytes.subarray(8 + length)]))
}

export interface Index {
  tensors: Record<
    string,
    { dtype: string; shape: number[]; pieces: { file: string; key: string; start: number[]; xxh3: string }[] }
  >
}
export function editIndex({ iter }: Pair, change: (tensors: Index['tensors']) => void): void {
  const file = join(iter, 'index.json')
  const index = JSON.parse(readFileSync(file, 'utf8')) as Index
  change(index.tensors)
  writeFileSync(file, JSON.stringify(index))
}
