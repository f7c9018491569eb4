// `npm run bench:cuda`: what the CUDA backend reaches on the GPU of this machine, beside PyTorch with Transformers. Prints a table and
// keeps JSON in bench/results. With --rehearse every step runs here on the emulated GPU and the CPU, with tiny shapes.
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { packageRoot } from '../lib/base/packageRoot.js'
import { cudaState } from '../lib/tensor/cuda.js'
import { GpuBench, type GpuBenchOptions } from './gpu/bench.js'
import { decodeSection, importSection, trainSection } from './gpu/modelSections.js'
import { realSizes, rehearsalSizes } from './gpu/models.js'
import { dataSheet, describeGpu } from './gpu/nvidia.js'
import { ceilingSection, opSection } from './gpu/opSections.js'
import { type GpuRow, gpuTable } from './gpu/rows.js'
import { BenchSides } from './gpu/sides.js'
import { findPython } from './peers.js'
import { keep, resultsFolder } from './results.js'

const sections = {
  ceilings: ceilingSection,
  ops: opSection,
  train: trainSection,
  decode: decodeSection,
  import: importSection,
}
type SectionName = keyof typeof sections

const usage = `npm run bench:cuda -- [options]
  --rehearse                         every step without a GPU: emulated, with tiny shapes; says nothing about speed
  --sections ceilings,ops,train,decode,import   default: all, in this order; shares need the ceilings
  --only TEXT                        only work whose name has it in it, and the ceilings
  --windows N                        windows of each side, alternated; default 3 (rehearsal: 1)
  --steps N                          training steps of a window; default 50 (rehearsal: 1)
  --warm N                           steps before the first window; default 5 (rehearsal: 1)
  --limit SECONDS                    no further piece of work begins after this; default: none
  --share N                          share of the GPU's memory that a model may take by our plan; default 0.7
  --pure                             the peer's weights are bfloat16 without masters, instead of float32 with autocast
  --compile inductor|eager|none      torch.compile of the peer; default inductor (rehearsal: eager, which traces alone)
  --python PATH                      default: VIADUCT_BENCH_PYTHON, else .viaduct/bench/bin/python
  --work FOLDER                      models; default: a folder in the system's temporary one
  --results FOLDER                   JSON; default: bench/results (rehearsal: a temporary folder)
  --threads N                        default: all cores`

const text = { type: 'string' } as const
const flag = { type: 'boolean' } as const

function whole(name: string, value: string | undefined, unset: number): number {
  const n = Number(value ?? unset)
  if (Number.isInteger(n) && n >= 1) return n
  throw new Error(`expected --${name} with a whole number of at least 1, got ${value}`)
}

function sectionNames(value: string | undefined): SectionName[] {
  const all = Object.keys(sections) as SectionName[]
  const wanted = value === undefined ? all : value.split(',')
  for (const name of wanted)
    if (!all.some((known) => known === name)) throw new Error(`expected --sections ${all.join(',')}, got ${name}`)
  return all.filter((name) => wanted.includes(name))
}

/** What is missing here for a run on a GPU, all of it at once. */
function missing(): string[] {
  const problems: string[] = []
  const { problem } = cudaState()
  if (problem !== null) problems.push(problem)
  if (describeGpu() === null) problems.push('nvidia-smi tells of no GPU: is the driver installed and the GPU visible?')
  return problems
}

/** The emulated GPU's file, built when it is stale. */
async function emulated(): Promise<string> {
  const { buildEmulated, EMULATED } = await import(pathToFileURL(join(packageRoot(), 'deploy/emulated.mjs')).href)
  await buildEmulated()
  return EMULATED
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      ...{
        rehearse: flag,
        sections: text,
        only: text,
        windows: text,
        steps: text,
        warm: text,
        limit: text,
        share: text,
      },
      ...{ pure: flag, compile: text, python: text, work: text, results: text, threads: text, help: flag },
    },
  })
  if (values.help) return console.log(usage)
  const rehearsal = values.rehearse ?? false
  const names = sectionNames(values.sections)
  const into = resolve(
    values.results ?? (rehearsal ? mkdtempSync(join(tmpdir(), 'viaduct-rehearsal-')) : resultsFolder()),
  )
  if (rehearsal && into === resultsFolder())
    throw new Error('expected --results elsewhere than bench/results: a rehearsal is no result')
  if (!rehearsal) {
    const problems = missing()
    if (problems.length > 0)
      throw new Error(
        `[bench:cuda] expected a GPU, got none:\n  ${problems.join('\n  ')}\n` +
          'npm run bench:cuda -- --rehearse runs every step on an emulated one; docs/cuda.md says what a GPU machine needs',
      )
  }
  const python = findPython(values.python)
  const gpu = rehearsal ? null : describeGpu()
  const threads = whole('threads', values.threads, availableParallelism())
  const compile = values.compile ?? (rehearsal ? 'eager' : 'inductor')
  if (!['inductor', 'eager', 'none'].includes(compile))
    throw new Error(`expected --compile inductor|eager|none, got ${compile}`)
  const own = values.work === undefined
  const work = values.work ?? mkdtempSync(join(tmpdir(), 'viaduct-bench-cuda-'))
  const models = join(work, 'models')
  mkdirSync(models, { recursive: true })
  const emulatedMib = 512
  const share = Number(values.share ?? 0.7)
  if (!(share > 0 && share <= 1)) throw new Error(`expected --share above 0 and at most 1, got ${values.share}`)
  const options: GpuBenchOptions = {
    sizes: rehearsal ? rehearsalSizes : realSizes,
    windows: whole('windows', values.windows, rehearsal ? 1 : 3),
    steps: whole('steps', values.steps, rehearsal ? 1 : 50),
    warm: whole('warm', values.warm, rehearsal ? 1 : 5),
    only: values.only ?? '',
    limitSeconds: values.limit === undefined ? Number.POSITIVE_INFINITY : whole('limit', values.limit, 1),
    work: models,
    memoryBytes: (gpu?.memoryMib ?? emulatedMib) * 2 ** 20,
    share,
    pure: values.pure ?? false,
  }
  const sides = new BenchSides({
    threads,
    python,
    oursEnv: rehearsal ? { VIADUCT_CUDA_PLUGIN: await emulated() } : {},
    peerEnv: { PEER_DEVICE: rehearsal ? 'cpu' : 'cuda', PEER_COMPILE: compile },
  })
  let file = ''
  try {
    const software = { ours: await sides.ours.call('gpu_about'), peer: await sides.peer.call('gpu_about') }
    const setting = { gpu, software, rehearsal, threads }
    const nothing = { products: {}, copy: null, dataSheet: gpu === null ? null : dataSheet(gpu.name) }
    const bench = new GpuBench(options, setting, sides, nothing, (rows: readonly GpuRow[]) => {
      file = keep('cuda', rows, into)
    })
    for (const name of names) await sections[name](bench)
    console.log(gpuTable(bench.rows))
    console.log(`${rehearsal ? 'REHEARSAL, no figure of a GPU: ' : ''}${bench.rows.length} rows in ${file}`)
    if (bench.rows.length === 0 || bench.rows.some(({ failure }) => failure !== undefined)) process.exitCode = 1
  } finally {
    sides.restart()
    rmSync(own ? work : models, { recursive: true, force: true })
  }
}

main().catch((error: unknown) => {
  console.error(error instanceof Error ? error.message : error)
  process.exitCode = 1
})
