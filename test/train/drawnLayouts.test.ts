// Models and layouts drawn at random: 20 steps have the losses of one rank, and a checkpoint goes on in another layout. Two small ones
// here, always the same; `npm run test:layouts` (VIADUCT_TEST_LAYOUTS=16, the number of mixed ones) draws new ones up to 8 ranks, takes
// each axis alone at 2 and 4, and 12 pairs of layouts. The seed is printed; VIADUCT_LAYOUTS_SEED gives a run again.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { alone, drawMixed, drawVariant, drawVariantOf, type Layout, randomOf, type Variant } from './drawLayout.js'
import { type PipelineTask, pipelineWork } from './pipelineRank.js'
import { expectSame } from './sameSteps.js'
import { type Step, startScript, steps } from './startRanks.js'

const wanted = Number(process.env['VIADUCT_TEST_LAYOUTS'] ?? (process.env['VIADUCT_TEST_FULL'] === '1' ? 16 : 0))
const full = wanted > 0
const seed = Number(process.env['VIADUCT_LAYOUTS_SEED'] ?? (full ? Math.floor(Math.random() * 1e9) : 15))
if (full) process.stdout.write(`VIADUCT_LAYOUTS_SEED=${seed}\n`)
const random = randomOf(seed)

const folder = mkdtempSync(join(tmpdir(), 'viaduct-drawn-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
const metricsOf = (name: string) => join(folder, `${name}.jsonl`)
const trainIters = 20
const saveInterval = 10

interface Run {
  readonly name: string
  readonly variant: Variant
  readonly layout: Layout
  /** The run whose checkpoint it goes on from. */
  readonly from?: Run
}

const runs: Run[] = []
for (let i = 0; i < (full ? wanted : 2); i++) {
  const variant = drawVariant(random)
  runs.push({ name: `mixed ${i}`, variant, layout: await drawMixed(random, variant, full ? 8 : 4) })
}
const mixed = [...runs]
if (full) for (const [name, layout] of alone) runs.push({ name, variant: await drawVariantOf(random, layout), layout })

/** What one rank does. */
const single: Layout = { ranks: 1, model: {}, microBatchSize: 2, ddp: {} }
const goOn = (from: Run, layout: Layout, name: string): Run => ({ name, variant: from.variant, layout, from })
const pairs: Run[] = []
for (const [i, from] of mixed.slice(0, full ? 12 : 1).entries()) {
  const layout = i % 6 === 5 ? single : await drawMixed(random, from.variant, full ? 8 : 4)
  pairs.push(goOn(from, layout, `${from.name} to pair ${i}`))
}
const same = mixed.slice(full ? -4 : -1).map((from) => goOn(from, from.layout, `${from.name} to itself`))

const describeRun = ({ name, variant, layout }: Run) => `${name}: ${JSON.stringify({ ...variant, ...layout })}`

function taskOf({ name, variant, layout, from }: Run): PipelineTask {
  const { model, microBatchSize, ddp, optimizer } = layout
  return {
    trainIters,
    metrics: metricsOf(name),
    model: { ...variant, ...model },
    microBatchSize,
    ddp,
    ...(optimizer ? { optimizer } : {}),
    ...(from ? { load: [join(folder, from.name), saveInterval] } : { save: join(folder, name), saveInterval }),
  }
}

const failures = new Map<string, string>()

/** Runs of so many ranks in the same processes; behind one that fails the others go on in new ones. */
async function inSameRanks(ranks: number, all: readonly Run[]): Promise<void> {
  let rest = all
  while (rest.length > 0) {
    const started = startScript('pipelineRank.ts', [JSON.stringify(rest.map(taskOf))], ranks)
    if ((await started.end) === 0) return
    const failed = Math.max(
      0,
      rest.findIndex(({ name }) => steps(metricsOf(name)).at(-1)?.step !== trainIters),
    )
    failures.set((rest[failed] as Run).name, started.lines.join('\n'))
    rest = rest.slice(failed + 1)
  }
}

async function all(of: readonly Run[]): Promise<void> {
  for (let ranks = 1; ranks <= 8; ranks++) {
    await inSameRanks(
      ranks,
      of.filter(({ layout }) => layout.ranks === ranks),
    )
  }
}

const references = new Map<string, readonly Step[]>()
/** The steps of one rank. */
async function reference(variant: Variant): Promise<readonly Step[]> {
  const name = JSON.stringify(variant)
  if (!references.has(name)) {
    const metrics = metricsOf(`one rank ${references.size}`)
    await pipelineWork({ trainIters, metrics, model: variant })
    references.set(name, steps(metrics))
    expect(steps(metrics).length).toBe(trainIters)
  }
  return references.get(name) as readonly Step[]
}

/** Its steps; throws with what the ranks said when they failed. */
function stepsOf({ name }: Run): Step[] {
  const failure = failures.get(name)
  if (failure !== undefined) throw new Error(failure)
  return steps(metricsOf(name))
}

beforeAll(async () => {
  await all(runs)
  await all([...pairs, ...same])
}, 3_000_000)

describe('20 steps have the losses of one rank', () => {
  it.each(runs.map((run) => [describeRun(run), run] as const))('%s', async (_, run) => {
    expectSame(stepsOf(run), await reference(run.variant))
  })
})

describe('a checkpoint goes on', () => {
  it.each(pairs.map((run) => [describeRun(run), run] as const))('%s', async (_, run) => {
    expectSame(stepsOf(run), (await reference(run.variant)).slice(saveInterval))
  })

  it.each(same.map((run) => [describeRun(run), run] as const))('bit for bit, %s', (_, run) => {
    const curve = (found: readonly Step[]) => found.map(({ step, loss, gradNorm }) => ({ step, loss, gradNorm }))
    expect(curve(stepsOf(run)).length).toBe(trainIters - saveInterval)
    expect(curve(stepsOf(run))).toEqual(curve(stepsOf(run.from as Run).slice(saveInterval)))
  })
})
