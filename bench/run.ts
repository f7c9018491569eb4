// `npm run bench`: alternates ours and PyTorch with Transformers, prints the table of ratios and keeps JSON in bench/results.
import { mkdirSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { findPython } from './peers.js'
import { keep, type Row, table, writeTable } from './results.js'
import { convertSuite } from './suites/convert.js'
import { decodeSuite } from './suites/decode.js'
import { floorsSuite } from './suites/floors.js'
import { loadSuite } from './suites/load.js'
import { onlineSuite } from './suites/online.js'
import { opsSuite } from './suites/ops.js'
import type { BenchOptions, DtypeName, SizeName } from './suites/options.js'
import { packedSuite } from './suites/packed.js'
import { ranksSuite } from './suites/ranks.js'
import { startSuite } from './suites/start.js'
import { trainSuite } from './suites/train.js'

const suites = {
  train: trainSuite,
  packed: packedSuite,
  decode: decodeSuite,
  convert: convertSuite,
  load: loadSuite,
  online: onlineSuite,
  ops: opsSuite,
  floors: floorsSuite,
  start: startSuite,
  ranks: ranksSuite,
}
type SuiteName = keyof typeof suites

const usage = `npm run bench -- [options]
  --suite train|packed|decode|convert|load|online|ops|floors|start|ranks
                                     default: all
  --size a|b|moe                     moe: train only; default: all (decode, ranks: b)
  --dtype float32|bfloat16           default: both
  --pairs N                          default 9
  --quick                            3 pairs, a small folder
  --gigabytes N                      size of the folder that is loaded and converted; default 2
  --only TEXT                        only work (of train, convert, ranks, floors) whose name has it in it
  --limit SECONDS                    no further pair of a row begins after this, once 3 are there; default 600
  --threads N                        default: all cores
  --python PATH                      default: VIADUCT_BENCH_PYTHON, else .viaduct/bench/bin/python
  --work FOLDER                      models and conversions; default: a folder in the system's temporary one
  --table                            only write the newest results into docs/benchmarks.md`

function oneOf<T extends string>(
  name: string,
  value: string | undefined,
  all: readonly T[],
  unset: readonly T[] = all,
): readonly T[] {
  if (value === undefined) return unset
  const found = all.find((item) => item === value)
  if (found === undefined) throw new Error(`expected --${name} ${all.join('|')}, got ${value}`)
  return [found]
}

function count(name: string, value: string | undefined, unset: number): number {
  const n = Number(value ?? unset)
  if (!(Number.isInteger(n) && n >= 1))
    throw new Error(`expected --${name} with a whole number of at least 1, got ${value}`)
  return n
}

async function main(): Promise<void> {
  const text = { type: 'string' } as const
  const flag = { type: 'boolean' } as const
  const { values } = parseArgs({
    options: {
      suite: text,
      size: text,
      dtype: text,
      pairs: text,
      limit: text,
      threads: text,
      gigabytes: text,
      only: text,
      python: text,
      work: text,
      quick: flag,
      table: flag,
      help: flag,
    },
  })
  if (values.help) {
    console.log(usage)
    return
  }
  if (values.table) {
    console.log(writeTable())
    return
  }
  const names = oneOf('suite', values.suite, Object.keys(suites) as SuiteName[])
  const base: Omit<BenchOptions, 'sizes'> = {
    dtypes: oneOf<DtypeName>('dtype', values.dtype, ['float32', 'bfloat16']),
    pairs: count('pairs', values.pairs, values.quick ? 3 : 9),
    limitSeconds: count('limit', values.limit, 600),
    threads: count('threads', values.threads, availableParallelism()),
    python: names.every((name) => ['ranks', 'floors', 'start'].includes(name)) ? '' : findPython(values.python),
    work: values.work ?? join(tmpdir(), 'viaduct-bench'),
    gigabytes: values.quick ? 0.5 : count('gigabytes', values.gigabytes, 2),
    only: values.only ?? '',
    newTokens: values.quick ? 32 : 64,
  }
  mkdirSync(base.work, { recursive: true })
  const rows: Row[] = []
  for (const name of names) {
    const isLarge = name === 'decode' || name === 'ranks'
    const known: readonly SizeName[] = name === 'train' ? ['a', 'b', 'moe'] : ['a', 'b']
    const sizes = oneOf<SizeName>('size', values.size, known, isLarge ? ['b'] : known)
    const found = await suites[name]({ ...base, sizes })
    process.stderr.write(`kept ${keep(name, found)}\n`)
    rows.push(...found)
  }
  console.log(table(rows))
}

main().catch((error: unknown) => {
  console.error(error instanceof Error ? error.message : error)
  process.exitCode = 1
})
