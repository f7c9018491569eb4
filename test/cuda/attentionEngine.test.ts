// Which calls of attention cuDNN takes, as a table, and that it computes them as the CPU does: how calls are cut, strides,
// scratch memory, what cuDNN leaves undefined. Under emulation its twin computes (native/cuda/emulation/attention_cudnn_host.cc).
import { beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { Device } from '../../lib/tensor/device.js'
import { taken } from './attentionCalls.js'
import { type Case, type Float, run, same, sized } from './attentionCase.js'
import { gpuSetupTimeout, realGpu, useGpu } from './gpu.js'
import { Bench } from './pair.js'

beforeAll(useGpu, gpuSetupTimeout)
beforeEach(() => engine('auto'))

function engine(name: string): void {
  native.setAttentionEngine(Device.open('cuda').index, name)
}

/** Decoding. */
const one = { S: 1, G: 2, R: 4, D: 16, backward: false } as const

const refused: readonly (readonly [RegExp, string, Partial<Case>, Float])[] = [
  [/got float32/, 'float32', { S: 5 }, 'float32'],
  [/no multiple of 8/, '12 channels', { S: 5, D: 12 }, 'bfloat16'],
  [/no multiple of 8/, '12 channels of values', { S: 5, Dv: 12 }, 'bfloat16'],
  [/address of no 16 bytes/, 'odd addresses', { S: 5, layout: 'gaps' }, 'bfloat16'],
  [/few queries over more keys/, 'decoding', { ...one, K: 70, offset: 69 }, 'bfloat16'],
  [
    /few queries over more keys/,
    'decoding, ragged',
    { ...one, B: 3, K: 40, causal: false, keyEnd: [0, 40, 13] },
    'bfloat16',
  ],
  [/first keys and ends of keys/, 'first keys and ends', { S: 7, firstKey: () => 1, keyEnd: [6] }, 'bfloat16'],
  [
    /neither at the first keys nor at the last/,
    'keys behind the queries that are seen',
    { S: 19, K: 22, offset: 7 },
    'bfloat16',
  ],
  [
    /neither at the first keys nor at the last/,
    'a window in the middle',
    { S: 19, K: 40, offset: 7, window: 5, causal: false },
    'bfloat16',
  ],
  [/ends of keys behind a cache/, 'ragged, behind a cache', { S: 19, K: 40, offset: 21, keyEnd: [20] }, 'bfloat16'],
  [
    /ends of keys and a softcap/,
    'ragged, with a softcap',
    { S: 9, causal: false, softcap: 2, keyEnd: [4] },
    'bfloat16',
  ],
  [/more queries than keys/, 'a window over fewer keys than queries', { S: 9, K: 5, window: 2 }, 'bfloat16'],
  [/gradients of keys that none sees/, 'backward, late keys unseen', { S: 19, K: 30 }, 'bfloat16'],
  [
    /gradients of keys that none sees/,
    'backward, early keys unseen',
    { S: 19, K: 40, offset: 21, window: 5 },
    'bfloat16',
  ],
  [/gradient of one query and one key/, 'backward of one query and one key', { S: 1 }, 'bfloat16'],
  [/nothing to compute/, 'no keys', { S: 3, K: 0, causal: false }, 'bfloat16'],
]

describe('calls that cuDNN takes', () => {
  test.each(taken)('%s', async (_, changes) => {
    const hopper = /compute capability 9\./.test(Device.open('cuda').info.description)
    engine(hopper ? 'cudnn' : 'auto') // others lack some gradients
    await same(sized(changes), 'bfloat16', { hardwareTanh: realGpu })
  })

  test('gradients whose bits need not be equal', async () => {
    const device = Device.open('cuda')
    native.allowNondeterministic(device.index, true)
    try {
      engine('cudnn')
      for (const changes of [
        { B: 2, S: 70, G: 2, R: 2, D: 16, layout: 'packed', window: 33 },
        { S: 40, R: 17 }, // of whose probabilities the deterministic pass would keep too much, emulated
      ] as const)
        await same(sized(changes), 'bfloat16')
    } finally {
      native.allowNondeterministic(device.index, false)
    }
  })

  test('equal inputs give equal bits', async () => {
    engine('cudnn')
    const bench = new Bench(Device.open('cuda'))
    const c = sized({ B: 2, S: 70, G: 2, R: 2, D: 16, layout: 'packed', window: 33 })
    const first = await run(bench, c, 'bfloat16')
    const second = await run(bench, c, 'bfloat16')
    bench.close()
    expect(second).toEqual(first)
  })

  test('scratch memory comes back', async () => {
    engine('cudnn')
    const device = Device.open('cuda')
    const blocks = async () => {
      const bench = new Bench(device)
      await run(bench, sized({ B: 2, S: 20, R: 2, keyEnd: [3, 20] }), 'bfloat16')
      bench.close()
      await device.stream.sync()
      return device.memory().liveBlocks
    }
    const before = await blocks()
    expect(await blocks()).toBe(before)
  })
})

describe('calls that own kernels compute', () => {
  test.each(refused)('%s: %s', async (why, _, changes, dtype) => {
    const c = sized(changes)
    engine('cudnn')
    const bench = new Bench(Device.open('cuda'))
    // The forward pass of what only the backward pass lacks is cuDNN's.
    await expect(run(bench, c, dtype)).rejects.toThrow(why)
    bench.close()
    engine('auto')
    await same(c, dtype)
  })
})

// Of a real GPU the bound is 2 GiB.
test.skipIf(realGpu)('a gradient with too many probabilities of one group is refused', async () => {
  engine('cudnn')
  const bench = new Bench(Device.open('cuda'))
  const large = sized({ S: 40, R: 17 })
  await run(bench, { ...large, backward: false }, 'bfloat16')
  await expect(run(bench, large, 'bfloat16')).rejects.toThrow(/more than 262144 bytes of probabilities of a group/)
  bench.close()
})

test('auto takes cuDNN where it takes the call', async () => {
  const bits = async (name: string, c: Case) => {
    engine(name)
    const bench = new Bench(Device.open('cuda'))
    const results = await run(bench, c, 'bfloat16')
    bench.close()
    return results
  }
  const c = sized({ B: 2, S: 90, R: 2, D: 32 })
  expect(await bits('auto', c)).toEqual(await bits('cudnn', c))
  expect(await bits('auto', c)).not.toEqual(await bits('own', c)) // which round probabilities to nothing
})

test('engines by name', () => {
  const cuda = Device.open('cuda')
  expect(cuda.info.description).toMatch(
    realGpu ? /attention by cuDNN 9\.\d+\.\d+, else own/ : /attention by plain loops/,
  )
  engine('own')
  expect(cuda.info.description).toMatch(/attention by own kernels$/)
  expect(() => engine('flash')).toThrow(/expected engine auto, cudnn or own, got flash/)
  const cpu = Device.open('cpu')
  native.setAttentionEngine(cpu.index, 'auto')
  expect(() => native.setAttentionEngine(cpu.index, 'cudnn')).toThrow(/expected attention engine auto/)
})
