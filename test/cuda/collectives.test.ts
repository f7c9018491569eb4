// Collectives between processes with a GPU each: the emulated one, whose NCCL is a twin over sockets, or real ones. See
// collectivesRank.ts for what is checked.
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { native } from '../../lib/addon/load.js'
import { cudaPlugin } from '../../lib/tensor/cuda.js'
import { startRanks } from '../ranks/startRanks.js'
import { gpuSetupTimeout, realGpu, useGpu } from './gpu.js'

const script = join(import.meta.dirname, 'collectivesRank.ts')
let gpus = Number.POSITIVE_INFINITY

beforeAll(async () => {
  await useGpu()
  // Each emulated GPU is its process's own; NCCL wants a real one for each rank.
  if (realGpu) gpus = native.pluginDevices(cudaPlugin() as string).devices
}, gpuSetupTimeout)

interface Report {
  readonly code: string
  readonly message: string
  readonly ms: number
  readonly later: string
}

async function reports(size: number, args: string[], env: Record<string, string> = {}): Promise<(Report | null)[]> {
  const results = await startRanks(size, script, args, { env }).results
  return results.map(({ out }) => {
    const line = out.split('\n').find((text) => text.startsWith('RESULT '))
    return line === undefined ? null : (JSON.parse(line.slice(7)) as Report)
  })
}

it.each([2])("equal the CPU's on %i ranks, in the order of streams, in parts too", async (size) => {
  if (gpus < size) return
  const results = await startRanks(size, script, ['all']).results
  for (const { rank, code, out } of results)
    expect({ rank, code, out }).toEqual({ rank, code: 0, out: expect.stringContaining('fine') })
})

describe('what the others see of a rank that', () => {
  it('never connects: its name', async () => {
    if (gpus < 2) return
    const [first] = await reports(2, ['absent', '2500'])
    expect(first).toMatchObject({
      code: 'ERR_TIMEOUT',
      message: expect.stringMatching(/group world to connect through NCCL within 2\.5 s, not heard from rank 1/),
    })
  })
})
