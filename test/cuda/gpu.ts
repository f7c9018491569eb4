// The GPU of the tests of this folder: emulated, built here when it is stale; with VIADUCT_TEST_GPU=1 a real one.
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { native } from '../../lib/addon/load.js'
import { envFlag } from '../../lib/base/env.js'
import { packageRoot } from '../../lib/base/packageRoot.js'
import { cudaLibraryFolders, cudaPlugin } from '../../lib/tensor/cuda.js'

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

/**
 * Most ranks that can run here at once: each emulated GPU is its process's own, and of real ones NCCL wants one for each rank, unless
 * it is 2.30 or newer and NCCL_MULTI_RANK_GPU_ENABLE=1. Behind useGpu.
 */
export function mostRanks(): number {
  if (!realGpu) return Number.POSITIVE_INFINITY
  const plugin = cudaPlugin() as string
  if (!envFlag('NCCL_MULTI_RANK_GPU_ENABLE')) return native.pluginDevices(plugin).devices
  const nccl = native.pluginLibraries(plugin, cudaLibraryFolders()).find(({ name }) => name === 'NCCL')
  const [major = 0, minor = 0] = (nccl?.version ?? '').split('.').map(Number)
  if (major * 100 + minor < 230)
    throw new Error(`expected NCCL 2.30 or newer for NCCL_MULTI_RANK_GPU_ENABLE=1, got ${nccl?.version || nccl?.why}`)
  return Number.POSITIVE_INFINITY
}
