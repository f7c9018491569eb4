// Aborted conversions leave nothing, and conversions need memory that does not grow with the model.
import { execFileSync } from 'node:child_process'
import { existsSync, readdirSync, statSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { expect, it } from 'vitest'
import { exportCkpt, importCkpt } from '../../../lib/bridge/offline/convert.js'
import { writeHollow, writeLlama } from '../../hostile/llamaFolder.js'
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

it('an import or export that is aborted in its midst stops there', async () => {
  const folder = writeLlama(join(home, 'long'), { layers: 40 })
  const whole = join(home, 'long-whole')
  // Folders that the conversion has to make for its target go with it.
  const [ckpt, out] = [join(home, 'made/for/ckpt'), join(home, 'made/for/out')]
  await importCkpt(folder, whole)
  const before = readdirSync(home).sort()
  for (const [convert, from, to] of [
    [importCkpt, folder, ckpt],
    [exportCkpt, whole, out],
  ] as const) {
    const controller = new AbortController()
    let [reached, total] = [0, 0]
    const onProgress = (done: number, all: number) => {
      controller.abort()
      ;[reached, total] = [done, all]
    }
    const { signal } = controller
    expect(await errorOf(() => convert(from, to, { signal, onProgress }))).toMatchObject({ code: 'ERR_ABORTED' })
    // What was in flight may end; the rest is not begun.
    expect(reached).toBeGreaterThan(0)
    expect(reached).toBeLessThan(total / 2)
  }
  expect(readdirSync(home).sort()).toEqual(before)
})

it('importing 256 MB raises the peak by less than 48 MiB', () => {
  // Zeros that take no space on the disk stand in for weights.
  const sizes = { hidden: 2048, ffn: 5632, heads: 32, kvHeads: 4, layers: 2, vocab: 12_000 }
  writeHollow(join(home, 'described'), sizes)
  expect(statSync(join(home, 'described', 'model.safetensors')).size).toBeGreaterThan(256e6 * 0.9)
  const script = join(home, 'peak.mts')
  writeFileSync(
    script,
    `import { readFileSync } from 'node:fs'
import { importCkpt } from ${JSON.stringify(resolve(import.meta.dirname, '../../../lib/bridge/offline/convert.ts'))}
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
