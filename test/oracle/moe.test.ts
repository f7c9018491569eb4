// Live parity with Transformers over freshly drawn tiny mixtures of experts: logits, loss and gradients in float32, on one rank and over
// tp, ep, etp, dp, pp. The seed is printed.
import { basename, join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { viaductJson } from '../cli/commandLine.js'
import { readSafetensorsFile } from '../fixtures/safetensorsFile.js'
import { temporaryFolder } from '../hostile/temporary.js'
import { agreement } from '../parity/resultFile.js'
import { python, runPython } from './python.js'

interface Drawn {
  readonly family: string
  readonly folder: string
  readonly width: number
  readonly num_attention_heads: number
  readonly num_key_value_heads: number
}

const seed = Number(process.env['VIADUCT_ORACLE_SEED'] ?? Math.floor(Math.random() * 1e9))
if (python !== null) process.stdout.write(`VIADUCT_ORACLE_SEED=${seed}\n`)

const folder = temporaryFolder()
const count = 4
let drawn: Drawn[] = []

/** Each as ranks of tp, ep, etp, dp. Experts are 4 or 6, widths of experts multiples of 8. */
const layouts = [
  [1, 1, 1, 1],
  [2, 1, 1, 1],
  [2, 2, 1, 1],
  [2, 1, 2, 1],
  [1, 2, 1, 2],
  [1, 2, 2, 4],
  [2, 2, 2, 2],
] as const

describe.skipIf(python === null)('Transformers', () => {
  beforeAll(() => {
    const lines = runPython('draw_moe.py', String(seed), folder, String(count)).trim().split('\n')
    drawn = lines.map((line) => JSON.parse(line) as Drawn)
  }, 120_000)

  test.each(Array.from({ length: 4 * count }, (_, i) => i))(
    'gives our logits, loss and gradients, model %i',
    async (i) => {
      const { family, folder: model, num_key_value_heads: kv } = drawn[i] as Drawn
      const expected = readSafetensorsFile(join(model, 'expected.safetensors'))
      for (const [tp, ep, etp, dp] of layouts) {
        if (kv % tp !== 0) continue
        const output = `${basename(model)}-${tp}${ep}${etp}${dp}.safetensors`
        const files = ['--input', join(model, 'in.safetensors'), '--output', output]
        const sizes = Object.entries({ tp, ep, etp, dp }).flatMap(([axis, size]) => [`--${axis}`, String(size)])
        await viaductJson(folder, ['logits', model, ...files, '--grads', '--dtype', 'float32', ...sizes])
        const { red, ...worst } = agreement(readSafetensorsFile(join(folder, output)), expected)
        expect(red, `${family} ${sizes.join(' ')}`).toEqual([])
        const figures = Object.entries(worst).map(([name, value]) => `${name} ${value.toExponential(1)}`)
        process.stdout.write(`${basename(model)} ${sizes.join(' ')}: ${figures.join(', ')}\n`)
      }
    },
  )
})
