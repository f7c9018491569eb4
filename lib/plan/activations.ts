// Activations of one rank in closed formulas: what a micro-batch leaves behind in a chunk of the model for its backward pass, and what
// is alive besides at the worst moment of each pass. One term a tensor, in bytes; tensors are those that lib/ops saves and that
// lib/models holds meanwhile. T tokens, H channels; `rows` of hidden states are T, with sequence parallelism the rank's run of them.
import { dtypeBytes } from '../base/dtype.js'
import type { ResolvedConfig } from '../config/resolve.js'
import { offloadedLayers } from '../models/offloadSettings.js'
import { layerRuns, type RecomputeModule, selectedModules } from '../models/recomputeSettings.js'
import { expertCapacity } from '../models/routerSettings.js'
import { expertWidth, hasExperts } from '../models/transformerConfig.js'
import { runLength } from '../parallel/contextShards.js'
import type { PipelinePart } from '../parallel/pipelineStages.js'
import { sharedRows } from '../parallel/sharedRows.js'
import { type ContextMemory, contextMemory } from './contextMemory.js'

/** Tensors of one micro-batch on one rank, in bytes. */
interface Tensors {
  /** [rows, H]: the residual stream, a norm's output, their gradients. */
  readonly hidden: number
  /** [T, H] where hidden states are shared out: rows of all ranks, gathered for a linear or not yet summed; else 0. */
  readonly gathered: number
  /** [T, H]: the gradient of a column-parallel linear's input. */
  readonly whole: number
  /** A norm's statistics, float32 [rows] each. */
  readonly statistics: number
  /** Packed queries, keys and values, [T, ...]. */
  readonly qkv: number
  /** What attention needs to see the tokens of other ranks of cp. */
  readonly context: ContextMemory
  /** Attention's output, [T, ...], and its log-sum-exps, float32 [T, heads]. */
  readonly mixed: number
  readonly lse: number
  /** Outputs of fc1 and of the activation, [T, ...]. */
  readonly inner: number
  readonly acted: number
  /** [T, vocabulary of the rank]. */
  readonly logits: number
  /** float32 [T]. */
  readonly perToken: number
  /** Of layers with experts. */
  readonly moe: ExpertTensors | null
  /** A gradient that dropout does not write in place, because the residual stream has it too: [rows, H]; 0 without dropout. */
  readonly dropped: number
}

/** Tokens that a rank has of a sequence. */
const ownTokens = (seqLength: number, cp: number) => (cp === 1 ? seqLength : 2 * runLength(seqLength, { size: cp }))

/** Of one layer with experts on one rank, where its experts get as many rows as others. */
interface ExpertTensors {
  /** Rows by choice before they leave and after they are back, [rows · K, H]. */
  readonly chosen: number
  /** The experts' rows, [N, H], and what their matrices and activation make of them. */
  readonly sent: number
  readonly inner: number
  readonly acted: number
  /** Logits of the router, [rows, E]; its scores, weights, choices and orders, and what its own losses and noise keep. */
  readonly logits: number
  readonly routed: number
  /** Whether rows go to other ranks. */
  readonly travels: boolean
  /** [rows, width]: the sum of what the experts gave, where they have a width of their own; else 0. */
  readonly latent: number
  readonly shared: SharedTensors | null
}

/** Of the experts that all tokens pass: outputs of fc1 and of the activation, [T, ...], and where a gate weighs it what fc2 gives. */
interface SharedTensors {
  readonly inner: number
  readonly acted: number
  readonly made: number
}

function sharedTensorsOf(
  { config: { model }, paramsDtype }: ResolvedConfig,
  { tokens, rows }: { tokens: number; rows: number },
): SharedTensors | null {
  const { moeSharedExpertIntermediateSize: width, moeSharedExpertGate: gate, hiddenSize: H } = model
  if (width === null) return null
  const bytes = dtypeBytes(paramsDtype)
  const S = width / model.tensorModelParallelSize
  return {
    inner: tokens * (model.gatedLinearUnit ? 2 * S : S) * bytes,
    acted: tokens * S * bytes,
    // And the gate's product, its sigmoid and two orders.
    made: gate ? rows * (H * bytes + 4 * 4) : 0,
  }
}

