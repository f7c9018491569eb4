// Which rows go where, checked by moving them: every row reaches the rank of its expert, on every slice, in the experts' order, and
// comes back to its place.
import { describe, expect, it } from 'vitest'
import { type ExchangePlan, exchangePlan } from '../../../lib/parallel/expertExchange.js'

/** Rows of a rank: which expert, and a name. */
type Row = readonly [expert: number, name: string]

const random = (seed: number) => () => {
  seed = (seed * 1103515245 + 12345) % 2147483648
  return seed / 2147483648
}

describe.each([
  [1, 1, 4],
  [2, 1, 4],
  [1, 2, 3],
  [2, 2, 6],
  [4, 2, 8],
  [3, 3, 3],
])('ep %i, etp %i, %i experts', (epSize, etpSize, experts) => {
  const draw = random(epSize * 100 + etpSize * 10 + experts)
  const ranks = Array.from({ length: epSize * etpSize }, (_, rank) => rank)
  const rows = ranks.map((rank): Row[] =>
    Array.from(
      { length: rank === 1 ? 0 : Math.floor(draw() * 30) },
      (_, i) => [Math.floor(draw() * experts), `${rank}:${i}`] as const,
    ).sort(([a], [b]) => a - b),
  )
  const chosen = rows.map((own) =>
    Array.from({ length: experts }, (_, e) => own.filter(([expert]) => expert === e).length),
  )
  const place = (rank: number) => ({ ep: Math.floor(rank / etpSize), etp: rank % etpSize })
  const plans = ranks.map((rank) => exchangePlan(chosen, { ...place(rank), epSize, etpSize }))

  /** What a rank of ep receives of another, by the counts of both. */
  const received = (rank: number): Row[] => {
    const { ep, etp } = place(rank)
    return Array.from({ length: epSize }, (_, from) => from).flatMap((from) => {
      const sender = from * etpSize + etp
      const { sends } = plans[sender] as ExchangePlan
      expect(sends[ep]).toBe(plans[rank]?.receives[from])
      const begin = sends.slice(0, ep).reduce((sum, n) => sum + n, 0)
      return (rows[sender] as Row[]).slice(begin, begin + (sends[ep] as number))
    })
  }

  it('brings each row to its expert', () => {
    for (const rank of ranks) {
      const { ep } = place(rank)
      const { width, source, counts } = plans[rank] as ExchangePlan
      const gathered = Array.from({ length: etpSize }, (_, etp) => {
        const own: (Row | null)[] = received(ep * etpSize + etp)
        return [...own, ...Array<null>(width - own.length).fill(null)]
      }).flat()
      const sorted = Array.from(source, (at) => gathered[at] as Row)
      const perRank = experts / epSize
      const expected = Array.from({ length: perRank }, (_, i) => ep * perRank + i).flatMap((e) =>
        rows.flat().filter(([expert]) => expert === e),
      )
      const names = (list: readonly Row[]) => list.map(([, name]) => name).sort()
      expect(names(sorted)).toEqual(names(expected))
      expect(sorted.map(([expert]) => expert)).toEqual(expected.map(([expert]) => expert))
      expect(counts).toEqual(
        Array.from({ length: perRank }, (_, i) => sorted.filter(([e]) => e === ep * perRank + i).length),
      )
    }
  })

  it('knows the way back', () => {
    for (const { width, source, place: back, receives } of plans) {
      expect(back.length).toBe(etpSize * width)
      expect(Array.from(source, (at) => back[at])).toEqual(Array.from(source.keys()))
      expect(back.filter((row) => row >= 0).length).toBe(source.length)
      expect(receives.reduce((sum, n) => sum + n, 0)).toBeLessThanOrEqual(width)
    }
  })
})
