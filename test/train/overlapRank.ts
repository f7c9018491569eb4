// A rank that trains each task's model with the collectives of tp behind the products and beside them: three steps of the same
// micro-batches. Rank 0 writes whether losses, norms and parameters have the same bits on all ranks, and what the streams did.
import { createHash } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import type { Span } from '../../lib/addon/functions.js'
import { native } from '../../lib/addon/load.js'
import { runConfig } from '../../lib/config/runConfig.js'
import type { DdpSection } from '../../lib/config/sections.js'
import type { TokenBatch } from '../../lib/models/batch.js'
import { GPTModelProvider, type ProviderInit } from '../../lib/models/provider.js'
import { allGatherObject } from '../../lib/parallel/collectives.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { forwardStep, setup, trainStep } from '../../lib/train/index.js'

/** What the test asks for. */
export interface OverlapTask {
  readonly model: Partial<ProviderInit>
  readonly mixedPrecision?: 'bf16_mixed'
  readonly ddp?: Partial<DdpSection>
}

/** What a run of three steps gave. */
interface Run {
  readonly losses: readonly number[]
  readonly norms: readonly number[]
  /** Of all parameters of all ranks, behind the last step. */
  readonly parameters: string
  /** Bytes handed to the group of tp, by operation, over all ranks. */
  readonly payload: Readonly<Record<string, number>>
  /** Live tensors behind each step. */
  readonly live: readonly number[]
  readonly peakMemory: number
  /** Collectives that ran on the stream of tp in the last step on rank 0, and those of them that a matrix product ran beside. */
  readonly collectives: number
  readonly besideProducts: number
}

export interface OverlapResult {
  readonly behind: Run
  readonly beside: Run
  readonly again: Run
}

const [sequences, seqLength] = [4, 288]
const tokenOf = (i: number) => (i * 7919 + (i >> 3)) % 251

function microBatches(step: number, each: number, rank: number, dp: number): TokenBatch[] {
  const rows = Array.from({ length: sequences }, (_, row) => row)
  return rows.flatMap((first) => {
    if (first % each !== 0 || (first / each) % dp !== rank) return []
    const at = (row: number, s: number) => tokenOf((step * sequences + row) * (seqLength + 1) + s)
    const grid = (shift: number) =>
      Int32Array.from({ length: each * seqLength }, (_, i) =>
        at(first + Math.floor(i / seqLength), (i % seqLength) + shift),
      )
    return [{ batchSize: each, seqLength, tokens: grid(0), labels: grid(1) }]
  })
}

const isProduct = ({ op }: Span) => op.startsWith('matmul')
const isCollective = ({ op }: Span) => ['allGather', 'allReduce', 'reduceScatter'].includes(op)

async function run({ model, mixedPrecision, ddp }: OverlapTask, tpCommOverlap: boolean): Promise<Run> {
  const world = await initDistributed()
  const pipeline = (model.pipelineModelParallelSize ?? 1) > 1
  const provider = new GPTModelProvider({
    numLayers: 2,
    hiddenSize: 64,
    ffnHiddenSize: 176,
    numAttentionHeads: 4,
    numQueryGroups: 2,
    vocabSize: 251,
    maxPositionEmbeddings: 512,
    hiddenDropout: 0.1,
    makeVocabSizeDivisibleBy: 8,
    seqLength,
    tpCommOverlap,
    ...model,
  })
  const tp = provider.tensorModelParallelSize
  const dp = world.size / (tp * provider.pipelineModelParallelSize)
  const microBatchSize = pipeline ? 1 : sequences / dp
  const config = runConfig({
    model: provider,
    mixedPrecision: mixedPrecision ?? 'fp32',
    train: { trainIters: 3, globalBatchSize: sequences, microBatchSize },
    validation: { evalInterval: null, evalIters: 0 },
    optimizer: { lr: 1e-3, minLr: 1e-3 },
    scheduler: { lrDecayStyle: 'constant', lrWarmupIters: 0 },
    dataset: { kind: 'mock' },
  })
  Object.assign(config.ddp, ddp)
  const state = await setup(config, { log: () => {} })
  const group = state.mesh.get('tp')
  const { device } = state.model
  const before = { ...group.info()?.payload }
  const reports: Awaited<ReturnType<typeof trainStep>>[] = []
  const live: number[] = []
  const streams = [device.stream, device.communication('tp')] as const
  for (let step = 0; step < 3; step++) {
    if (step === 2) for (const { id } of streams) native.startTrace(id)
    const { rank } = state.mesh.get('dp')
    reports.push(await trainStep(state, microBatches(step, microBatchSize, rank, dp), forwardStep))
    live.push(device.liveSlots())
  }
  await Promise.all(streams.map((stream) => stream.sync()))
  const [compute, comm] = streams.map(({ id }) => native.endTrace(id)) as [Span[], Span[]]
  const products = compute.filter(isProduct)
  const collectives = comm.filter(isCollective)
  const isBeside = ({ start, end }: Span) => products.some((p) => p.start < end && p.end > start)
  const hash = createHash('sha256')
  for (const [name, { data }] of state.model.namedParameters()) hash.update(name).update(await data.bytes())
  const payload: Record<string, number> = {}
  const own = Object.entries({ ...group.info()?.payload }).map(([op, n]) => [op, n - (before[op] ?? 0)] as const)
  for (const ranks of await allGatherObject(own, world.group))
    for (const [op, bytes] of ranks) payload[op] = (payload[op] ?? 0) + bytes
  await state.dispose()
  const hashes = await allGatherObject(hash.digest('hex'), world.group)
  return {
    losses: reports.map(({ loss }) => loss),
    norms: reports.map(({ gradNorm }) => gradNorm),
    parameters: hashes.join(),
    payload,
    live,
    peakMemory: Math.max(...reports.map(({ peakMemory }) => peakMemory)),
    collectives: collectives.length,
    besideProducts: collectives.filter(isBeside).length,
  }
}

const [, , argument, path] = process.argv as [string, string, string, string]
const world = await initDistributed()
const results: OverlapResult[] = []
for (const task of JSON.parse(argument) as OverlapTask[])
  results.push({ behind: await run(task, false), beside: await run(task, true), again: await run(task, true) })
if (world.rank === 0) writeFileSync(path, JSON.stringify(results))
await world.dispose()