/** @param tokens - of all ranks that share the rows out. */
function expertTensorsOf(resolved: ResolvedConfig, rows: number, tokens: number): ExpertTensors | null {
  const { model } = resolved.config
  const { numMoeExperts: E, moeRouterTopk: K, expertTensorParallelSize: etp, hiddenSize: H } = model
  if (E === null) return null
  const bytes = dtypeBytes(resolved.paramsDtype)
  const F = (model.moeFfnHiddenSize ?? model.ffnHiddenSize) / etp
  const width = expertWidth(model)
  const factor = model.moePadExpertInputToCapacity ? model.moeExpertCapacityFactor : null
  // Filled up, as many for each expert.
  const leaving = factor === null ? rows * K : E * expertCapacity(rows * K, E, factor)
  // Each row is on all ranks of etp.
  const N = leaving * etp
  const travels = model.expertModelParallelSize * etp > 1
  return {
    chosen: leaving * width * bytes,
    sent: N * width * bytes,
    inner: N * (model.gatedLinearUnit ? 2 * F : F) * bytes,
    acted: N * F * bytes,
    logits: rows * E * bytes,
    routed:
      rows * (E + 4 * K) * 4 +
      (travels ? 2 * N * 4 : 0) +
      (model.moeZLossCoeff ? rows * E * bytes : 0) +
      (model.moeInputJitterEps ? rows * H * bytes : 0),
    travels,
    latent: model.moeLatentSize === null ? 0 : rows * width * bytes,
    shared: sharedTensorsOf(resolved, { tokens, rows }),
  }
}

function tensorsOf(resolved: ResolvedConfig): Tensors {
  const { config, seqLength, paramsDtype, paddedVocabSize } = resolved
  const { model, train } = config
  const { hiddenSize: H, tensorModelParallelSize: tp, contextParallelSize: cp, kvChannels } = model
  const T = train.microBatchSize * ownTokens(seqLength, cp)
  const shared = model.sequenceParallel && tp > 1
  const rows = shared ? sharedRows(T, { size: tp }) : T
  const bytes = dtypeBytes(paramsDtype)
  const heads = model.numAttentionHeads / tp
  // A rank has at least one key and one value, a copy where there are fewer than ranks.
  const keys = Math.max(1, model.numQueryGroups / tp)
  const ffn = model.ffnHiddenSize / tp
  return {
    hidden: rows * H * bytes,
    gathered: shared ? T * H * bytes : 0,
    whole: T * H * bytes,
    statistics: rows * 4 * (model.normalization === 'LayerNorm' ? 2 : 1),
    qkv: T * (heads + 2 * keys) * kvChannels * bytes,
    context: contextMemory(model, { queries: T * heads * kvChannels, keys: T * 2 * keys * kvChannels, bytes }),
    mixed: T * heads * kvChannels * bytes,
    lse: T * heads * 4,
    inner: T * (model.gatedLinearUnit ? 2 * ffn : ffn) * bytes,
    acted: T * ffn * bytes,
    logits: T * (paddedVocabSize / tp) * bytes,
    perToken: T * 4,
    moe: expertTensorsOf(resolved, rows, T),
    dropped: model.hiddenDropout > 0 ? rows * H * bytes : 0,
  }
}

/** Hidden states of a micro-batch on one rank, [rows, H]: what goes from stage to stage. */
export const hiddenBytes = (resolved: ResolvedConfig): number => tensorsOf(resolved).hidden

/** What a chunk needs for one micro-batch, in bytes. */
export interface ChunkActivations {
  /** From the end of the forward pass to the end of the backward pass. */
  readonly saved: number
  /** From the gradients of inputs to those of weights, where these are deferred: instead of `saved`. */
  readonly deferred: number
  /** Beside `saved` at the worst moment of the forward pass. */
  readonly forward: number
  /** Beside `saved` at the worst moment of the backward pass. */
  readonly backward: number
  /** Beside `deferred` at the end of a backward pass that defers gradients of weights. */
  readonly deferring: number
  /** Beside `deferred` while gradients of weights are computed. */
  readonly weights: number
  /** Of `saved` the bytes that wait in the host's memory are left out: these. */
  readonly onHost: number
  /** The most while each unit of the forward and of the backward pass runs, in the order of lib/models/unitPasses.ts. */
  readonly moments: { readonly forward: readonly number[]; readonly backward: readonly number[] }
}

