// A folder of its own for each test file, removed at its end.
import { createHash } from 'node:crypto'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll } from 'vitest'
import { ViaductError } from '../../lib/base/errors.js'

/** A new temporary folder for this test file. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'viaduct-test-'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** The ViaductError that `work` throws; fails when it throws another one or none. */
export async function errorOf(work: () => unknown): Promise<ViaductError> {
  try {
    await work()
  } catch (error) {
    if (error instanceof ViaductError) return error
    throw error
  }
  throw new Error('expected an error, got none')
}

/** Relative names and contents of all files below a folder. */
export function filesOf(folder: string, relative = ''): Map<string, Buffer> {
  const files = new Map<string, Buffer>()
  for (const entry of readdirSync(join(folder, relative), { withFileTypes: true })) {
    const name = relative === '' ? entry.name : `${relative}/${entry.name}`
    if (entry.isDirectory()) for (const [below, bytes] of filesOf(folder, name)) files.set(below, bytes)
    else files.set(name, readFileSync(join(folder, name)))
  }
  return files
}

/** Relative names and SHA-256 of all files below a folder, sorted: quick to compare. */
export function digestsOf(folder: string): string[] {
  return [...filesOf(folder)]
    .map(([name, bytes]) => `${name} ${createHash('sha256').update(bytes).digest('hex')}`)
    .sort()
}
