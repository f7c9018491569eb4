// Aborted conversions leave nothing, and conversions need memory that does not grow with the model.
import { execFileSync } from 'node:child_process'
import { existsSync, readdirSync, truncateSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { expect, it } from 'vitest'
import { exportCkpt, importCkpt } from '../../../lib/bridge/convert.js'
import { encodeHeader } from '../../../lib/io/safetensorsHeader.js'
import { llamaTensors, writeLlama } from '../../hostile/llamaFolder.js'
import { errorOf, temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()

it('an aborted import or export leaves nothing', async () => {
  const folder = writeLlama(join(home, 'hf'))
  const [ckpt, out] = [join(home, 'ckpt'), join(home, 'out')]
  expect(await errorOf(() => importCkpt(folder, ckpt, { signal: AbortSignal.abort() }))).toMatchObject({
    code: 'ERR_ABORTED',
  })
  expect(existsSync(ckpt)).toBe(false)
  await importCkpt(folder, ckpt)
  expect(await errorOf(() => exportCkpt(ckpt, out, { signal: AbortSignal.abort() }))).toMatchObject({
    code: 'ERR_ABORTED',
  })
  expect(readdirSync(home).sort()).toEqual(['ckpt', 'hf'])
})

it('importing 256 MB raises the peak by less than 48 MiB', () => {
  // Zeros that take no space on the disk stand in for weights.
  const sizes = { hidden: 2048, ffn: 5632, heads: 32, kvHeads: 4, layers: 2, vocab: 12_000 }
  const header = encodeHeader(llamaTensors(sizes))
  expect(header.fileBytes).toBeGreaterThan(256e6 * 0.9)
  const { hidden, ffn, heads, kvHeads, layers, vocab } = sizes
  const config = {
    hidden_size: hidden,
    intermediate_size: ffn,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    num_hidden_layers: layers,
    vocab_size: vocab,
  }
  writeLlama(join(home, 'described'), { layers: 0, vocab: 1, config })
  const file = join(home, 'described', 'model.safetensors')
  writeFileSync(file, header.bytes)
  truncateSync(file, header.fileBytes)
  const script = join(home, 'peak.mts')
  writeFileSync(
    script,
    `import { readFileSync } from 'node:fs'
import { importCkpt } from ${JSON.stringify(resolve(import.meta.dirname, '../../../lib/bridge/convert.ts'))}
const peak = () => Number(/VmHWM:\\s+(\\d+)/.exec(readFileSync('/proc/self/status', 'utf8'))[1]) / 1024
await importCkpt(${JSON.stringify(join(home, 'hf'))}, ${JSON.stringify(join(home, 'warm'))})
const before = peak()
await importCkpt(${JSON.stringify(join(home, 'described'))}, ${JSON.stringify(join(home, 'big'))})
console.log(peak() - before)
`,
  )
  const out = execFileSync(process.execPath, ['--import', 'tsx', script], {
    encoding: 'utf8',
    cwd: resolve(import.meta.dirname, '../../..'),
  })
  expect(Number(out)).toBeLessThan(48)
})