/** One layer. */
interface LayerActivations {
  /** From its forward pass to its backward pass. */
  readonly kept: number
  /** Of a forward pass at its worst moment, `kept` included, but for what came in. */
  readonly forward: number
  /** At the worst moment of its backward pass, `kept` included. */
  readonly backward: number
}

/** @param again - parts that run again in the backward pass. */
function layerActivations(
  t: Tensors,
  again: ReadonlySet<RecomputeModule>,
  experts: ExpertTensors | null,
): LayerActivations {
  const normsAgain = again.has('layernorm')
  // Each norm: the stream, statistics, what it gave.
  const norm = t.hidden + t.statistics
  const attended = t.mixed + t.lse
  const attention = norm + (normsAgain ? 0 : t.hidden) + t.qkv + (again.has('core_attn') ? 0 : attended)
  const { kept, forward, moments } =
    experts === null ? denseActivations(t, again) : expertActivations(t, experts, again)
  // The gradient of a column-parallel linear's input: of all rows, and this rank's of the sum.
  const inputGradient = t.whole + (t.gathered > 0 ? t.hidden : 0)
  const worst = Math.max(
    ...moments.map((moment) => attention + moment),
    // Of attention's output and of queries, keys and values.
    norm + (normsAgain ? 0 : t.hidden) + t.qkv + attended + t.mixed + t.qkv + t.context.backward,
    // Of linear_qkv's input.
    norm + t.hidden + t.qkv + inputGradient,
  )
  // Forward beside what attention added to the stream, or while it sees other ranks' tokens.
  const attending = norm + t.hidden + t.qkv + attended + t.context.forward
  return {
    kept: attention + kept,
    forward: Math.max(attention + kept + t.hidden + forward, attending),
    backward: t.hidden + worst,
  }
}

/** Of the feed-forward part alone: what it keeps, what it needs beside at the end of its forward pass, the worst moments backward. */
interface FeedForward {
  readonly kept: number
  readonly forward: number
  readonly moments: readonly number[]
}

function denseActivations(t: Tensors, again: ReadonlySet<RecomputeModule>): FeedForward {
  const [normsAgain, mlpAgain] = [again.has('layernorm'), again.has('mlp')]
  // Only a gated activation reads more than it gives, and can be made again.
  const actAgain = again.has('mlp_act') && !mlpAgain && t.inner > t.acted
  const mlpFromNorm = t.hidden + t.statistics + t.hidden + t.inner + t.acted
  const kept = mlpAgain ? t.hidden : mlpFromNorm - (normsAgain ? t.hidden : 0) - (actAgain ? t.acted : 0)
  // While the feed-forward part has its backward pass; when it ran again, what it gave is there too.
  const then = mlpAgain ? t.hidden + mlpFromNorm + t.hidden : kept + (actAgain ? t.acted : 0)
  const inputGradient = t.whole + (t.gathered > 0 ? t.hidden : 0)
  return {
    kept,
    // What fc2 gives, as it is summed over the ranks, beside what it reads.
    forward: (mlpAgain ? mlpFromNorm : t.hidden) + t.gathered + (actAgain ? t.acted : 0),
    moments: [
      // Of the activation, beside the one that fc2 had.
      then + t.dropped + t.gathered + t.acted,
      // Of fc1's input: the activation's is gone, fc1's is in place of what the activation read.
      then - t.acted + (normsAgain && !mlpAgain ? t.hidden : 0) + inputGradient,
    ],
  }
}

