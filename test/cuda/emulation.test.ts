// The emulation itself: kernels that are wrong on purpose are caught, each for its own fault, and right ones pass.
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
  const text = execFileSync(join(dirname(EMULATED), 'wrong_kernels'), { encoding: 'utf8', timeout: 60_000 })
  for (const [, name, error] of text.matchAll(/^(\w+): (.*)$/gm)) found.set(name as string, error as string)
}, gpuSetupTimeout)

test.each([
  ['sumWithoutBarrier', /reads 4 bytes of shared memory that .*, at wrong_kernels\.cu:\d+/],
  ['reuseWithoutBarrier', /shared memory that thread \d+ of block 0 (read|wrote), with no barrier between/],
  ['barrierInBranch', /threads wait for each other in different places: 32 at wrong_kernels\.cu:\d+ \(barrier\) 32 at/],
  ['unwrittenShared', /thread \(5, 0, 0\) .* reads 4 bytes of shared memory that no thread of the block has written/],
  ['readsPastEnd', /reads 4 bytes of device memory outside of any tensor/],
  ['writesPastEnd', /thread \(63, 0, 0\) of block \(0, 0, 0\) writes 4 bytes of device memory outside of any tensor/],
  ['misalignedPack', /uses address 4 modulo 16 for a type that wants more/],
  ['blocksShareAnElement', /device memory that thread 0 of block \d wrote, with no barrier between/],
  ['lastBlockWithoutFence', /device memory that thread 0 of block \d wrote, with no barrier between/],
  ['shuffleFromNowhere', /shuffles from a lane that does not take part/],
  ['lanesMissing', /62 at reduce\.cuh:\d+ \(within a warp\)/],
  ['warpWithoutSync', /shared memory that /],
  ['pastDynamicShared', /writes 4 bytes at byte 256 of dynamic shared memory, of which there are 256 bytes/],
  ['tooManyThreads', /cudaErrorInvalidConfiguration/],
])('%s is caught', (name, error) => {
  expect(found.get(name)).toMatch(error)
})

test.each(['sumFine', 'atomicFine', 'lastBlockFine', 'warpSyncFine'])('%s passes', (name) => {
  expect(found.get(name)).toBe('fine')
})
