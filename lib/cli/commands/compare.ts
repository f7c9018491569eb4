// `viaduct compare`: a table for people, everything for programs, exit code 1 on any difference.
import { ViaductError } from '../../base/errors.js'
import { AutoBridge } from '../../bridge/autoBridge.js'
import { type ComparedTensor, type Comparison, compare } from '../../bridge/proof/compare.js'
import { type ActivationComparison, compareActivations } from '../../inference/activations.js'
import { readBatch } from '../../inference/logits.js'
import { readHostTensors } from '../../io/hostTensors.js'
import type { TokenBatch } from '../../models/batch.js'
import { mostWeightBytes } from '../layoutLogits.js'
import { byteProgress, formatBytes, print, say, styled, table } from '../terminal.js'

interface Flags {
  input?: string
  seed: number
  tolerance?: number
  activations: boolean
  json?: boolean
}

type Activations = ActivationComparison | { readonly skipped: string }

/** Rows of a table that is too long to be read are told by their number. */
const mostRows = 40

const sizeOf = (comparison: Comparison) =>
  comparison.tensors.reduce((n, { a }) => n + a.shape.reduce((m, d) => m * d, 4), 0)

async function activationsOf(
  a: string,
  b: string,
  flags: Flags,
  comparison: Comparison,
  batch: TokenBatch | null,
): Promise<Activations> {
  if (!flags.activations) return { skipped: '--no-activations' }
  for (const side of [comparison.a, comparison.b])
    if (!side.runs) return { skipped: `${side.architecture} only converts, its forward pass is not built` }
  const bytes = sizeOf(comparison)
  if (bytes > mostWeightBytes && flags.input === undefined)
    return {
      skipped: `${formatBytes(bytes)} in float32 are more than ${formatBytes(mostWeightBytes)}; --input computes them`,
    }
  try {
    const configs = await Promise.all([a, b].map(async (path) => (await AutoBridge.open(path)).transformerConfig))
    const sizes = {
      vocabSize: Math.min(...configs.map((c) => c.vocabSize)),
      maxPositionEmbeddings: Math.min(...configs.map((c) => c.maxPositionEmbeddings)),
    }
    return await compareActivations(comparison.a.folder, comparison.b.folder, sizes, {
      seed: flags.seed,
      ...(batch === null ? {} : { batch }),
      ...(flags.tolerance === undefined ? {} : { tolerance: flags.tolerance }),
    })
  } catch (error) {
    // A side that does not fit its own config computes nothing: the tensors say why. Wrong tokens are the caller's.
    if (!(error instanceof ViaductError) || error.kind !== 'input' || error.code === 'ERR_TOKEN_ID') throw error
    return { skipped: error.message }
  }
}

function tensorRow({ name, a, b, equal, difference }: ComparedTensor): (string | number)[] {
  const both = (x: string, y: string) => (x === y ? x : `${x} | ${y}`)
  const number = (value: number | null | undefined) =>
    value === null || value === undefined ? '' : value.toPrecision(3)
  return [
    name,
    both(a.dtype, b.dtype),
    both(`[${a.shape}]`, `[${b.shape}]`),
    equal ? 'equal' : (difference?.differing ?? 'shape'),
    number(difference?.maxDifference),
    number(difference?.meanDifference),
    number(difference?.relativeL2),
  ]
}

function show(comparison: Comparison, activations: Activations): void {
  const differing = comparison.tensors.filter((tensor) => !tensor.equal)
  const shown = differing.length > 0 ? differing : comparison.tensors
  const head = ['tensor', 'dtype', 'shape', 'differing', 'max abs', 'mean abs', 'relative L2']
  print(table(head, shown.slice(0, mostRows).map(tensorRow)))
  if (shown.length > mostRows) print(`... and ${shown.length - mostRows} more`)
  for (const difference of comparison.differences.slice(0, 2 * mostRows))
    say(`${styled('red', 'differs')} ${difference}`)
  if (comparison.differences.length > 2 * mostRows)
    say(`... and ${comparison.differences.length - 2 * mostRows} more differences`)
  if ('skipped' in activations) print(`activations: left out, ${activations.skipped}`)
  else {
    const { layers, firstDivergent, tolerance, batchSize, seqLength } = activations
    const rows = layers.map((l) => [
      l.place,
      l.largest.toPrecision(4),
      l.maxDifference.toExponential(2),
      l.relative.toExponential(2),
    ])
    print(`\n${table([`part, ids [${batchSize},${seqLength}]`, 'largest', 'max abs', 'relative'], rows)}`)
    if (firstDivergent === null) print(`no layer diverges by more than ${tolerance} of its largest value`)
    else print(`${styled('red', 'diverges')} first at ${firstDivergent} (more than ${tolerance} of its largest value)`)
  }
  const words = comparison.equal ? styled('green', 'equal') : styled('red', 'different')
  print(
    `${words}: ${comparison.tensors.length} tensors in both, ${differing.length} of them differ, ${comparison.onlyInA.length + comparison.onlyInB.length} in one alone, ${comparison.config.length} config fields, ${comparison.files.length} files`,
  )
}

export async function compareCommand(a: string, b: string, flags: Flags): Promise<void> {
  const batch = flags.input === undefined ? null : readBatch(await readHostTensors(flags.input), flags.input)
  const bar = byteProgress('comparing')
  const comparison = await compare(a, b, { onProgress: bar.onProgress }).finally(bar.stop)
  const activations = await activationsOf(a, b, flags, comparison, batch)
  const same = comparison.equal && ('skipped' in activations || activations.equal)
  if (!same) process.exitCode = 1
  if (flags.json) print(JSON.stringify({ ...comparison, equal: same, activations }))
  else show(comparison, activations)
}