/** Rows of experts come and go in parts; what has left is freed. Shared experts run last, and first backwards. */
function expertActivations(t: Tensors, e: ExpertTensors, again: ReadonlySet<RecomputeModule>): FeedForward {
  const [normsAgain, moeAgain] = [again.has('layernorm'), again.has('moe')]
  const shared = e.shared === null ? 0 : e.shared.inner + e.shared.acted + e.shared.made
  const whole =
    t.hidden + t.statistics + t.hidden + e.routed + e.sent + e.inner + e.acted + e.chosen + e.latent + shared
  const kept = moeAgain ? t.hidden : whole - (normsAgain ? t.hidden : 0)
  // While the feed-forward part has its backward pass; when it ran again, what it gave is there too.
  const then = moeAgain ? t.hidden + whole + t.hidden : kept
  // Slices on their way back: of all ranks of etp, and this one's of their sum.
  const sliced = e.sent > e.chosen ? e.sent + e.chosen : 0
  const returning = e.travels ? e.sent + sliced : 0
  // Beside what the shared experts had first: the gradient of the input that is theirs.
  const rest = then - shared + (e.shared === null ? 0 : t.hidden)
  const before = rest - e.chosen + t.dropped
  // What the routed experts gave, beside the shared ones' and the sum of both.
  const adding = e.shared === null ? 0 : t.hidden + Math.max(t.gathered + t.hidden, 2 * t.hidden)
  return {
    kept,
    forward: Math.max(t.hidden, returning - shared, adding) + (moeAgain ? whole - t.hidden : 0),
    moments: [
      ...(e.shared === null ? [] : sharedMoments(t, e.shared, then + t.dropped)),
      // Of the rows that came back, beside the sum's.
      rest + t.dropped + e.chosen,
      // Of what fc2 gave, where it was on its way.
      before + returning + (e.travels ? e.chosen : 0),
      // Of the activation, beside the one that fc2 had.
      before + e.sent + e.acted,
      // Of the experts' rows; fc1's gradient is in place of what the activation read.
      before - e.acted + e.sent,
      // Of the rows before they left.
      before - e.acted - e.inner + returning + (e.travels ? e.chosen : 0),
    ],
  }
}

/** Worst moments backward of the experts that all tokens pass. @param then - what is there besides, theirs included. */
function sharedMoments(t: Tensors, { acted, made }: SharedTensors, then: number): number[] {
  const gated = made > 0 ? t.hidden : 0
  const inputGradient = t.whole + (t.gathered > 0 ? t.hidden : 0)
  return [
    // Of the activation, beside the one that fc2 had; with a gate beside the input's by the gate's product.
    then - made + 2 * gated + t.gathered + acted,
    // Of fc1's input: the activation's is gone, fc1's is in place of what the activation read.
    then - made - acted + gated + inputGradient,
  ]
}

/** What one layer keeps between the gradients of its inputs and those of its weights, when these are deferred. */
function layerDeferred(t: Tensors, { kept }: LayerActivations): number {
  // Gradients of linears' outputs lie where what was saved lay, but for those of the stream, which is then not overwritten.
  const stream = t.gathered > 0 ? 2 * t.gathered + t.hidden : t.dropped > 0 ? 3 * t.hidden : 2 * t.hidden
  // Of the norms' outputs.
  const norms = 2 * t.hidden
  return kept - t.lse + norms + stream
}

