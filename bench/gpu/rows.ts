// Rows of `npm run bench:cuda` and their table. A row is one of results.ts with the figures of a GPU beside it; the ceilings that
// shares refer to are those measured in the same run.
import type { OpTime } from '../../lib/addon/functions.js'
import { describeMachine, ownVersions } from '../machine.js'
import { type Pair, ratioOf } from '../pairs.js'
import { type Row, time } from '../results.js'
import type { DataSheet, GpuFacts, Load } from './nvidia.js'

/** What one side reached. */
export interface Reached {
  readonly seconds: number
  readonly tflops?: number
  readonly gigabytesPerSecond?: number
  readonly tokensPerSecond?: number
  /** Of the measured ceiling: of products where the row has TFLOP/s, else of copies. For a training step: MFU. */
  readonly ofCeiling?: number
  /** The same of the data sheet's figure. */
  readonly ofDataSheet?: number
  /** Most bytes in tensors, and taken from the driver, by the side's own allocator. */
  readonly peakBytes?: number
  readonly reservedBytes?: number
  /** Share of the time between two events of the GPU around each command of the compute stream: an upper bound of how busy it was. */
  readonly busyByEvents?: number
  /** By NVML, see nvidia.ts. */
  readonly load?: Load | null
  /** Slowest commands of the profiled steps, by events. */
  readonly ops?: readonly OpTime[]
}

/** What rates are held to. */
export interface Ceilings {
  /** TFLOP/s of the best matrix product of either side, by dtype. */
  readonly products: Readonly<Record<string, number>>
  /** GB/s of a copy, read and written bytes counted. */
  readonly copy: number | null
  readonly dataSheet: DataSheet | null
}

export interface GpuRow extends Row {
  readonly suite: 'cuda'
  /** The section of the run. */
  readonly section: string
  readonly ours: Reached | null
  readonly theirs: Reached | null
  readonly ceilings: Ceilings
  readonly gpu: GpuFacts | null
  /** Versions of drivers and libraries, by side. */
  readonly software: Readonly<Record<string, unknown>>
  /** Measured on an emulated GPU and a CPU, with tiny shapes: says nothing about speed. */
  readonly rehearsal: boolean
  /** Why there is no figure. */
  readonly failure?: string
}

/** What all rows of a run share. */
export interface Setting {
  readonly gpu: GpuFacts | null
  readonly software: Readonly<Record<string, unknown>>
  readonly rehearsal: boolean
  readonly threads: number
}

/** A row of one piece of work. */
export function gpuRow(
  setting: Setting,
  about: Pick<GpuRow, 'section' | 'work' | 'peer' | 'ours' | 'theirs' | 'ceilings'> &
    Partial<Pick<GpuRow, 'parity' | 'note' | 'failure'>>,
  pairs: readonly Pair[],
): GpuRow {
  return {
    suite: 'cuda',
    ...about,
    ...setting,
    pairs,
    ratio: pairs.length > 0 ? ratioOf(pairs) : null,
    at: new Date().toISOString(),
    versions: ownVersions(),
    machine: describeMachine(),
  }
}

/** Rate and shares of so many operations and bytes in so many seconds; products count where there are any. */
export function reached(
  seconds: number,
  work: { readonly flops?: number; readonly bytes?: number; readonly dtype?: string },
  ceilings: Ceilings,
): Reached {
  const bandwidth = work.bytes === undefined ? {} : { gigabytesPerSecond: work.bytes / seconds / 1e9 }
  if (work.flops !== undefined) {
    const tflops = work.flops / seconds / 1e12
    const ceiling = ceilings.products[work.dtype ?? 'bfloat16']
    // The data sheet's figure is that of 16-bit products.
    const sheet = work.dtype === 'float32' ? undefined : ceilings.dataSheet?.tflops
    return {
      seconds,
      tflops,
      ...bandwidth,
      ...(ceiling === undefined ? {} : { ofCeiling: tflops / ceiling }),
      ...(sheet === undefined ? {} : { ofDataSheet: tflops / sheet }),
    }
  }
  const rate = bandwidth.gigabytesPerSecond
  if (rate === undefined) return { seconds }
  return {
    seconds,
    ...bandwidth,
    ...(ceilings.copy === null ? {} : { ofCeiling: rate / ceilings.copy }),
    ...(ceilings.dataSheet === null ? {} : { ofDataSheet: rate / ceilings.dataSheet.gigabytesPerSecond }),
  }
}

const percent = (share: number | undefined) => (share === undefined ? '' : `${(100 * share).toFixed(0)}%`)
const gib = (bytes: number | undefined) => (bytes === undefined ? '' : `${(bytes / 2 ** 30).toFixed(1)} GiB`)
const short = (seconds: number) => (seconds < 1e-3 ? `${(seconds * 1e6).toFixed(0)} µs` : time(seconds))

const digits = (value: number) => (value < 100 ? value.toPrecision(3) : value.toFixed(0))

function rate(r: Reached | null): string {
  if (r === null) return ''
  const rates = [
    r.tokensPerSecond === undefined ? '' : `${digits(r.tokensPerSecond)} tokens/s`,
    r.tflops === undefined ? '' : `${digits(r.tflops)} TFLOP/s`,
    r.tflops !== undefined || r.gigabytesPerSecond === undefined ? '' : `${digits(r.gigabytesPerSecond)} GB/s`,
  ]
  return rates.filter(Boolean).join(', ')
}

/** Rows as a Markdown table. */
export function gpuTable(rows: readonly GpuRow[]): string {
  const head = ['work', 'ours', 'rate', 'of measured ceiling', 'of data sheet', 'peak', 'busy', 'peer', 'its rate']
  const columns = [...head, 'its peak', 'ours over peer', 'results agree']
  const lines = [`| ${columns.join(' | ')} |`, `|${columns.map(() => '---').join('|')}|`]
  for (const { work, ours, theirs, ratio, parity, failure } of rows) {
    const own = ours === null ? '' : short(ours.seconds)
    const busy = percent(ours?.busyByEvents)
    const cells = [
      work,
      own,
      rate(ours),
      percent(ours?.ofCeiling),
      percent(ours?.ofDataSheet),
      gib(ours?.peakBytes),
      busy,
    ]
    const peer = [theirs === null ? '' : short(theirs.seconds), rate(theirs), gib(theirs?.peakBytes)]
    const last = failure === undefined ? (parity ?? '') : `FAILED: ${failure.split('\n')[0]}`
    lines.push(`| ${[...cells, ...peer, ratio === null ? '' : `${ratio.median.toFixed(2)}×`, last].join(' | ')} |`)
  }
  return lines.join('\n')
}
