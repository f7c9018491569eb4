// What every section of `npm run bench:cuda` gets: options, both sides, started again after a failure, and rows as they come. A piece
// of work that fails is a row that says so; the others go on.

import type { Sizes } from './models.js'
import { type Ceilings, type GpuRow, gpuRow, type Setting } from './rows.js'
import type { BenchSides } from './sides.js'

export interface GpuBenchOptions {
  readonly sizes: Sizes
  /** Windows of each side, alternated. */
  readonly windows: number
  /** Training steps of a window. */
  readonly steps: number
  /** Steps before the first window: compilation, plans, first touch of memory. */
  readonly warm: number
  /** Only work whose name has this in it. */
  readonly only: string
  /** No further piece of work begins after so long. */
  readonly limitSeconds: number
  /** Folder for models. */
  readonly work: string
  /** Bytes of the GPU; of it models may take `share` by the plan of ours. */
  readonly memoryBytes: number
  readonly share: number
  /** The peer's weights are bfloat16 without float32 masters, instead of float32 under autocast. */
  readonly pure: boolean
}

export class GpuBench {
  readonly rows: GpuRow[] = []
  ceilings: Ceilings
  readonly #began = performance.now()

  constructor(
    readonly options: GpuBenchOptions,
    readonly setting: Setting,
    readonly sides: BenchSides,
    ceilings: Ceilings,
    /** Called after each row, so that a run that is cut off leaves what it had. */
    private readonly save: (rows: readonly GpuRow[]) => void,
  ) {
    this.ceilings = ceilings
  }

  /** Runs one piece of work, which returns its row; a failure becomes one. */
  async row(section: string, work: string, run: () => Promise<GpuRow>): Promise<void> {
    // What shares refer to is measured whatever else is wanted.
    if (section !== 'ceilings' && !work.includes(this.options.only)) return
    process.stderr.write(`${work} `)
    try {
      if ((performance.now() - this.#began) / 1000 > this.options.limitSeconds) throw new Error('no time was left')
      this.rows.push(await run())
    } catch (error) {
      const failure = error instanceof Error ? error.message : String(error)
      process.stderr.write(`FAILED: ${failure}\n`)
      const nothing = { peer: null, ours: null, theirs: null, ceilings: this.ceilings, failure }
      this.rows.push(gpuRow(this.setting, { section, work, ...nothing }, []))
      this.sides.restart()
    }
    this.save(this.rows)
  }
}
