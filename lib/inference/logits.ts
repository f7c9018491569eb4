// Logits, loss and gradients of given tokens, from a safetensors file to a safetensors file: how a model is compared with another
// implementation. The loss is the mean next-token cross entropy; labels are shifted here.
import { native } from '../addon/load.js'
import type { DType } from '../base/dtype.js'
import { type ErrorCode, ViaductError } from '../base/errors.js'
import { AutoBridge } from '../bridge/autoBridge.js'
import { type HostTensor, readHostTensors, wholeNumbers, writeHostTensors } from '../io/hostTensors.js'
import type { TokenBatch } from '../models/batch.js'
import type { DistributedModel } from '../models/distributedModel.js'
import type { GPTModel } from '../models/gpt.js'
import { type LastPass, runPipeline } from '../models/pipelineRun.js'
import { allGatherObject, pointToPoint } from '../parallel/collectives.js'
import type { ParallelConfig } from '../parallel/config.js'
import { gatherSequence } from '../parallel/contextShards.js'
import { sumContextGradients, sumExpertGradients, sumSharedGradients } from '../parallel/gradientSums.js'
import { vocabParallelCrossEntropy } from '../parallel/vocabParallelCrossEntropy.js'
import type { Ctx } from '../tensor/ctx.js'
import type { DeviceKind } from '../tensor/device.js'
import { Tensor } from '../tensor/tensor.js'

export interface LogitsOptions {
  /** Gradients of the mean loss too. Default false. */
  readonly grads?: boolean
  readonly parallel: ParallelConfig
  /** Computes in this dtype. Default: the checkpoint's; a float16 one is computed in float32, which holds it exactly. */
  readonly dtype?: DType
  readonly device?: DeviceKind
}

/** What was computed. */
export interface LogitsReport {
  readonly shape: readonly [number, number, number]
  /** Mean over the labels that count; 0 when a sequence has nothing to predict. */
  readonly loss: number
  readonly gradients: number
}

/**
 * Opens a model in a layout. Collective.
 * @param dir - a Hugging Face folder or one of our checkpoints.
 */
export async function openModel(
  dir: string,
  options: Pick<LogitsOptions, 'parallel' | 'dtype' | 'device'>,
): Promise<{ bridge: AutoBridge; model: DistributedModel }> {
  const bridge = await AutoBridge.open(dir)
  const provider = bridge.toMegatronProvider()
  Object.assign(provider, options.parallel)
  if (options.dtype !== undefined) provider.paramsDtype = options.dtype
  else if (provider.paramsDtype === 'float16') provider.paramsDtype = 'float32'
  provider.finalize()
  const model = await provider.provideDistributedModel({ wrapWithDdp: false, device: options.device ?? 'auto' })
  return { bridge, model }
}

/**
 * Reads `input`, computes on every rank, writes `output` on rank 0. Collective.
 * @throws ERR_DATA for wrong inputs, ERR_TOKEN_ID, ERR_LABEL, and what opening the model throws.
 */
export async function computeLogits(
  dir: string,
  input: string,
  output: string,
  options: LogitsOptions,
): Promise<LogitsReport> {
  const batch = readBatch(await readHostTensors(input), input)
  const { batchSize: B, seqLength: S } = batch
  const { bridge, model } = await openModel(dir, options)
  const first = model.mesh.get('world').rank === 0
  const results = new Map<string, HostTensor>()
  const ctx = model.ctx()
  try {
    model.training = false
    if (options.grads)
      for (const [, parameter] of model.namedParameters())
        parameter.mainGrad = Tensor.zeros(ctx, parameter.shard.localShape, 'float32').keep()
    const end: { logits: Tensor | null; loss: number | null } = { logits: null, loss: null }
    const last: LastPass = async (inner, chunk, device) => {
      const computed = await chunk.forward(inner, device)
      // The backward pass writes over the logits.
      end.logits = ctx.empty(computed.shape, computed.dtype)
      native.copy(ctx.stream.id, end.logits.handle, computed.handle)
      const { lossSum } = vocabParallelCrossEntropy(
        inner,
        computed,
        device.labels as Tensor,
        chunk.config.vocabSize,
        chunk.tp,
      )
      // Of the tokens that this rank has of each sequence; the gradients are summed over cp afterwards.
      const parts = await allGatherObject([device.numTokens, await lossSum.item()] as const, inner.groups.get('cp'))
      // Nothing to predict (sequences of one token): the loss is 0 over 0 tokens.
      const counted = Math.max(
        1,
        parts.reduce((sum, [tokens]) => sum + tokens, 0),
      )
      end.loss = parts.reduce((sum, [, loss]) => sum + loss, 0) / counted
      return { output: lossSum, seed: Tensor.fromHost(inner, Float32Array.of(1 / counted), [1], 'float32') }
    }
    await runPipeline(ctx, model, [batch], last, { backward: options.grads ?? false })
    const loss = (await allGatherObject(end.loss, ctx.groups.get('pp'))).at(-1) ?? 0
    const [chunk] = model.chunks as [GPTModel]
    const { vocabSize } = chunk.config
    const logits = toFirstStage(ctx, model, end.logits && ofWholeSequences(ctx, end.logits, B, S), B * S)
    if (logits !== null) results.set('logits', float32([B, S, vocabSize], await chunk.gatherLogits(ctx, logits)))
    results.set('loss', float32([1], Float32Array.of(loss)))
    let gradients = 0
    if (options.grads) {
      const parameters = [...model.namedParameters()].map(([, parameter]) => parameter)
      sumSharedGradients(ctx, parameters)
      sumContextGradients(ctx, parameters)
      sumExpertGradients(ctx, parameters)
      for await (const [name, gradient] of bridge.exportHfWeights(model, { what: 'gradients', to: 'rank0' })) {
        gradients++
        if (gradient !== null) results.set(`grad.${name}`, float32(gradient.shape, await gradient.toFloat32Array()))
      }
    }
    await ctx.stream.sync()
    if (first) await writeHostTensors(output, results)
    return { shape: [B, S, vocabSize], loss, gradients }
  } finally {
    ctx.scope.close()
    await model.dispose()
  }
}

