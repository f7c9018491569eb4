// Collectives between processes with a GPU each: the emulated one, whose NCCL is a twin over sockets, or real ones. See
// collectivesRank.ts for what is checked.
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { startRanks } from '../ranks/startRanks.js'
import { gpuSetupTimeout, mostRanks, useGpu } from './gpu.js'

const script = join(import.meta.dirname, 'collectivesRank.ts')
let ranksHere = Number.POSITIVE_INFINITY

beforeAll(async () => {
  await useGpu()
  ranksHere = mostRanks()
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

it.each([2, 4])("equal the CPU's on %i ranks, in the order of streams, in parts too", async (size) => {
  if (ranksHere < size) return
  const results = await startRanks(size, script, ['all']).results
  for (const { rank, code, out } of results)
    expect({ rank, code, out }).toEqual({ rank, code: 0, out: expect.stringContaining('fine') })
})

describe('what the others see of a rank that', () => {
  it('is killed inside of an all-reduce: its name', async () => {
    if (ranksHere < 3) return
    const [first, second, killed] = await reports(3, ['kill', '60000'])
    expect(killed).toBeNull()
    for (const report of [first, second]) {
      expect(report).toMatchObject({ code: 'ERR_COMM', later: 'ERR_COMM' })
      expect(report?.message).toMatch(/operation 3 of group world .*lost rank 2: see that rank's output/)
      expect(report?.ms).toBeLessThan(15_000)
    }
    expect(`${first?.message} ${second?.message}`).toContain('in decoder.layers.3.mlp')
  })

  it('does not come: its name and the record of operations, at the timeout', async () => {
    if (ranksHere < 3) return
    const [first, second, late] = await reports(3, ['stop', '2000'])
    expect([first?.code, second?.code]).toContain('ERR_TIMEOUT')
    for (const report of [first, second]) {
      expect(report?.message).toMatch(
        /expected all ranks in operation 3 of group world within 2\.0 s, not heard from rank 2: it is stopped/,
      )
      expect(report?.message).toMatch(
        /last operations of this rank: 0 allReduce of 2000000 bytes done, 1 allReduce of 2000000 bytes done, 2 allReduce of 2000000 bytes done, 3 allReduce of 2000000 bytes started \d\.\d s ago/,
      )
    }
    expect(late?.code).toBe('ERR_COMM')
    expect(late?.message).toMatch(/rank [01] gave up/)
  })

  it('never connects: its name', async () => {
    if (ranksHere < 2) return
    const [first] = await reports(2, ['absent', '2500'])
    expect(first).toMatchObject({
      code: 'ERR_TIMEOUT',
      message: expect.stringMatching(/group world to connect through NCCL within 2\.5 s, not heard from rank 1/),
    })
  })

  it('aborts: its reason', async () => {
    if (ranksHere < 3) return
    const [first, second, aborted] = await reports(3, ['abort', '60000'])
    expect(aborted).toMatchObject({ code: 'ERR_COMM', message: expect.stringContaining('the test says so') })
    for (const report of [first, second])
      expect(report).toMatchObject({ code: 'ERR_COMM', message: expect.stringContaining('the test says so') })
  })

  it('fails on its stream: that error', async () => {
    if (ranksHere < 2) return
    const [first, poisoned] = await reports(2, ['poison', '60000'])
    expect(poisoned?.message).toContain('a kernel failed')
    expect(first).toMatchObject({ code: 'ERR_COMM', message: expect.stringMatching(/rank 1 gave up.*a kernel failed/) })
  })

  it('calls another operation: both operations', async () => {
    if (ranksHere < 2) return
    const [first, other] = await reports(2, ['mismatch', '2500'])
    expect(`${first?.message} ${other?.message}`).toMatch(
      /expected rank 1 at operation 3 of group world with 2000000 bytes, got broadcast with 4 bytes|expected rank 0 at operation 3 of group world with 4 bytes, got broadcast with 2000000 bytes/,
    )
    expect([first?.code, other?.code]).toEqual(['ERR_COMM', 'ERR_COMM'])
  })
})
