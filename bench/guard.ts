// `npm run bench:guard`: a few rows of `npm run bench`, measured anew and held against the committed ratios. Nothing is kept.
import { mkdirSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { compareRows, guardTable } from './guardReport.js'
import { findPython } from './peers.js'
import { newestRows } from './results.js'
import { decodeSuite } from './suites/decode.js'
import type { BenchOptions } from './suites/options.js'
import { trainSuite } from './suites/train.js'

const usage = `npm run bench:guard -- [options]
  --pairs N       default 5
  --python PATH   default: VIADUCT_BENCH_PYTHON, else .viaduct/bench/bin/python
  --work FOLDER   models; default: a folder in the system's temporary one`

async function main(): Promise<void> {
  const text = { type: 'string' } as const
  const { values } = parseArgs({ options: { pairs: text, python: text, work: text, help: { type: 'boolean' } } })
  if (values.help) return console.log(usage)
  const pairs = Number(values.pairs ?? 5)
  if (!(Number.isInteger(pairs) && pairs >= 1))
    throw new Error(`expected --pairs with a whole number of at least 1, got ${values.pairs}`)
  const options: BenchOptions = {
    sizes: ['a'],
    dtypes: ['float32', 'bfloat16'],
    pairs,
    limitSeconds: 300,
    threads: availableParallelism(),
    python: findPython(values.python),
    work: values.work ?? join(tmpdir(), 'viaduct-bench'),
    gigabytes: 2,
    only: '',
    newTokens: 64,
  }
  mkdirSync(options.work, { recursive: true })
  const rows = [...(await trainSuite(options)), ...(await decodeSuite({ ...options, sizes: ['b'] }))]
  const compared = compareRows(rows, newestRows())
  console.log(guardTable(compared))
  if (compared.some(({ holds }) => !holds)) process.exitCode = 1
}

main().catch((error: unknown) => {
  console.error(error instanceof Error ? error.message : error)
  process.exitCode = 1
})
