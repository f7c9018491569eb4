// A full disk (F27): export and save end with ERR_NO_SPACE; the former target is intact and no temporary file is left. The disk is
// a small tmpfs where mounting is allowed, else a limit on file sizes, which the system reports in the same way.
import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { writeLlama } from './llamaFolder.js'
import { errorOf, filesOf, temporaryFolder } from './temporary.js'

const home = temporaryFolder()
const disk = join(home, 'disk')
mkdirSync(disk)
let mounted = false
try {
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk], { stdio: 'ignore' })
  mounted = true
} catch {
  // Not allowed here: the test below with a file size limit stands alone.
}
afterAll(() => {
  if (mounted) execFileSync('umount', [disk])
})
// 1.9 MB of weights; 0.2 MB of weights.
const large = writeLlama(join(home, 'large'), { hidden: 128, ffn: 512, layers: 2, vocab: 500 })
const small = writeLlama(join(home, 'small'), { hidden: 32, layers: 2 })

describe('F27: a full disk', () => {
  it.runIf(mounted)('keeps the old export and leaves nothing', async () => {
    const [ckptSmall, ckptLarge] = [join(home, 'ckpt-small'), join(home, 'ckpt-large')]
    await AutoBridge.importCkpt(small, ckptSmall)
    await AutoBridge.importCkpt(large, ckptLarge)
    const target = join(disk, 'export')
    await AutoBridge.exportCkpt(ckptSmall, target)
    const before = filesOf(disk)
    const error = await errorOf(() => AutoBridge.exportCkpt(ckptLarge, target, { overwrite: true }))
    expect(error.code).toBe('ERR_NO_SPACE')
    expect(filesOf(disk)).toEqual(before)
    expect(await errorOf(() => AutoBridge.importCkpt(large, join(disk, 'ckpt')))).toMatchObject({
      code: 'ERR_NO_SPACE',
    })
    expect(readdirSync(disk)).toEqual(['export'])
  })

  it('is told by a limit on file sizes as well', () => {
    const out = join(home, 'limited')
    const script = join(home, 'limited.mts')
    const entry = resolve(import.meta.dirname, '../../lib/bridge/autoBridge.ts')
    writeFileSync(
      script,
      `import { AutoBridge } from ${JSON.stringify(entry)}
process.on('SIGXFSZ', () => {})
const error = await AutoBridge.importCkpt(${JSON.stringify(large)}, ${JSON.stringify(out)}).catch((e) => e)
console.log(error.code)
`,
    )
    const tsx = resolve(import.meta.dirname, '../../node_modules/tsx/dist/cli.mjs')
    // 512 blocks of 1 KiB
    const result = spawnSync('bash', ['-c', `ulimit -f 512; exec "${process.execPath}" "${tsx}" "${script}"`], {
      encoding: 'utf8',
    })
    expect(result.stdout.trim()).toBe('ERR_NO_SPACE')
    expect(existsSync(out)).toBe(false)
  })
})
