// Single ops of a training step of size (b) against their floors on this machine: the bytes that they cannot do without over the best
// rate that a copy, a read or a cast reaches, or their multiplications over the rate of matrix products, all measured in the same run.
// No peer.
import { cpuOpCases, type FloatName, type MatmulShape, matmulCase, type OpCase, type OpSizes } from '../opCases.js'
import { quantile } from '../pairs.js'
import type { Row } from '../results.js'
import type { Side } from '../side.js'
import type { BenchOptions } from './options.js'
import { rowOf, withSides } from './rows.js'

const opSizes: OpSizes = {
  batch: 4,
  seqLength: 512,
  hidden: 512,
  ffn: 1376,
  groups: 4,
  headsPerGroup: 2,
  channels: 64,
  vocabulary: 32000,
  logitRows: 2048,
  elements: 32 * 2 ** 20,
  experts: 16,
  expertFfn: 192,
  topk: 4,
}

/** Of the ceiling of products: large enough that packing is little. */
const square: MatmulShape = [2048, 2048, 2048]
/** More than any cache holds. */
const largeBytes = 2 ** 28
const leastSeconds = 0.2
/** Ops that move more than any cache holds and compute next to nothing: what they reach, others could. */
const movers = ['cast float32 to bfloat16', 'cast bfloat16 to float32']

/** Seconds of a call: the median of windows. */
async function seconds(side: Side, options: BenchOptions, command: string, args: object): Promise<number> {
  const windows: number[] = []
  for (let i = 0; i < options.pairs; i++) {
    const answer = await side.call<{ seconds: number }>(command, { device: 'cpu', leastSeconds, ...args })
    windows.push(answer.seconds)
  }
  process.stderr.write('.')
  return quantile(windows, 0.5)
}

/** What an op takes, as a multiple of its floor. */
export async function floorsSuite(options: BenchOptions): Promise<Row[]> {
  return await withSides(options, [], async ({ ours }) => {
    process.stderr.write('floors ')
    const product = async (dtype: FloatName) =>
      (matmulCase(square, dtype).flops as number) / (await seconds(ours, options, 'matmul', { shape: square, dtype }))
    const flops = { float32: await product('float32'), bfloat16: await product('bfloat16') }
    const copied = (2 * largeBytes) / (await seconds(ours, options, 'copy', { bytes: largeBytes }))
    const read = largeBytes / (await seconds(ours, options, 'read', { bytes: largeBytes }))
    const cases = cpuOpCases(opSizes)
    const op = (name: string) => seconds(ours, options, 'op', { name, sizes: opSizes })
    let best = Math.max(copied, read)
    for (const name of movers) best = Math.max(best, (cases[name] as OpCase).bytes / (await op(name)))
    const rates = `products ${(flops.float32 / 1e9).toFixed(0)} and ${(flops.bfloat16 / 1e9).toFixed(0)} GFLOP/s, copies ${(copied / 1e9).toFixed(1)} GB/s, reads ${(read / 1e9).toFixed(1)}, the best of them and of casts ${(best / 1e9).toFixed(1)} GB/s`
    process.stderr.write(` ${rates} `)
    const rows: Row[] = []
    for (const [name, { bytes, flops: operations = 0, ceiling = 'bfloat16' }] of Object.entries(cases)) {
      if (!name.includes(options.only)) continue
      const took = await op(name)
      const ofBytes = bytes / best
      const ofFlops = operations / flops[ceiling]
      const floor = Math.max(ofBytes, ofFlops)
      const figure = { value: took / floor, unit: 'times its floor' }
      const note = `${(took * 1e3).toFixed(3)} ms; floor ${(floor * 1e3).toFixed(3)} ms of ${ofFlops > ofBytes ? 'multiplications' : 'bytes'}; ${rates}`
      rows.push(await rowOf(options, { suite: 'floors', work: `op: ${name}`, peer: null, figure, note }, []))
    }
    process.stderr.write('\n')
    return rows
  })
}
