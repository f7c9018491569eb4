// Runs cases of gptRank.ts on ranks and puts together what these wrote.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect } from 'vitest'
import { type Fixture, pack, runsOf } from '../parity/llamaLayout.js'
import type { Case, Written } from './gptRank.js'
import { runRanks } from './startRanks.js'

const script = join(dirname(fileURLToPath(import.meta.url)), 'gptRank.ts')

/** What each rank wrote, by the case's name. */
export async function runCases(size: number, cases: readonly Case[]): Promise<Map<string, Written[]>> {
  const folder = mkdtempSync(join(tmpdir(), 'viaduct-layouts-'))
  try {
    await runRanks(size, script, [folder, JSON.stringify(cases)])
    const read = (name: string) => (_: unknown, rank: number) =>
      JSON.parse(readFileSync(join(folder, `${name}.${rank}.json`), 'utf8')) as Written
    return new Map(cases.map(({ name }) => [name, Array.from({ length: size }, read(name))]))
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

/** Rows of a logical tensor: where its last block ends. */
function logicalRows(name: string, blocks: Written['blocks']): number {
  return Math.max(...blocks.filter((b) => b.name === name).map((b) => b.start[0]! + b.size[0]!))
}

/** The result of all ranks, which must agree wherever several hold the same. Gradients are whole logical tensors by name. */
export function together(
  written: readonly Written[],
  fixture: Fixture,
): { logits: Float32Array; loss: number; gradients: Map<string, Float32Array> } {
  const [first] = written as [Written]
  for (const rank of written) {
    expect(rank.loss).toBe(first.loss)
    expect(rank.logits).toEqual(first.logits)
    expect(rank.outside).toBe(0)
    expect(rank.leaked).toBe(0)
  }
  const gradients = new Map<string, Float32Array>()
  const owned = new Map<string, readonly number[]>()
  const blocks = written.flatMap((rank) => rank.blocks)
  for (const block of blocks.filter((b) => b.replica === 0)) {
    const length = pack(runsOf(block.name, fixture.config), fixture.weights).length
    const whole = gradients.get(block.name) ?? new Float32Array(length).fill(Number.NaN)
    gradients.set(block.name, whole)
    owned.set(`${block.name} ${block.start}`, block.values)
    const [rows, width] = block.size.length === 1 ? [1, block.size[0]!] : (block.size as [number, number])
    const columns = block.size.length === 1 ? 0 : length / logicalRows(block.name, blocks)
    for (let r = 0; r < rows; r++) {
      const at = block.size.length === 1 ? block.start[0]! : (block.start[0]! + r) * columns + block.start[1]!
      whole.set(block.values.slice(r * width, (r + 1) * width), at)
    }
  }
  // Copies of a block have the same gradient, bit for bit, once it is summed.
  for (const block of blocks.filter((b) => b.replica > 0))
    expect(block.values).toEqual(owned.get(`${block.name} ${block.start}`))
  return { logits: Float32Array.from(first.logits), loss: first.loss, gradients }
}
