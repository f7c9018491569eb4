// The kit for a GPU machine: archives are cut into parts that fit, and unpack.sh puts them together or says what is wrong. The whole
// kit takes minutes to pack; these archives are small.
import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { packageRoot } from '../../lib/base/packageRoot.js'

interface Archive {
  readonly name: string
  readonly parts: readonly { readonly path: string; readonly bytes: number; readonly sha256: string }[]
}
interface Kit {
  partsOf(bytes: number, most: number): { offset: number; bytes: number }[]
  pack(folder: string, file: string): void
  cutArchive(file: string, name: string, out: string, most: number): Archive
  writeStart(out: string, archives: readonly Archive[]): void
  clearFolder(out: string): void
}

const work = mkdtempSync(join(tmpdir(), 'viaduct-kit-'))
afterAll(() => rmSync(work, { recursive: true, force: true }))
const whole = join(work, 'whole')
let kit: Kit

beforeAll(async () => {
  kit = (await import(pathToFileURL(join(packageRoot(), 'deploy/gpuKit.mjs')).href)) as Kit
  const archives = ['viaduct', 'nccl'].map((name) => {
    const folder = join(work, name)
    mkdirSync(join(folder, name), { recursive: true })
    // Numbers that xz cannot make small.
    const bytes = Buffer.from(Uint8Array.from({ length: 50_000 }, (_, i) => Math.floor(Math.abs(Math.sin(i) * 1e6))))
    writeFileSync(join(folder, name, 'content'), bytes)
    kit.pack(folder, join(work, `${name}.tar.xz`))
    return kit.cutArchive(join(work, `${name}.tar.xz`), name, whole, 20_000)
  })
  kit.writeStart(whole, archives)
  expect(archives[0]?.parts.length).toBeGreaterThan(1)
})

function unpacked(name: string, change: (folder: string) => void) {
  const folder = join(work, name)
  cpSync(whole, folder, { recursive: true })
  change(folder)
  const { status, stdout, stderr } = spawnSync('sh', [join(folder, 'start/unpack.sh')], { encoding: 'utf8' })
  const file = (archive: string) => join(folder, 'unpacked', archive, 'content')
  return { status, text: stdout + stderr, file }
}

it('cuts without a gap, and no part is longer than it may be', () => {
  for (const [bytes, most] of [
    [1, 10],
    [10, 10],
    [11, 10],
    [99, 10],
    [12_345_678, 1_000_001],
  ] as const) {
    const parts = kit.partsOf(bytes, most)
    expect(parts).toHaveLength(Math.ceil(bytes / most))
    let end = 0
    for (const part of parts) {
      expect(part.offset).toBe(end)
      expect(part.bytes).toBeLessThanOrEqual(most)
      end += part.bytes
    }
    expect(end).toBe(bytes)
  }
})

it('unpacks what was packed, the second archive only where it is', () => {
  const both = unpacked('both', () => {})
  expect(both.status).toBe(0)
  for (const name of ['viaduct', 'nccl'])
    expect(readFileSync(both.file(name))).toEqual(readFileSync(join(work, name, name, 'content')))
  const one = unpacked('one', (folder) => {
    for (let i = 0; existsSync(join(folder, `nccl-${i}`)); i++) rmSync(join(folder, `nccl-${i}`), { recursive: true })
  })
  expect(one).toMatchObject({ status: 0, text: expect.stringContaining('nccl: not here') })
  expect(existsSync(one.file('nccl'))).toBe(false)
})

it('names a part that is missing, and one that is damaged', () => {
  const missing = unpacked('missing', (folder) => rmSync(join(folder, 'viaduct-1'), { recursive: true }))
  expect(missing).toMatchObject({ status: 1, text: expect.stringContaining('got none of viaduct-1/viaduct.tar.xz.1') })
  const damaged = unpacked('damaged', (folder) => {
    const file = join(folder, 'viaduct-0/viaduct.tar.xz.0')
    const bytes = readFileSync(file)
    bytes[100] = (bytes[100] as number) ^ 1
    writeFileSync(file, bytes)
  })
  expect(damaged).toMatchObject({ status: 1, text: expect.stringMatching(/expected viaduct-0\/.* got other bytes/) })
})

it('a folder with anything else in it is left as it is', () => {
  const other = join(work, 'other')
  mkdirSync(other)
  writeFileSync(join(other, 'letter.txt'), 'dear')
  expect(() => kit.clearFolder(other)).toThrow(
    /expected .*other to be new, empty or an earlier kit, got a folder with letter.txt/,
  )
  expect(readFileSync(join(other, 'letter.txt'), 'utf8')).toBe('dear')
  const earlier = join(work, 'earlier')
  kit.writeStart(earlier, [])
  kit.clearFolder(earlier)
  expect(existsSync(earlier)).toBe(false)
  kit.clearFolder(join(work, 'new'))
})
