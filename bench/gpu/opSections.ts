// The sections of ops: what products and copies reach, which are the ceilings, then every kernel against them.
import { alternate, type Runner } from '../alternate.js'
import { type FloatName, type MatmulShape, matmulCase, type OpCase, opCases } from '../opCases.js'
import { quantile } from '../pairs.js'
import type { Side } from '../side.js'
import type { GpuBench } from './bench.js'
import { type GpuRow, gpuRow, reached } from './rows.js'

const runner = (side: Side, command: string, args: Record<string, unknown>): Runner => ({
  side,
  run: async () => (await side.call<{ seconds: number }>(command, args)).seconds,
})

interface Work {
  readonly section: string
  readonly work: string
  readonly counts: Pick<OpCase, 'flops' | 'bytes'> & { readonly dtype?: string }
  readonly peer: string | null
  readonly note?: string
  /** Takes what the seconds of either side say about a ceiling. */
  readonly measured?: (seconds: number) => void
}

/** Windows of an op of ours, alternated with the peer's where it has one. */
async function race(bench: GpuBench, about: Work, ours: Runner | null, peer: Runner | null): Promise<GpuRow> {
  const { windows } = bench.options
  const { section, work, counts, note, measured } = about
  const alone = async (runner: Runner) => {
    const seconds: number[] = []
    for (let i = 0; i < windows; i++) seconds.push(await runner.run())
    process.stderr.write('\n')
    return quantile(seconds, 0.5)
  }
  let [own, theirs]: (number | null)[] = [null, null]
  const pairs = ours !== null && peer !== null ? ((await alternate(ours, [peer], windows, Infinity))[0] ?? []) : []
  if (pairs.length > 0) {
    own = quantile(
      pairs.map((pair) => pair.ours),
      0.5,
    )
    theirs = quantile(
      pairs.map((pair) => pair.peer),
      0.5,
    )
  } else {
    own = ours === null ? null : await alone(ours)
    theirs = peer === null ? null : await alone(peer)
  }
  for (const seconds of [own, theirs]) if (seconds !== null) measured?.(seconds)
  const { ceilings } = bench
  const figures = (seconds: number | null) => (seconds === null ? null : reached(seconds, counts, ceilings))
  const sides = { ours: figures(own), theirs: figures(theirs) }
  return gpuRow(
    bench.setting,
    { section, work, peer: about.peer, ...sides, ceilings, ...(note ? { note } : {}) },
    pairs,
  )
}

/** Products and copies of both sides; the best is the ceiling of what comes later. */
export async function ceilingSection(bench: GpuBench): Promise<void> {
  const { sizes } = bench.options
  const { ours, peer } = bench.sides
  const { leastSeconds, matmuls, copyBytes } = sizes
  const product = (dtype: string, flops: number) => (seconds: number) => {
    const { products } = bench.ceilings
    const best = Math.max(products[dtype] ?? 0, flops / seconds / 1e12)
    bench.ceilings = { ...bench.ceilings, products: { ...products, [dtype]: best } }
  }
  const section = 'ceilings'
  const one = async (shape: MatmulShape, dtype: FloatName, form: 'forward' | 'weights' = 'forward') => {
    const { flops = 0, bytes } = matmulCase(shape, dtype, form)
    const work = `product ${shape.join('×')}, ${dtype}${form === 'weights' ? ', added to float32' : ''}`
    const note = dtype === 'float32' ? 'without TF32 on both sides: ours never rounds to it' : ''
    const args = { shape, dtype, leastSeconds }
    const forward = form === 'forward'
    const about: Work = {
      section,
      work,
      counts: { flops, bytes, dtype },
      peer: forward ? 'PyTorch' : null,
      note,
      measured: product(dtype, flops),
    }
    const other = forward ? runner(peer, 'gpu_matmul', args) : null
    await bench.row(section, work, () =>
      race(bench, about, runner(ours, 'matmul', { ...args, form, device: 'cuda' }), other),
    )
  }
  for (const shape of matmuls) await one(shape, 'bfloat16')
  for (const shape of matmuls.slice(0, 2)) await one(shape, 'float16')
  for (const shape of matmuls.slice(1, 2)) await one(shape, 'float32')
  const [, second] = matmuls as readonly [MatmulShape, MatmulShape]
  await one(second, 'bfloat16', 'weights')
  const { flops = 0, bytes } = matmulCase(second, 'float32')
  const work = `product ${second.join('×')}, TF32, PyTorch alone`
  const about: Work = {
    section,
    work,
    counts: { flops, bytes, dtype: 'tf32' },
    peer: 'PyTorch',
    measured: product('tf32', flops),
  }
  await bench.row(section, work, () =>
    race(bench, about, null, runner(peer, 'gpu_matmul', { shape: second, dtype: 'tf32', leastSeconds })),
  )

  const copies = `copy of ${copyBytes} bytes`
  const faster = (seconds: number) => {
    bench.ceilings = { ...bench.ceilings, copy: Math.max(bench.ceilings.copy ?? 0, (2 * copyBytes) / seconds / 1e9) }
  }
  const counts = { bytes: 2 * copyBytes }
  const args = { bytes: copyBytes, leastSeconds }
  await bench.row(section, copies, () =>
    race(
      bench,
      { section, work: copies, counts, peer: 'PyTorch', measured: faster },
      runner(ours, 'copy', { ...args, device: 'cuda' }),
      runner(peer, 'gpu_copy', args),
    ),
  )
}

/** Every kernel. */
export async function opSection(bench: GpuBench): Promise<void> {
  const { leastSeconds, ops: sizes } = bench.options.sizes
  const { ours, peer } = bench.sides
  const section = 'ops'
  for (const [name, { flops, bytes, ceiling }] of Object.entries(opCases(sizes))) {
    const counts = { bytes, ...(flops === undefined ? {} : { flops }), ...(ceiling ? { dtype: ceiling } : {}) }
    const backward = name.endsWith('gradient')
    // Attention has the peer's beside it, which is what a model would call.
    const beside = name.startsWith('attention') && ceiling === undefined
    const other = beside ? runner(peer, 'gpu_attention', { sizes, backward, leastSeconds }) : null
    const about: Work = { section, work: name, counts, peer: beside ? 'PyTorch SDPA' : null }
    await bench.row(section, name, () =>
      race(bench, about, runner(ours, 'op', { device: 'cuda', name, sizes, leastSeconds }), other),
    )
  }
}
