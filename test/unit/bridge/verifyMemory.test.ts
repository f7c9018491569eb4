// Verification holds a stretch of a parameter in memory, never a parameter: one of 400 MB stays far below 256 MiB.
import { truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { importCkpt } from '../../../lib/bridge/offline/convert.js'
import { compare } from '../../../lib/bridge/proof/compare.js'
import { verify } from '../../../lib/bridge/proof/verify.js'
import { encodeHeader } from '../../../lib/io/safetensorsHeader.js'
import { llamaTensors, writeLlama } from '../../hostile/llamaFolder.js'
import { temporaryFolder } from '../../hostile/temporary.js'

const home = temporaryFolder()

/** The most memory that `work` has above what there was before, in MiB. */
async function peakOf(work: () => Promise<unknown>): Promise<number> {
  const before = process.memoryUsage.rss()
  let most = before
  const look = setInterval(() => (most = Math.max(most, process.memoryUsage.rss())), 5)
  await work().finally(() => clearInterval(look))
  return (most - before) / 2 ** 20
}

it('verify and compare hold no parameter as a whole', async () => {
  const sizes = { layers: 1, hidden: 1024, heads: 4, kvHeads: 2, ffn: 64, vocab: 200_000, tied: true }
  const folder = writeLlama(join(home, 'big'), { ...sizes, vocab: 1, config: { vocab_size: 200_000 } })
  // Zeros that take no room: a hole in the file.
  const header = encodeHeader(llamaTensors(sizes))
  writeFileSync(join(folder, 'model.safetensors'), header.bytes)
  truncateSync(join(folder, 'model.safetensors'), header.fileBytes)
  const ckpt = join(home, 'ckpt')
  await importCkpt(folder, ckpt)
  expect(
    await peakOf(async () => expect((await verify(folder, { tensorModelParallelSize: 2 })).ok).toBe(true)),
  ).toBeLessThan(256)
  expect(await peakOf(async () => expect((await compare(folder, ckpt)).equal).toBe(true))).toBeLessThan(256)
}, 60_000)