/** Activations of one chunk of a pipeline stage, or of the whole model. */
export function chunkActivations(resolved: ResolvedConfig, part: PipelinePart): ChunkActivations {
  const { model } = resolved.config
  const { hasEmbedding, hasHead } = part
  const tp = model.tensorModelParallelSize
  const t = tensorsOf(resolved)
  // Layers with experts and dense ones are planned as if all were what needs more.
  const most = (again: ReadonlySet<RecomputeModule>) => {
    const kinds = new Set(Array.from({ length: part.end - part.first }, (_, i) => hasExperts(model, part.first + i)))
    const all = [...(kinds.size === 0 ? [false] : kinds)].map((has) => layerActivations(t, again, has ? t.moe : null))
    return all.reduce((a, b) => (a.kept >= b.kept ? a : b))
  }
  const whole = most(new Set())
  const layer = most(selectedModules(model))
  // Token ids, labels and positions are int32, names of samples int64.
  const batch = 5 * t.perToken

  let kept = batch
  let deferred = batch
  let forward = 0
  let backward = 0
  let onHost = 0
  const forwards = hasEmbedding ? [batch + 2 * t.hidden + t.gathered] : []
  const backwards: number[][] = hasEmbedding ? [[batch + t.hidden + t.gathered]] : []
  const offloaded = offloadedLayers(model)
  const runs = layerRuns(model, part)
  for (const [at, { layers, again }] of runs.entries()) {
    const count = layers.length
    const entered = count > 1 || at > 0 ? t.hidden : 0
    if (again) {
      // They keep their input, which is the first one's stream. Between two layers, and between two groups, the stream is two tensors.
      const stream = (count > 1 ? 2 * t.hidden : -t.hidden) + (at > 0 ? 2 * t.hidden : 0)
      forward = Math.max(forward, kept + t.hidden + whole.forward + stream)
      kept += t.hidden
      // All of them again, and what the last one gave.
      const before = kept + (count - 1) * whole.kept - t.hidden
      const within = layers.map((_, i) => kept + i * whole.kept)
      forwards.push(...within.map(() => kept + whole.forward + stream))
      backwards.push([
        ...within.map((held) => held + whole.forward + entered),
        ...within.map((held) => held + whole.backward).reverse(),
      ])
      backward = Math.max(backward, before + t.hidden + Math.max(whole.forward + entered, whole.backward))
      deferred += t.hidden + count * layerDeferred(t, whole)
    } else {
      // Of offloaded layers one lies here beside the one that runs; of the last one the stream stays, which the next one reads.
      const stream = offloaded > 0 ? t.hidden : 0
      const resident = stream + (count - 1 - offloaded) * layer.kept
      const before = kept + Math.max(resident, offloaded > 0 ? layer.kept : 0)
      forward = Math.max(forward, before + layer.forward + entered)
      backward = Math.max(backward, before + layer.backward)
      const within = layers.map((_, i) => {
        const here = i < offloaded ? Math.min(i, 1) * layer.kept : stream + (i - offloaded) * layer.kept
        return kept + Math.max(here, i > 0 && offloaded > 0 ? layer.kept : 0)
      })
      forwards.push(...within.map((held) => held + layer.forward + entered))
      backwards.push(within.map((held) => held + layer.backward).reverse())
      kept += resident + layer.kept
      onHost += offloaded * layer.kept - stream
      deferred += count * layerDeferred(t, whole)
    }
  }

  const lastAgain = runs.at(-1)?.again === true
  if (hasHead) {
    // The norm's stream and output; logits, over which their gradient is written; log-sum-exp and loss of each token.
    kept += 2 * t.hidden + t.statistics + t.logits + 2 * t.perToken
    deferred += 3 * t.hidden + t.statistics + t.logits + t.perToken
    // What the last layer gave; rows that are gathered, or three numbers a token that ranks exchange.
    const statistics = 3 * t.perToken * (tp > 1 ? 1 + tp : 1)
    forward = Math.max(forward, kept + (lastAgain ? 2 : 1) * t.hidden + Math.max(t.gathered, statistics))
    backward = Math.max(backward, kept + t.whole + (t.gathered > 0 ? t.hidden : 0))
    forwards.push(kept + (lastAgain ? 2 : 1) * t.hidden + Math.max(t.gathered, statistics))
    backwards.push([kept + t.whole + (t.gathered > 0 ? t.hidden : 0)])
  } else {
    // The stream's two tensors become one, whose gradient comes from the next stage.
    forward = Math.max(forward, kept + (lastAgain ? 3 : 2) * t.hidden)
    backward += t.hidden
  }
  if (hasEmbedding) deferred += Math.max(t.gathered, t.hidden)
  return {
    saved: kept,
    deferred,
    forward: forward - kept,
    backward: backward - kept,
    deferring: runs.length > 0 ? t.qkv + t.mixed + t.lse : 0,
    weights: t.gathered,
    onHost,
    moments: { forward: forwards, backward: backwards.reverse().flat() },
  }
}
