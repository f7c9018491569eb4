// cuDNN itself makes a plan for every call that whyNotCudnn lets through, on GPUs that are not here: it compiles their kernels from
// the properties of an A100, an H100 and a B200, and none runs. Where cuDNN's wheels or the toolkit are (npm run build:cuda);
// VIADUCT_TEST_FULL=1 takes the whole table and every GPU.
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { beforeAll, describe, expect, test } from 'vitest'
import { packageRoot } from '../../lib/base/packageRoot.js'
import { taken } from './attentionCalls.js'
import { type Case, sized } from './attentionCase.js'

type Ask = (lines: readonly string[]) => string[]

/** cuDNN's properties of a GPU: NVIDIA's published numbers, under the names that cuDNN reads. */
const hopper = {
  deviceName: 'NVIDIA H100 80GB HBM3',
  deviceVer: 900,
  driverVer: 13000,
  cudaDeviceId: 0,
  pciDeviceId: 0,
  multiProcessorCount: 132,
  smClockRateKHz: 1980000,
  memClockRateKHz: 2619000,
  l2CacheSize: 52428800,
  totalGlobalMem: 85029158912,
  warpSize: 32,
  maxGridSize: [2147483647, 65535, 65535],
  maxBlockSize: [1024, 1024, 64],
  maxThreadsPerBlock: 1024,
  maxThreadsPerSM: 2048,
  maxCtasPerSM: 32,
  regsPerBlock: 65536,
  maxRegistersPerSM: 65536,
  maxSharedMemoryPerBlock: 49152,
  maxSharedMemoryPerBlockOptin: 232448,
  reservedSharedMemoryPerBlock: 1024,
  isTccDriver: 0,
  supportCoopLaunch: 1,
}
const ampere = {
  ...hopper,
  deviceName: 'NVIDIA A100-SXM4-80GB',
  deviceVer: 800,
  multiProcessorCount: 108,
  smClockRateKHz: 1410000,
  memClockRateKHz: 1593000,
  l2CacheSize: 41943040,
  maxSharedMemoryPerBlockOptin: 166912,
}
const blackwell = {
  ...hopper,
  deviceName: 'NVIDIA B200',
  deviceVer: 1000,
  multiProcessorCount: 148,
  smClockRateKHz: 1965000,
  memClockRateKHz: 3996000,
  l2CacheSize: 132644864,
  totalGlobalMem: 191513690112,
}

/** Sizes of models: training on packed tensors, a prompt behind a cache. */
const real: readonly (readonly [string, Partial<Case>])[] = [
  ['Llama 3 8B', { B: 2, S: 8192, G: 8, R: 4, D: 128, layout: 'packed' }],
  ['Llama 3 8B, tp 8', { B: 4, S: 4096, G: 1, R: 4, D: 128, layout: 'packed' }],
  ['Qwen3 30B-A3B', { S: 4096, G: 4, R: 8, D: 128, layout: 'packed' }],
  ['OLMoE', { B: 2, S: 4096, G: 16, R: 1, D: 128, layout: 'packed' }],
  ['a window of Mistral', { S: 8192, G: 8, R: 4, D: 128, window: 4096, layout: 'packed' }],
  ['16384 tokens', { S: 16384, G: 8, R: 4, D: 128, layout: 'packed' }],
  ['packed sequences', { B: 2, S: 4096, G: 8, R: 4, D: 128, firstKey: () => 0, layout: 'packed' }],
  ['latent attention', { S: 4096, G: 16, R: 1, D: 192, Dv: 128 }],
  ['a prompt behind a cache', { backward: false, B: 2, S: 512, K: 4096, offset: 3584, G: 8, R: 4, D: 128 }],
]

function line(c: Case, backward: boolean, half = false): string {
  const sizes = [c.B, c.S, c.G, c.R, c.K, c.D, c.Dv]
  const flags = [backward, half, c.layout === 'packed']
  const masks = [c.causal, c.offset, c.window, c.softcap, c.keyEnd !== null, c.firstKey !== null]
  return [...flags, ...sizes, ...masks].map(Number).join(' ')
}

const toolkit = existsSync(join(packageRoot(), '.deps/cuda/nvidia/cudnn'))
const full = process.env['VIADUCT_TEST_FULL'] === '1'

describe.skipIf(!toolkit)('plans of cuDNN', () => {
  let ask: Ask = () => []
  beforeAll(async () => {
    const { buildCudnnPlans } = await import(pathToFileURL(join(packageRoot(), 'deploy/cudnnPlans.mjs')).href)
    ask = await buildCudnnPlans()
  }, 600_000)

  const about = (gpu: typeof hopper, calls: readonly string[]) =>
    ask([`${gpu.deviceVer / 10}`, JSON.stringify(gpu), ...calls])

  test(`for an H100: sizes of models${full ? ', every call of the table' : ''}`, () => {
    const calls = [...real, ...(full ? taken : [])].flatMap(([name, changes]) => {
      const c = sized(changes)
      const passes = c.backward ? [false, true] : [false]
      return passes.map((backward) => ({ name: `${name}, ${backward ? 'backward' : 'forward'}`, c, backward }))
    })
    const halves = [false, true].map((backward) => ({
      name: 'float16',
      c: sized({ S: 40, D: 64 }),
      backward,
      half: true,
    }))
    const all = [...calls, ...halves]
    const answers = about(
      hopper,
      all.map(({ c, backward, ...rest }) => line(c, backward, 'half' in rest)),
    )
    expect(answers.length).toBe(all.length)
    // Probabilities of at most 2 GiB (attention_cut.cc), where one group has them, and what grows with the tokens alone.
    const most = 3 * 2 ** 30
    const isPlan = (text: string) => /^plan \d+ \d+$/.test(text) && Number(text.split(' ')[2]) < most
    expect(answers.flatMap((text, i) => (isPlan(text) ? [] : [`${all[i]?.name}: ${text}`]))).toEqual([])
  }, 600_000)

  test.each([
    ['an A100', ampere],
    ['a B200', blackwell],
  ])(
    'for %s: what it does not take is refused before cuDNN is asked',
    (name, gpu) => {
      const wide = sized({ S: 20, D: 136 })
      const latent = sized({ S: 20, D: 192, Dv: 128 })
      const capped = sized({ S: 20, softcap: 2 })
      const later = sized({ S: 20, firstKey: () => 3 })
      const answers = about(gpu, [
        ...[false, true].map((backward) => line(wide, backward)),
        ...[false, true].map((backward) => line(latent, backward)),
        ...[false, true].map((backward) => line(capped, backward)),
        ...[false, true].map((backward) => line(later, backward)),
        line(sized({ S: 20, D: 128 }), true),
      ])
      expect(answers.map((text) => text.replace(/^plan .*/, 'plan'))).toEqual([
        'plan',
        'refused gradients of more than 128 channels on a GPU that is no Hopper',
        'plan',
        name === 'a B200' ? 'plan' : 'refused gradients of more than 128 channels on a GPU that is no Hopper',
        'plan',
        'refused the gradient of a softcap on a GPU that is no Hopper',
        'plan',
        'refused the gradient with first keys on a GPU that is no Hopper',
        'plan',
      ])
    },
    600_000,
  )

  test.runIf(full).each([
    ['an A100', ampere],
    ['a B200', blackwell],
  ])(
    'for %s: every call of the table',
    (_, gpu) => {
      const calls = [...taken, ...real].flatMap(([, changes]) => [
        line(sized(changes), false),
        line(sized(changes), true),
      ])
      expect(about(gpu, calls).filter((text) => text.startsWith('failed'))).toEqual([])
    },
    600_000,
  )
})
