// What one training step hands to each group's collectives, beside the textbook's count. As counted by native code: a gather counts the
// part that a rank gives, a reduction the whole tensor; here both are summed over all ranks.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { ProviderInit } from '../../lib/models/provider.js'
import { type CpCommType, contextSizes, parallelOf } from '../../lib/parallel/config.js'
import type { Payload } from './bytesRank.js'
import type { PipelineTask } from './pipelineRank.js'
import { startScript } from './startRanks.js'

const folder = mkdtempSync(join(tmpdir(), 'viaduct-bytes-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const tp2 = { tensorModelParallelSize: 2 }
const sp2 = { ...tp2, sequenceParallel: true }
const pp2 = { pipelineModelParallelSize: 2 }
const vpp2 = { ...pp2, virtualPipelineModelParallelSize: 2 }
const cp = (contextParallelSize: number, cpCommType: CpCommType) => ({ contextParallelSize, cpCommType })
const experts = { numMoeExperts: 8, moeRouterTopk: 2, moeFfnHiddenSize: 48 }
const ep = (expertModelParallelSize: number) => ({ ...experts, expertModelParallelSize })
const shared = { moeSharedExpertIntermediateSize: 40, moeSharedExpertGate: true }
const padded = { moeExpertCapacityFactor: 1.25, moePadExpertInputToCapacity: true }
const latent = { moeLatentSize: 24 }
const gathered = { moeTokenDispatcherType: 'allgather' } as const
const tied = { shareEmbeddingsAndOutputWeights: true }
const whole = { useDistributedOptimizer: false, overlapParamGather: false }
const fsdp = { useMegatronFsdp: true }
const kept = { ...fsdp, reshardAfterForward: false }

const full = { recomputeGranularity: 'full', recomputeNumLayers: 2 } as const
const selective = (...recomputeModules: ('core_attn' | 'layernorm' | 'mlp')[]) =>
  ({ recomputeGranularity: 'selective', recomputeModules }) as const

type Row = readonly [name: string, model: Partial<ProviderInit>, ddp?: PipelineTask['ddp']]

/** By number of ranks; what the sizes leave is data parallelism. */
const table: Readonly<Record<number, readonly Row[]>> = {
  2: [
    ['tp 2', tp2],
    ['tp 2 with sp', sp2],
    ['dp 2, sharded', {}, { bucketSize: 20_000 }],
    ['dp 2', {}, whole],
    ['fsdp 2', {}, fsdp],
    ['fsdp 2, weights stay, tied', tied, kept],
    ['fsdp 2, full recompute', full, fsdp],
    ['fsdp over cp 2', cp(2, 'p2p'), fsdp],
    ['fsdp 2, ep 2', ep(2), fsdp],
    ['pp 2', pp2],
    ['pp 2, vpp 2, tied', { ...vpp2, ...tied }],
    ['cp 2', cp(2, 'p2p')],
    ['cp 2, core_attn again', { ...cp(2, 'p2p'), ...selective('core_attn') }],
    ['cp 2, gathered', cp(2, 'all_gather')],
    ['cp 2 by heads', cp(2, 'a2a')],
    ['ep 2', ep(2)],
    ['ep 2, shared experts', { ...ep(2), ...shared }],
    ['tp 2 with sp, shared experts', { ...experts, ...shared, ...sp2, expertTensorParallelSize: 1 }],
    ['ep 2, padded experts', { ...ep(2), ...padded }],
    ['ep 2, latent experts', { ...ep(2), ...latent }],
    ['ep 2, latent and shared experts, gathered', { ...ep(2), ...latent, ...shared, ...gathered }],
    ['ep 2, gathered', { ...ep(2), ...gathered }],
    ['ep 2, experts again', { ...ep(2), recomputeGranularity: 'selective', recomputeModules: ['moe'] }],
    ['tp 2, full recompute', { ...tp2, ...full }],
    ['tp 2 with sp, full recompute', { ...sp2, ...full }],
    ['tp 2 with sp, mlp again', { ...sp2, ...selective('mlp') }],
    ['tp 2 with sp, core_attn and layernorm again', { ...sp2, ...selective('core_attn', 'layernorm') }],
  ],
  4: [
    ['dp 4, sharded', {}],
    ['dp 4, sharded, unequal buckets', {}, { bucketSize: 5000 }],
    ['fsdp 4, tied', tied, fsdp],
    ['fsdp 4, ep 2', ep(2), fsdp],
    ['fsdp 2, tp 2 with sp', sp2, fsdp],
    ['tp 4, 2 kv heads', { tensorModelParallelSize: 4 }],
    ['tp 4 with sp, 2 kv heads', { ...sp2, tensorModelParallelSize: 4 }],
    ['tp 2 with sp, dp 2, sharded', sp2],
    ['tp 2 with sp, pp 2, zb-h1, tied', { ...sp2, ...pp2, ...tied, pipelineSchedule: 'zb-h1' }],
    ['tp 2, pp 2', { ...tp2, ...pp2 }],
    ['pp 2, vpp 2, dp 2', vpp2],
    ['ep 2, dp 4', ep(2)],
    ['ep 4', ep(4)],
    ['ep 2, etp 2, gathered', { ...ep(2), ...gathered, expertTensorParallelSize: 2 }],
    // Every expert has all tokens: as many rows on each rank, whatever the router says.
    ['ep 2, etp 2, all experts', { ...ep(2), moeRouterTopk: 8, expertTensorParallelSize: 2 }],
    ['etp 4, all experts', { ...ep(1), moeRouterTopk: 8, expertTensorParallelSize: 4 }],
    ['ep 2, pp 2', { ...ep(2), ...pp2 }],
    ['cp 4', cp(4, 'p2p')],
    ['cp 4 by heads and ring', { ...cp(4, 'a2a+p2p'), hierarchicalContextParallelSizes: [2, 2] }],
    ['cp 2, tp 2 with sp', { ...cp(2, 'p2p'), ...sp2 }],
    ['cp 2, dp 2', cp(2, 'p2p')],
    ['cp 2, gathered, pp 2', { ...cp(2, 'all_gather'), ...pp2 }],
  ],
  8: [
    ['tp 2 with sp, pp 2, dp 2, full recompute', { ...sp2, ...pp2, ...full }],
    ['tp 2, pp 2, vpp 2, tied, dp 2', { ...tp2, ...vpp2, ...tied }, { bucketSize: 20_000 }],
    ['tp 4 with sp, 2 kv heads, dp 2', { ...sp2, tensorModelParallelSize: 4 }],
    ['tp 4 with sp, 2 kv heads, fsdp 2', { ...sp2, tensorModelParallelSize: 4 }, fsdp],
  ],
}
// Eight ranks take their time to start.
const sizes = Object.keys(table).filter((ranks) => Number(ranks) < 8 || process.env['VIADUCT_TEST_FULL'] === '1')

// The fixture's steps, and the model of pipelineRank.ts.
const [sequences, T, H, layers, vocab] = [8, 32, 64, 4, 131]
const [heads, kvHeads, headSize, ffn] = [4, 2, 16, 112]
const float = 4

/** Of attention that sees the tokens of other ranks of cp. A group that is also dp_cp goes by that name. */
function contextBytes(model: Partial<ProviderInit>, dp: number): Record<string, Record<string, number>> {
  const { contextParallelSize: cp, tensorModelParallelSize: tp } = parallelOf(model)
  if (cp === 1) return {}
  const { heads: exchanging, ring } = contextSizes(parallelOf(model))
  const tokens = layers * sequences * T * headSize * float
  const [q, kv] = [heads * tokens, 2 * Math.max(kvHeads, tp) * tokens]
  const again = model.recomputeModules?.includes('core_attn') ? 1 : 0
  const name = (axis: string, size: number) => (dp === 1 && size === cp ? 'dp_cp' : axis)
  return {
    // Forward queries, keys and values one way and the output back; backwards the output and its gradient, and their gradients back.
    ...(exchanging > 1 && { [name('cp_heads', exchanging)]: { allToAll: 2 * (q + kv) + 3 * q } }),
    // Keys and values go round in each pass; backwards sums of their gradients also come home.
    ...(ring > 1 && { [name('cp_ring', ring)]: { pointToPoint: ((2 + again) * (ring - 1) + ring) * kv } }),
    ...(exchanging * ring === 1 && { [name('cp', cp)]: { allGather: 2 * kv, reduceScatter: cp * kv } }),
  }
}

/** How often a step sums gradients, and gathers weights of a layer and of the ends, over data-parallel ranks. */
interface Sharing {
  readonly sums: number
  readonly gathers: { readonly layer: number; readonly embedding: number; readonly head: number }
}

/** The sharded optimizer once a step. Fully sharded, each micro-batch: forward, and where weights do not stay backward again. */
function sharingOf(model: Partial<ProviderInit>, ddp: PipelineTask['ddp'], microBatches: number): Sharing {
  if (ddp?.useMegatronFsdp !== true) return { sums: 1, gathers: { layer: 1, embedding: 1, head: 1 } }
  const stays = ddp.reshardAfterForward === false
  // Of a group that runs again each layer is needed for that, and but for the last one once more.
  const group = model.recomputeGranularity === 'full' ? (model.recomputeNumLayers ?? 1) : null
  const layer = stays ? 1 : group === null ? 2 : 1 + (2 * group - 1) / group
  // The head stays from the end of the forward pass; tied, it is needed at the beginning too.
  const head = model.shareEmbeddingsAndOutputWeights && !stays ? 2 : 1
  const each = (times: number) => times * microBatches
  return { sums: microBatches, gathers: { layer: each(layer), embedding: each(1), head: each(head) } }
}

/** Of experts spread over ep, where rows are gathered also over etp: rows, how many go where, gradients and parameters of the ranks that hold the same ones. */
function expertBytes(
  ranks: number,
  model: Partial<ProviderInit>,
  dp: number,
  { sums, gathers: gathersOf }: Sharing,
): Record<string, Record<string, number>> {
  const { numMoeExperts: E, moeRouterTopk: K = 0, moeFfnHiddenSize: F, expertModelParallelSize: size = 1 } = model
  if (!E || !F) return {}
  const copies = ranks / (model.pipelineModelParallelSize ?? 1) / size / (model.expertTensorParallelSize ?? 1)
  const width = model.moeLatentSize ?? H
  // Of a micro-batch, which is one sequence.
  const capacity = Math.ceil(((T * K) / E) * (model.moeExpertCapacityFactor ?? 1))
  const chosen = model.moePadExpertInputToCapacity ? E * capacity : T * K
  const rows = layers * sequences * chosen * width * float
  const again = model.recomputeModules?.includes('moe') ? 1 : 0
  const matrices = layers * E * 3 * F * width * float
  // And how many micro-batches each rank has, or of which sizes.
  const count = sequences / dp
  const gathers = model.moeTokenDispatcherType === 'allgather'
  const pads = model.moePadExpertInputToCapacity === true
  const said = JSON.stringify([gathers || pads ? Array(count).fill([1, T]) : count])
  const etp = model.expertTensorParallelSize ?? 1
  const holders = size * etp
  const [tokens, choices] = [layers * sequences * T * width * float, layers * sequences * T * K * float]
  // Tokens, choices and their weights; backwards the gradient of the sum. Or how many rows go where, unless all ranks know.
  const shared = gathers
    ? { allGather: 2 * tokens + 2 * choices, reduceScatter: holders * (2 * tokens + choices) }
    : { allGather: pads ? 0 : (1 + again) * layers * sequences * E * float }
  // There and back, and both gradients; over etp gathered there, summed on the way back.
  const exchanged = { allToAll: (4 + 2 * again) * rows }
  const slices = { allGather: (2 + again) * rows, reduceScatter: (2 + again) * etp * rows }
  // All data-parallel ranks of a stage are also those of ep, or of ep and etp: one group.
  const name = (axis: string, ranksOf: number) => (ranksOf === dp ? 'dp_cp' : axis)
  return together(
    holders > 1 ? { [name('ep', holders)]: { ...shared, gatherBytes: said.length * ranks } } : {},
    size > 1 && !gathers ? { [name('ep', size)]: exchanged } : {},
    etp > 1 && !gathers ? { [name('etp', etp)]: slices } : {},
    // Without dp and cp the ranks of tp are those with the same experts.
    copies > 1
      ? {
          [copies === model.tensorModelParallelSize ? 'tp' : 'edp']: {
            reduceScatter: sums * matrices * copies,
            allGather: gathersOf.layer * matrices,
          },
        }
      : {},
  )
}

/** The same groups' bytes together. */
function together(...all: readonly Readonly<Record<string, Readonly<Record<string, number>>>>[]) {
  const sum: Record<string, Record<string, number>> = {}
  for (const [group, ops] of all.flatMap((one) => Object.entries(one)))
    for (const [op, bytes] of Object.entries(ops)) {
      sum[group] ??= {}
      sum[group][op] = (sum[group][op] ?? 0) + bytes
    }
  return sum
}

/** Bytes by group and operation of one step with micro-batches of one sequence, summed over ranks. */
function textbook(ranks: number, model: Partial<ProviderInit>, ddp: PipelineTask['ddp']) {
  const { tensorModelParallelSize: tp = 1, pipelineModelParallelSize: pp = 1 } = model
  const cp = model.contextParallelSize ?? 1
  const dp = ranks / (tp * pp * cp)
  const sp = model.sequenceParallel === true
  const hidden = sequences * T * H * float
  const paddedVocab = Math.ceil(vocab / (128 * tp)) * 128 * tp
  // Sums of a layer that run again: all that its forward pass has, or that of the feed-forward part.
  const modules = model.recomputeGranularity === 'selective' ? (model.recomputeModules ?? []) : []
  const again = model.recomputeGranularity === 'full' ? 2 : modules.includes('mlp') ? 1 : 0
  // Forward each block shares out two sums and backward two more; the embedding and the output layer have one each. With sequence
  // parallelism a sum is a reduce-scatter, and its conjugate a gather; the inputs of linears are gathered again for their weights.
  const sums = ((4 + again) * layers + 2) * hidden * tp
  const gathers = ((6 + again) * layers + 3) * hidden
  const lossStatistics = sequences * 3 * T * float * tp
  const sharing = sharingOf(model, ddp, sequences / dp)
  const ofNorm = H * float * tp * dp * cp
  const { numMoeExperts: E = 0, moeSharedExpertIntermediateSize: S = 0, moeSharedExpertGate: gate } = model
  // Of routers, shared experts' gates and projections to a width of the experts, which all ranks of tp have.
  const ofRouter = ((E ?? 0) + (gate ? 1 : 0) + 2 * (model.moeLatentSize ?? 0)) * ofNorm
  const norms = (2 * layers + 1) * ofNorm + layers * ofRouter
  // Where there are fewer key-value heads than ranks, each rank has a copy of one, and copies sum their gradients.
  const keyHeads = Math.max(kvHeads, tp)
  const feedForward = H * 3 * (E ? (S ?? 0) : ffn)
  const block = H * headSize * (2 * heads + 2 * keyHeads) + feedForward
  const copies = keyHeads > kvHeads ? layers * 2 * keyHeads * headSize * H * float * dp * cp : 0
  const isTied = model.shareEmbeddingsAndOutputWeights === true
  const vocabulary = paddedVocab * H * float * dp * cp
  const ofLayer = block * float * dp * cp + 2 * ofNorm + ofRouter
  const embedding = isTied && pp === 1 ? 0 : vocabulary
  const gradients = layers * ofLayer + embedding + vocabulary + ofNorm
  const { layer, embedding: first, head } = sharing.gathers
  const weights = layer * layers * ofLayer + first * embedding + head * (vocabulary + ofNorm)
  // Fully sharded, how many micro-batches each data-parallel rank has: three characters.
  const counts = ddp?.useMegatronFsdp === true && dp > 1 ? { gatherBytes: '[4]'.length * ranks } : {}
  const slots = pp * (model.virtualPipelineModelParallelSize ?? 1)
  const link = { pointToPoint: (slots - 1) * hidden * (sp ? 1 : tp) }
  const embeddings = 2 * Math.ceil(vocab / tp) * tp * H * float * dp * cp
  const statusWord = 5 * 8
  const emptyList = '[[]]'.length * ranks
  // Whether all ranks of a copy of the model have the same micro-batches: 8 characters.
  const agreement = '[""]'.length * ranks + 8 * ranks
  const sharded = ddp?.useDistributedOptimizer !== false
  const groups = {
    world: { allReduce: statusWord * ranks },
    ...(tp > 1 && {
      tp: {
        ...(sp
          ? { allGather: gathers + lossStatistics, reduceScatter: sums, allReduce: sharing.sums * norms }
          : { allGather: lossStatistics, allReduce: sums }),
        ...(pp === 1 && { gatherBytes: agreement }),
      },
    }),
    ...(copies > 0 && { tp_kv: { allReduce: sharing.sums * copies } }),
    ...(tp > 1 && pp > 1 && { tp_pp: { gatherBytes: agreement } }),
    ...(dp * cp > 1 && {
      dp_cp: sharded
        ? { reduceScatter: sharing.sums * gradients, allGather: weights / dp / cp, ...counts }
        : { allReduce: gradients },
    }),
    // Two stages are also first and last: tied embeddings are summed in the same group.
    ...(pp > 1 && {
      pp: { gatherBytes: emptyList + (tp === 1 ? agreement : 0), ...(isTied && { allReduce: embeddings }) },
      pp_forward: link,
      pp_backward: link,
    }),
  }
  return together(groups, contextBytes(model, dp), expertBytes(ranks, model, dp, sharing))
}

const counted = new Map<string, Payload>()
beforeAll(async () => {
  for (const ranks of sizes) {
    const rows = table[Number(ranks)] as readonly Row[]
    const tasks: PipelineTask[] = rows.map(([, model, ddp]) => ({ trainIters: 3, model, ...(ddp ? { ddp } : {}) }))
    const path = join(folder, `${ranks}.json`)
    const started = startScript('bytesRank.ts', [JSON.stringify(tasks), path], Number(ranks))
    const code = await started.end
    if (code !== 0) throw new Error(`${ranks} ranks ended with ${code}:\n${started.lines.join('\n')}`)
    const found = JSON.parse(readFileSync(path, 'utf8')) as Payload[]
    for (const [i, [name]] of rows.entries()) counted.set(name, found[i] as Payload)
  }
}, 240_000)

describe('a step hands to collectives what the textbook says, within 1%', () => {
  const rows = sizes.flatMap((ranks) =>
    (table[Number(ranks)] ?? []).map((row) => [row[0], Number(ranks), row] as const),
  )
  it.each(rows)('%s', (name, ranks, [, model, ddp]) => {
    const payload = counted.get(name) as Payload
    const flat = (groups: Readonly<Record<string, object>>) =>
      new Map(
        Object.entries(groups).flatMap(([group, ops]) =>
          Object.entries(ops as Record<string, number>)
            .filter(([, bytes]) => bytes > 0)
            .map(([op, bytes]) => [`${group} ${op}`, bytes] as const),
        ),
      )
    const [got, expected] = [flat(payload), flat(textbook(ranks, model, ddp))]
    expect([...got.keys()].sort()).toEqual([...expected.keys()].sort())
    for (const [what, bytes] of expected)
      expect(Math.abs((got.get(what) as number) / bytes - 1), `${what}: ${got.get(what)} for ${bytes}`).toBeLessThan(
        0.01,
      )
  })
})
