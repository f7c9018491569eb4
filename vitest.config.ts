// How the tests run: real processes (the addon and its ranks want one each), at most two at a time.
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { configDefaults, defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    exclude: [...configDefaults.exclude, 'test/oracle/**'],
    pool: 'forks',
    maxWorkers: 2,
    // An addon test may have to page in libraries and start ranks; a hang is a failure, not a wait.
    testTimeout: 60_000,
    hookTimeout: 60_000,
    teardownTimeout: 10_000,
    passWithNoTests: false,
    allowOnly: false,
    restoreMocks: true,
    reporters: ['default'],
    // No test reaches a real hub, and none finds what this machine's user has fetched.
    env: {
      ...{ HF_HUB_OFFLINE: '1', HF_HOME: join(tmpdir(), 'viaduct-no-hub'), HF_HUB_CACHE: '', HF_TOKEN: '' },
      // Tests that want a GPU, emulated or real, say so: the others compute on the CPU on every machine.
      VIADUCT_CUDA_PLUGIN: 'none',
    },
  },
})