/** Logits [B·S, Vlocal] of the tokens that the ranks of cp have, in the order of the sequences. */
function ofWholeSequences(ctx: Ctx, logits: Tensor, B: number, S: number): Tensor {
  const cp = ctx.groups.get('cp')
  if (cp.size === 1) return logits
  const [tokens = 0, width = 0] = logits.shape
  const filled = gatherSequence(ctx, logits.reshape(ctx, [B, tokens / B, width]), cp)
  const whole = ctx.empty([B, S, width], logits.dtype)
  native.copy(ctx.stream.id, whole.handle, filled.slice(ctx, 1, 0, S).handle)
  return whole.reshape(ctx, [B * S, width])
}

/** The last stage's logits [T, Vlocal] on the ranks of the first stage; null on others. */
function toFirstStage(ctx: Ctx, model: DistributedModel, logits: Tensor | null, tokens: number): Tensor | null {
  const [pp, tp] = [model.mesh.get('pp'), model.mesh.get('tp')]
  if (pp.size === 1) return logits
  if (logits !== null) pointToPoint(ctx, pp, [{ tensor: logits, peer: 0 }], [])
  if (pp.rank > 0) return null
  const [{ config }] = model.chunks as [GPTModel]
  const received = ctx.empty([tokens, model.config.paddedVocabSize / tp.size], config.paramsDtype)
  pointToPoint(ctx, pp, [], [{ tensor: received, peer: pp.size - 1 }])
  return received
}

function float32(shape: readonly number[], data: Float32Array): HostTensor {
  return { dtype: 'float32', shape, bytes: new Uint8Array(data.buffer, data.byteOffset, data.byteLength) }
}

/** The named tensors of an input file as a batch; labels default to the tokens where attention_mask is 1. */
export function readBatch(tensors: ReadonlyMap<string, HostTensor>, file: string): TokenBatch {
  const fail = (message: string, code: ErrorCode = 'ERR_DATA'): never => {
    throw new ViaductError(code, 'logits', `${message} (${file})`, { file })
  }
  const ids =
    tensors.get('input_ids') ?? fail(`expected a tensor input_ids, got ${[...tensors.keys()].join(', ') || 'none'}`)
  if (ids.shape.length !== 2) fail(`expected input_ids of shape [B, T], got [${ids.shape}]`)
  const [B, S] = ids.shape as [number, number]
  // What follows is checked in 32 bits: a larger number must not come out of them as another one.
  const read = (name: string, code: ErrorCode, [least, most] = [-(2 ** 31), 2 ** 31 - 1]): Int32Array | null => {
    const tensor = tensors.get(name)
    if (tensor === undefined) return null
    if (tensor.shape.join() !== ids.shape.join())
      fail(`expected ${name} of input_ids' shape [${ids.shape}], got [${tensor.shape}]`)
    const values = wholeNumbers(name, tensor)
    const bad = values.findIndex((value) => value < least || value > most)
    if (bad >= 0) {
      const place = `row ${Math.floor(bad / S)}, position ${bad % S}`
      fail(`expected ${name} from ${least} to ${most}, got ${values[bad]} at ${place}`, code)
    }
    return Int32Array.from(values)
  }
  for (const name of tensors.keys()) {
    if (!['input_ids', 'attention_mask', 'position_ids', 'labels'].includes(name))
      fail(`expected input_ids, attention_mask, position_ids, labels, got ${JSON.stringify(name)}`)
  }
  const tokens = read('input_ids', 'ERR_TOKEN_ID') as Int32Array
  const mask = read('attention_mask', 'ERR_DATA', [0, 1])
  const positions = read('position_ids', 'ERR_DATA')
  const given = read('labels', 'ERR_LABEL') ?? tokens.map((id, i) => (mask?.[i] === 0 ? -100 : id))
  const labels = given.map((_, i) => ((i + 1) % S === 0 ? -100 : (given[i + 1] as number)))
  if (tensors.has('labels') && labels.every((label) => label === -100))
    fail('expected a label that counts, got -100 for every position that has a predecessor')
  return {
    batchSize: B,
    seqLength: S,
    tokens,
    labels,
    ...(mask === null ? {} : { attentionMask: Uint8Array.from(mask) }),
    ...(positions === null ? {} : { positionIds: positions }),
  }
}
