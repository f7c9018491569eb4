// Choosing among the algorithms of a product: the twin of cuBLASLt has five with times of its own, of which the second takes no call
// (native/cuda/emulation/matmul_host.h), and counts how often each is started. The emulated GPU alone.
import { execFileSync } from 'node:child_process'
import { dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { beforeAll, expect, test } from 'vitest'
import { packageRoot } from '../../lib/base/packageRoot.js'
import { gpuSetupTimeout } from './gpu.js'

const found = new Map<string, string>()

beforeAll(async () => {
  const { buildEmulated, EMULATED } = await import(pathToFileURL(join(packageRoot(), 'deploy/emulated.mjs')).href)
  await buildEmulated()
  const text = execFileSync(join(dirname(EMULATED), 'matmul_tuning'), { encoding: 'utf8', timeout: 60_000 })
  for (const [, name, starts] of text.matchAll(/^(\w+): (.*)$/gm)) found.set(name as string, (starts as string).trim())
}, gpuSetupTimeout)

// A timed algorithm is started four times, one that takes no call once; then the chosen one computes.
test.each([
  ['guess', '2 0 0 0 0', 'auto takes the first'],
  ['first', '4 1 5 4 4', 'tuned times each once and takes the fastest, of two alike the earlier'],
  ['later', '0 0 2 0 0', 'what was chosen holds'],
  ['accumulating', '4 1 6 4 4', 'timing adds nothing to y'],
  ['small', '1 0 0 0 0', 'a small product is not timed'],
  ['rowsOfTuned', '0 0 1 0 0', "rows apart have the whole product's algorithm"],
  ['rowsFirst', '1 0 0 0 0', 'rows apart are not timed'],
  ['wholeAfterRows', '1 0 0 0 0', 'and the whole product has their algorithm'],
  ['guessAgain', '1 0 0 0 0', 'auto again takes the first'],
  ['experts', '0 0 0 0 0', 'small products of experts are no products of their own'],
  ['expertsTogether', '1', 'but one launch'],
  ['expertsApart', '2 0 0 0 0', 'on streams each expert that has rows is a product'],
  ['expertsApartTogether', '0', 'and none is asked for in one launch'],
  ['expertsForced', '0 0 0 0 0', 'one launch where it is asked for'],
  ['expertsInOrder', '12 0 0 0 0', 'streams wait for what was before, and what follows for them'],
  ['expertsForcedTogether', '1', 'one launch where it is asked for'],
])('%s: %s', (name, starts) => {
  expect(found.get(name)).toBe(starts)
})
