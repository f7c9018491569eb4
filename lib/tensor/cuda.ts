// Where the CUDA plug-in and NVIDIA's libraries lie, and what they find on this machine. Nothing here opens a device.
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { native } from '../addon/load.js'
import { envFlag, envInt, envText } from '../base/env.js'
import { ViaductError } from '../base/errors.js'
import { packageRoot } from '../base/packageRoot.js'

/** The plug-in's file; undefined when there is none. */
export function cudaPlugin(): string | undefined {
  const named = envText('VIADUCT_CUDA_PLUGIN')
  if (named === 'none') return undefined
  if (named !== undefined) return named
  const root = packageRoot()
  const platform = `${process.platform}-${process.arch}`
  return [join(root, 'build/cuda/libviaduct_cuda.so'), join(root, 'prebuilds', platform, 'libviaduct_cuda.so')].find(
    (file) => existsSync(file),
  )
}

/** Folders that may hold cuBLASLt, cuDNN and NCCL, best first; the loader's own places come behind. */
export function cudaLibraryFolders(): string[] {
  const named = (envText('VIADUCT_CUDA_LIBRARIES') ?? '').split(':').filter((folder) => folder !== '')
  const home = envText('CUDA_HOME')
  const toolkit = home === undefined ? [] : [join(home, 'lib64'), join(home, 'lib')]
  const wheels = join(packageRoot(), '.deps/cuda/nvidia')
  const brought = existsSync(wheels) ? readdirSync(wheels).map((name) => join(wheels, name, 'lib')) : []
  return [...named, ...toolkit, ...brought].filter((folder) => existsSync(folder))
}

/** GPUs that this process may use, of which plug-in; or why none, and what to do. */
export type CudaState =
  | { readonly plugin: string; readonly devices: number; readonly problem: null }
  | { readonly plugin: string | undefined; readonly devices: 0; readonly problem: string }

/** Looks for the plug-in and asks it. Never throws because something is missing. */
export function cudaState(): CudaState {
  const plugin = cudaPlugin()
  if (plugin === undefined) {
    const problem = 'no CUDA plug-in is built: npm run build:cuda (needs no GPU and no root)'
    return { plugin, devices: 0, problem }
  }
  try {
    const { devices, why } = native.pluginDevices(plugin)
    if (devices > 0) return { plugin, devices, problem: null }
    const problem = `no GPU can be used (${why || 'none is visible'}): check nvidia-smi and CUDA_VISIBLE_DEVICES`
    return { plugin, devices: 0, problem }
  } catch (error) {
    if (!(error instanceof ViaductError)) throw error
    return { plugin, devices: 0, problem: error.message }
  }
}

/**
 * Which of the GPUs that a process sees a local rank takes: its own, or the only one. Several ranks share GPUs where NCCL lets them.
 * @param shared - NCCL_MULTI_RANK_GPU_ENABLE.
 * @throws ERR_UNSUPPORTED when there are fewer GPUs than ranks and they are not shared.
 */
export function gpuOfRank(localRank: number, devices: number, shared: boolean): number {
  if (devices === 1) return 0
  if (localRank < devices || shared) return localRank % devices
  throw new ViaductError(
    'ERR_UNSUPPORTED',
    'device',
    `expected a GPU for each rank of this node, got ${devices} for local rank ${localRank}: start fewer ranks, or share GPUs with NCCL_MULTI_RANK_GPU_ENABLE=1 (NCCL 2.30 or newer)`,
  )
}

/**
 * Opens the GPU of this process: that of its local rank, or the only one that it sees. Returns the native index.
 * @throws ERR_UNSUPPORTED when there is none.
 */
export function openCuda(): number {
  const state = cudaState()
  if (state.problem !== null) {
    throw new ViaductError(
      'ERR_UNSUPPORTED',
      'device',
      `expected a GPU for --device cuda, got none: ${state.problem}; or take --device cpu`,
    )
  }
  const ordinal = gpuOfRank(envInt('LOCAL_RANK') ?? 0, state.devices, envFlag('NCCL_MULTI_RANK_GPU_ENABLE'))
  return native.openPlugin(state.plugin, ordinal, cudaLibraryFolders(), envInt('VIADUCT_EMULATION_SEED') ?? 1)
}
