// The plan of an online export: used again beside made anew, and what binding a huge model costs.
import { alternate, type Runner } from '../alternate.js'
import { quantile } from '../pairs.js'
import type { Row } from '../results.js'
import type { BenchOptions } from './options.js'
import { rowOf, withSides } from './rows.js'

/** Time to the first tensor of an online export with a plan used again, beside planning anew; and what binding a huge model costs. */
export async function onlineSuite(options: BenchOptions): Promise<Row[]> {
  return await withSides(options, [], async ({ ours }) => {
    type Answer = { seconds: number; tensors: number } & Record<string, unknown>
    const first = (reuse: boolean) => ours.call<Answer>('export_first', { reuse })
    const runner = (reuse: boolean): Runner => ({ side: ours, run: async () => (await first(reuse)).seconds })
    const { tensors } = await first(false)
    await first(true)
    const pairs = await alternate(runner(true), [runner(false)], options.pairs, options.limitSeconds)
    const work = `export online to its first tensor, plan of ${tensors} tensors used again`
    const bound: Answer[] = []
    for (let i = 0; i < options.pairs; i++) bound.push(await ours.call<Answer>('bind_huge', {}))
    const milliseconds = bound.map(({ seconds }) => 1000 * seconds)
    const rules = {
      suite: 'online',
      work: `mapping rules of ${bound[0]?.tensors} tensors, bound and proved`,
      peer: null,
      figure: { value: quantile(milliseconds, 0.5), unit: 'ms' },
    }
    return [
      await rowOf(options, { suite: 'online', work, peer: 'planned anew' }, pairs[0] ?? []),
      await rowOf(options, rules, []),
    ]
  })
}
