// Whether what is measured now is as fast as the committed results say: ratios against the same peers, row by row.
import type { Row } from './results.js'

/** Less than this share of a committed ratio is a regression. */
export const leastShare = 0.9

export interface Guarded {
  readonly work: string
  readonly peer: string
  readonly committed: number
  readonly now: number
  readonly share: number
  readonly holds: boolean
}

/** Rows of both that have a ratio. @throws when there is none: a guard that looks at nothing holds nothing. */
export function compareRows(fresh: readonly Row[], committed: readonly Row[]): Guarded[] {
  const keyOf = ({ suite, work, peer }: Row) => JSON.stringify([suite, work, peer])
  const known = new Map(committed.map((row) => [keyOf(row), row]))
  const found = fresh.flatMap((row): Guarded[] => {
    const before = known.get(keyOf(row))?.ratio
    if (row.ratio === null || !before) return []
    const [now, then] = [row.ratio.median, before.median]
    const share = now / then
    // A share that is no number holds nothing either.
    return [{ work: row.work, peer: row.peer ?? '', committed: then, now, share, holds: share >= leastShare }]
  })
  if (found.length === 0)
    throw new Error(
      'expected committed results of the measured rows in bench/results, got none: run npm run bench first',
    )
  return found
}

/** The comparison as text that aligns. */
export function guardTable(rows: readonly Guarded[]): string {
  const width = Math.max(...rows.map(({ work, peer }) => `${work}, ${peer}`.length))
  const lines = rows.map(
    ({ work, peer, committed, now, share, holds }) =>
      `${holds ? 'ok  ' : 'SLOW'}  ${`${work}, ${peer}`.padEnd(width)}  ${now.toFixed(2)}x, committed ${committed.toFixed(2)}x  ${(share * 100).toFixed(0)}%`,
  )
  const slow = rows.filter(({ holds }) => !holds).length
  const verdict =
    slow === 0
      ? `${rows.length} ratios are at least ${leastShare} of the committed ones`
      : `${slow} of ${rows.length} ratios are below ${leastShare} of the committed ones: measure again on a quiet machine, then look for the change`
  return [...lines, verdict].join('\n')
}
