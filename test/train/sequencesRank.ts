// A rank that computes gradients of, and trains on, one of the forms of sequences.ts in a layout, as the JSON argument says; a list is done
// one after the other. What it found is written by rank 0.
import { readFileSync, writeFileSync } from 'node:fs'
import { native } from '../../lib/addon/load.js'
import { ViaductError } from '../../lib/base/errors.js'
import type { RunConfig } from '../../lib/config/runConfig.js'
import type { TokenBatch } from '../../lib/models/batch.js'
import { runPipeline } from '../../lib/models/pipelineRun.js'
import type { ProviderInit } from '../../lib/models/provider.js'
import type { Parameter } from '../../lib/nn/parameter.js'
import { allGatherObject, allReduce } from '../../lib/parallel/collectives.js'
import { sumSharedGradients } from '../../lib/parallel/gradientSums.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { Scope } from '../../lib/tensor/scope.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { evaluate, forwardStep, setup, type TrainState, trainStep } from '../../lib/train/index.js'
import { fixtureData } from './fixtureRun.js'
import { configOf } from './pipelineRank.js'
import { type Form, sequenceBatches } from './sequences.js'

export interface SequenceTask {
  readonly form: Form
  /** Fields of the model, its layout among them. */
  readonly model: Partial<ProviderInit>
  readonly mixedPrecision?: RunConfig['mixedPrecision']
  readonly trainIters: number
  /** Where those gradients are that this run's are compared with; one rank may write its own before. */
  readonly gradients: string
  readonly writes?: string
  /** The last rank's batches first differ from the others' in each of these ways. */
  readonly disagree?: readonly Disagreement[]
  readonly written: string
}

export type Disagreement = 'count' | 'length' | 'tokens' | 'packed'

export interface WrittenSteps {
  /** By parameter: norm of the gradient that was compared with, and of what this run's differs by. */
  readonly gradients: Readonly<Record<string, { readonly norm: number; readonly difference: number }>>
  readonly losses: readonly number[]
  readonly gradNorms: readonly number[]
  readonly tokens: readonly number[]
  readonly validation: number
  /** Live tensors after each step. */
  readonly live: readonly number[]
  /** What each rank said, for each disagreement. */
  readonly refusals: readonly (readonly string[])[]
}

/** Along which axis a parameter's copies lie that saw other tokens. */
const copiesOf = ({ shard }: Parameter) => shard.copies ?? 'dp_cp'

/** Sums over ranks, as they are behind a step's backward passes, of the gradients of the batches. */
async function gradientsOf(state: TrainState, batches: readonly TokenBatch[]): Promise<Map<Parameter, Float32Array>> {
  const { model, optimizer, rngSlot } = state
  using scope = new Scope()
  const ctx = model.ctx({ scope, rng: { seed: 1, step: 0, rngSlot } })
  const one = Tensor.full(ctx, [1], 'float32', 1)
  native.upload(ctx.stream.id, rngSlot.handle, BigInt64Array.of(1n, 0n))
  model.training = true
  optimizer.gradients.zero(ctx)
  await runPipeline(
    ctx,
    model,
    batches,
    async (inner, chunk, batch) => ({ output: (await forwardStep(inner, chunk, batch)).lossSum, seed: one }),
    { backward: true },
  )
  const found = new Map<Parameter, Float32Array>()
  for (const [, parameter] of model.namedParameters()) {
    sumSharedGradients(ctx, [parameter])
    const gradient = allReduce(ctx, parameter.mainGrad as Tensor, ctx.groups.get(copiesOf(parameter)))
    found.set(parameter, await gradient.toFloat32Array())
  }
  return found
}

/** Local and logical places of each element that a shard holds. */
function* elements({ shard }: Parameter): Generator<[local: number, logical: number]> {
  const { logicalShape, localShape, blocks } = shard
  const [columns, width] = [localShape, logicalShape].map((shape) =>
    shape.length === 1 ? 1 : (shape[1] as number),
  ) as [number, number]
  for (const { size, localStart, globalStart } of blocks) {
    for (let r = 0; r < (size[0] as number); r++)
      for (let c = 0; c < (size[1] ?? 1); c++) {
        const place = (start: readonly number[], row: number) => ((start[0] as number) + r) * row + (start[1] ?? 0) + c
        yield [place(localStart, columns), place(globalStart, width)]
      }
  }
}

