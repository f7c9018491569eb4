// The GPU of the tests of this folder: emulated, built here when it is stale; with VIADUCT_TEST_GPU=1 a real one.
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { native } from '../../lib/addon/load.js'
import { packageRoot } from '../../lib/base/packageRoot.js'
import { cudaPlugin } from '../../lib/tensor/cuda.js'

/** Whether the tests run on a real GPU. */
export const realGpu = process.env.VIADUCT_TEST_GPU === '1'

/** Minutes for a first build of the emulation; give it to beforeAll. */
export const gpuSetupTimeout = 600_000

/** Makes `device: 'cuda'` the GPU of the tests. To be awaited before a device is opened. */
export async function useGpu(): Promise<void> {
  if (realGpu) {
    delete process.env.VIADUCT_CUDA_PLUGIN
    const plugin = cudaPlugin()
    if (plugin === undefined || native.pluginDevices(plugin).devices === 0)
      throw new Error('expected a GPU for VIADUCT_TEST_GPU=1, got none: see `viaduct doctor`')
    return
  }
  const { buildEmulated, EMULATED } = await import(pathToFileURL(join(packageRoot(), 'deploy/emulated.mjs')).href)
  await buildEmulated()
  process.env.VIADUCT_CUDA_PLUGIN = EMULATED
}
