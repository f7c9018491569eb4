// A model made from numbers, in a layout: what the suite of ranks trains. Weights are drawn by logical place, so that every layout
// begins with the same model and no folder is needed.
import { runConfig } from '../lib/config/runConfig.js'
import type { TokenBatch } from '../lib/models/batch.js'
import { GPTModelProvider } from '../lib/models/provider.js'
import { forwardStep } from '../lib/train/forwardStep.js'
import { setup, type TrainState } from '../lib/train/state.js'
import { trainStep } from '../lib/train/step.js'

/** Widths of a model, as peer.py has them under other names. */
export interface Shape {
  readonly layers: number
  readonly hidden: number
  readonly ffn: number
  readonly heads: number
  readonly kvHeads: number
  readonly vocabulary: number
}

export interface LayoutArgs extends Record<string, unknown> {
  readonly shape: Shape
  readonly dtype: 'float32' | 'bfloat16'
  /** Tensor-parallel ranks, with sequence parallelism; the rest are data-parallel. */
  readonly tp: number
  /** Collectives of tp beside products or behind them; default: as the program decides. */
  readonly tpCommOverlap?: boolean
  /** Sequences of a step over all ranks, and tokens of each. */
  readonly batch: readonly [number, number]
  /** Of each rank. */
  readonly microBatches: number
}

let run: { readonly state: TrainState; readonly args: LayoutArgs } | null = null

/** Builds model and optimizer; every rank calls it. */
export async function loadLayout(args: LayoutArgs): Promise<object> {
  await run?.state.dispose()
  run = null
  const { shape, dtype, tp, tpCommOverlap = null, batch, microBatches } = args
  const ranks = Number(process.env['WORLD_SIZE'] ?? 1)
  const [sequences, seqLength] = batch
  const config = runConfig({
    model: new GPTModelProvider({
      numLayers: shape.layers,
      hiddenSize: shape.hidden,
      ffnHiddenSize: shape.ffn,
      numAttentionHeads: shape.heads,
      numQueryGroups: shape.kvHeads,
      vocabSize: shape.vocabulary,
      maxPositionEmbeddings: 4096,
      seqLength,
      tensorModelParallelSize: tp,
      sequenceParallel: tp > 1,
      tpCommOverlap,
    }),
    mixedPrecision: dtype === 'float32' ? 'fp32' : 'bf16_mixed',
    train: {
      trainIters: 1000,
      globalBatchSize: sequences,
      microBatchSize: sequences / (ranks / tp) / microBatches,
    },
    validation: { evalInterval: null, evalIters: 0 },
    optimizer: { lr: 1e-4, minLr: 1e-4 },
    scheduler: { lrDecayStyle: 'constant', lrWarmupIters: 0 },
    dataset: { kind: 'mock' },
  })
  run = { state: await setup(config, { log: () => {} }), args }
  return {}
}

/** One step on this rank's share of the sequences. */
export async function trainLayout({ tokens }: { tokens: number[][] }): Promise<{ seconds: number; loss: number }> {
  if (run === null) throw new Error('expected load_layout before')
  const { state, args } = run
  const { rank, size } = state.mesh.get('dp')
  const each = tokens.length / size / args.microBatches
  const batches = Array.from({ length: args.microBatches }, (_, m): TokenBatch => {
    const rows = tokens.slice((m * size + rank) * each, (m * size + rank + 1) * each)
    return {
      batchSize: each,
      seqLength: args.batch[1],
      tokens: Int32Array.from(rows.flat()),
      labels: Int32Array.from(rows.flatMap((row) => [...row.slice(1), -100])),
    }
  })
  const from = performance.now()
  const { loss } = await trainStep(state, batches, forwardStep)
  return { seconds: (performance.now() - from) / 1000, loss }
}