/** What each parameter's gradient differs by from that of the file, over all ranks. */
async function compareGradients(
  state: TrainState,
  found: ReadonlyMap<Parameter, Float32Array>,
  path: string,
): Promise<WrittenSteps['gradients']> {
  const expected = JSON.parse(readFileSync(path, 'utf8')) as Record<string, number[]>
  const squares = [...found].map(([parameter, values]) => {
    const wanted = expected[parameter.name] as number[]
    const norm = wanted.reduce((sum, value) => sum + value * value, 0)
    let difference = 0
    for (const [local, logical] of elements(parameter))
      difference += ((values[local] as number) - (wanted[logical] as number)) ** 2
    return { name: parameter.name, norm, difference, copy: state.mesh.get(copiesOf(parameter)).rank }
  })
  const all = (await allGatherObject(squares, state.world.group)).flat()
  return Object.fromEntries(
    all.map(({ name, norm }) => {
      const sums: number[] = []
      for (const one of all.filter((other) => other.name === name))
        sums[one.copy] = (sums[one.copy] ?? 0) + one.difference
      return [name, { norm: Math.sqrt(norm), difference: Math.sqrt(Math.max(...sums)) }]
    }),
  )
}

const changed: Readonly<Record<Disagreement, (batches: TokenBatch[]) => TokenBatch[]>> = {
  count: (batches) => batches.slice(1),
  length: ([first, ...rest]) => [{ ...(first as TokenBatch), seqLength: 1, batchSize: 1 }, ...rest],
  tokens: ([first, ...rest]) => [
    { ...(first as TokenBatch), tokens: first?.tokens.map((id) => id ^ 1) as Int32Array },
    ...rest,
  ],
  packed: ([first, ...rest]) => [{ ...(first as TokenBatch), packed: false }, ...rest],
}

/** Runs it in this process, as one of the launcher's ranks or alone. */
export async function sequenceWork(task: SequenceTask): Promise<void> {
  const { form, model, trainIters, mixedPrecision = 'fp32', disagree = [] } = task
  const config = await configOf({ trainIters, model, mixedPrecision })
  const state = await setup(config, { data: fixtureData, log: () => {} })
  const { rank, size } = state.mesh.get('dp')
  const batchesOf = (step: number) => sequenceBatches(form, step, rank, size)
  try {
    const refusals: string[][] = []
    for (const way of disagree) {
      const batches = batchesOf(0)
      const own = state.world.rank === state.world.size - 1 ? changed[way](batches) : batches
      const said = await trainStep(state, own, forwardStep).then(
        () => 'nothing',
        (error: unknown) => (error instanceof ViaductError ? `${error.code} ${error.message}` : String(error)),
      )
      refusals.push(await allGatherObject(said, state.world.group))
    }
    const own = await gradientsOf(state, batchesOf(0))
    const plain = Object.fromEntries([...own].map(([{ name }, values]) => [name, [...values]]))
    if (task.writes !== undefined) writeFileSync(task.writes, JSON.stringify(plain))
    const gradients = await compareGradients(state, own, task.gradients)
    const reports: (Awaited<ReturnType<typeof trainStep>> & { live: number })[] = []
    for (let step = 0; step < trainIters; step++) {
      const report = await trainStep(state, batchesOf(step), forwardStep)
      reports.push({ ...report, live: state.model.device.liveSlots() })
    }
    const evaluation = await evaluate(state, forwardStep, batchesOf(trainIters))
    if (state.world.rank !== 0) return
    const written: WrittenSteps = {
      gradients,
      losses: reports.map(({ loss }) => loss),
      gradNorms: reports.map(({ gradNorm }) => gradNorm),
      tokens: reports.map(({ tokens }) => tokens),
      validation: evaluation?.loss as number,
      live: reports.map(({ live }) => live),
      refusals,
    }
    writeFileSync(task.written, JSON.stringify(written))
  } finally {
    await state.dispose()
  }
}

const argument = process.argv[2]
if (process.argv[1]?.endsWith('sequencesRank.ts') && argument !== undefined) {
  for (const task of JSON.parse(argument) as SequenceTask[]) await sequenceWork(task)
  await (await initDistributed()).dispose()
}
