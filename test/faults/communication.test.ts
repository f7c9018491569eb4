// What ranks see when one of them dies, stops, aborts, fails, or runs another program: an error that names it, in time.
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { startRanks } from '../ranks/startRanks.js'

const script = join(import.meta.dirname, 'faultRank.ts')

interface Report {
  readonly code: string
  readonly message: string
  readonly ms: number
  readonly later: string
}

async function reports(size: number, args: string[], transport: string, only?: number[]): Promise<(Report | null)[]> {
  const options = { env: { VIADUCT_TRANSPORT: transport }, ...(only === undefined ? {} : { only }) }
  const results = await startRanks(size, script, args, options).results
  return results.map(({ out }) => {
    const line = out.split('\n').find((text) => text.startsWith('RESULT '))
    return line === undefined ? null : (JSON.parse(line.slice(7)) as Report)
  })
}

describe.each(['auto', 'gloo'])('over %s', (transport) => {
  it('a killed rank is named at once', async () => {
    const [first, second, killed] = await reports(3, ['kill', '30000'], transport)
    expect(killed).toBeNull()
    for (const report of [first, second]) {
      expect(report).toMatchObject({ code: 'ERR_COMM', message: expect.stringMatching(/rank 2/), later: 'ERR_COMM' })
      // 300 ms until it dies; the rest is noticing, on a machine with other work.
      expect(report?.ms).toBeLessThan(5000)
    }
  })

  it('a rank that does not come is named at the timeout', async () => {
    const [first, second, late] = await reports(3, ['stop', '1000'], transport)
    expect([first?.code, second?.code]).toContain('ERR_TIMEOUT')
    for (const report of [first, second]) {
      expect(report?.message).toMatch(/operation \d+ of group world/)
      expect(report?.message).toMatch(/not heard from rank 2\b|gave up.*not heard from rank 2\b|lost rank [01]/)
      expect(report?.ms).toBeLessThan(10_000)
    }
    expect(late).toMatchObject({ code: 'ERR_COMM' })
  })
})

describe('over shared memory', () => {
  it('an abort reaches the others with its reason', async () => {
    const [first, second, aborted] = await reports(3, ['abort', '30000'], 'auto')
    expect(aborted).toMatchObject({ code: 'ERR_COMM', message: expect.stringContaining('the test says so') })
    for (const report of [first, second]) {
      expect(report).toMatchObject({
        code: 'ERR_COMM',
        message: expect.stringMatching(/rank 2 gave up.*the test says so/),
      })
      expect(report?.ms).toBeLessThan(5000)
    }
  })

  it('a failed stream aborts its communicators, so that peers fail with its error', async () => {
    const [first, poisoned] = await reports(2, ['poison', '30000'], 'auto')
    expect(poisoned?.message).toContain('a kernel failed')
    expect(first).toMatchObject({ code: 'ERR_COMM', message: expect.stringMatching(/rank 1 gave up.*a kernel failed/) })
  })

  it('another operation on one rank is an error that names both', async () => {
    const [first, other] = await reports(2, ['mismatch', '5000'], 'auto')
    expect(first).toMatchObject({ code: 'ERR_COMM', message: expect.stringMatching(/expected rank 1 .*got broadcast/) })
    expect(other).toMatchObject({ code: 'ERR_COMM' })
  })

  it('a slow rank is no fault', async () => {
    expect(await reports(2, ['late', '30000'], 'auto')).toEqual([{ ok: true }, { ok: true }])
  })
})

it('a rank that never starts is named by those that wait for it', async () => {
  const [first, second] = await reports(3, ['missing', '2500'], 'auto', [0, 2])
  for (const report of [first, second]) {
    expect(report).toMatchObject({
      code: 'ERR_TIMEOUT',
      message: expect.stringMatching(/expected 3 ranks.*not heard from rank 1:/),
    })
  }
})
