// Tensor parallelism over real processes: the same fixtures, the same numbers as on one rank, at 2, 3 and 4 ranks, with fewer key-value
// heads than ranks and an odd vocabulary.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import { gate } from '../parity/gate.js'
import { pack, readFixture, runsOf } from '../parity/llamaLayout.js'
import type { Written } from './gptRank.js'
import { runRanks } from './startRanks.js'

const here = dirname(fileURLToPath(import.meta.url))

describe.each([
  [2, ['plain', 'tied_bias', 'full_heads', 'padded_left', 'yarn']],
  [3, ['wide_heads']],
  [4, ['plain', 'tied_bias']],
] as const)('tensor parallelism over %i ranks', (size, names) => {
  test(`${names.join(', ')} within the numbers of one rank`, async () => {
    const folder = mkdtempSync(join(tmpdir(), 'viaduct-layouts-'))
    try {
      await runRanks(size, join(here, 'gptRank.ts'), [folder, ...names])
      for (const name of names) {
        const written = Array.from(
          { length: size },
          (_, r) => JSON.parse(readFileSync(join(folder, `${name}.${r}.json`), 'utf8')) as Written,
        )
        const fixture = readFixture(name)
        for (const rank of written) {
          expect(rank.loss).toBe(written[0]!.loss)
          expect(rank.logits).toEqual(written[0]!.logits)
          expect(rank.outside).toBe(0)
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
        const report = gate(fixture, {
          logits: Float32Array.from(written[0]!.logits),
          loss: written[0]!.loss,
          gradients,
        })
        expect(report.red, name).toEqual([])
      }
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  }, 120_000)
})

/** Rows of a logical tensor: where its last block ends. */
function logicalRows(name: string, blocks: Written['blocks']): number {
  return Math.max(...blocks.filter((b) => b.name === name).map((b) => b.start[0]! + b.size[0]!))
}
