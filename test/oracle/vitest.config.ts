// `npm run test:oracle`: live comparisons with the Python packages. Not part of `npm test`; one file at a time.
import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['test/oracle/**/*.test.ts'],
    pool: 'forks',
    maxWorkers: 1,
    testTimeout: 300_000,
    hookTimeout: 600_000,
    passWithNoTests: false,
    reporters: ['verbose'],
    // No test reaches a real hub.
    env: { HF_HUB_OFFLINE: '1' },
  },
})
