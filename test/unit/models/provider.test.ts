// The provider: sealed, checked as a whole, frozen, and the factory of models with memory and weights.
import { afterEach, describe, expect, test } from 'vitest'
import type { DistributedModel } from '../../../lib/models/distributedModel.js'
import { GPTModelProvider, type ProviderInit } from '../../../lib/models/provider.js'
import type { Parameter } from '../../../lib/nn/parameter.js'
import { Device } from '../../../lib/tensor/device.js'

const init: ProviderInit = {
  numLayers: 2,
  hiddenSize: 32,
  ffnHiddenSize: 48,
  numAttentionHeads: 4,
  numQueryGroups: 2,
  vocabSize: 97,
  maxPositionEmbeddings: 64,
}
const models: DistributedModel[] = []
afterEach(async () => {
  for (const model of models.splice(0)) await model.dispose()
})

describe('GPTModelProvider', () => {
  test('fills in what Megatron-Core has by default', () => {
    const { kvChannels, seqLength, normalization, tensorModelParallelSize } = new GPTModelProvider(init)
    expect({ kvChannels, seqLength, normalization, tensorModelParallelSize }).toEqual({
      kvChannels: 8,
      seqLength: 64,
      normalization: 'RMSNorm',
      tensorModelParallelSize: 1,
    })
    const plain = new GPTModelProvider({ numLayers: 1, hiddenSize: 8, numAttentionHeads: 2, vocabSize: 5 })
    expect([plain.ffnHiddenSize, plain.numQueryGroups]).toEqual([32, 2])
  })

  test.each([
    ['tensor_model_parallel_size', /write tensorModelParallelSize/],
    ['tensorModelParalelSize', /write tensorModelParallelSize/],
    ['numLayer', /write numLayers/],
  ])('an unknown key %s throws at the assignment and names the one that was meant', (key, message) => {
    const provider = new GPTModelProvider(init)
    const assign = () => Reflect.set(provider, key, 2)
    expect(assign).toThrowError(
      expect.objectContaining({ code: 'ERR_CONFIG', message: expect.stringMatching(message) }),
    )
    expect(() => new GPTModelProvider({ ...init, [key]: 2 })).toThrowError(message)
  })

  test('tpCommOverlap is true, false, or null for what suits the transport', () => {
    const provider = new GPTModelProvider(init)
    expect(provider.tpCommOverlap).toBeNull()
    Reflect.set(provider, 'tpCommOverlap', 'yes')
    expect(() => provider.finalize()).toThrow(/tpCommOverlap must be true, false or null, got "yes"/)
    provider.tpCommOverlap = true
    provider.finalize()
  })

  test('finalize reports everything at once and freezes', () => {
    const wrong = new GPTModelProvider({ ...init, numQueryGroups: 3, numLayers: 0, attentionDropout: 1 })
    wrong.contextParallelSize = 0
    let problems: string[] = []
    try {
      wrong.finalize()
    } catch (error) {
      expect(error).toMatchObject({ code: 'ERR_CONFIG' })
      problems = (error as { details: { problems: string[] } }).details.problems
    }
    for (const key of ['numQueryGroups', 'numLayers', 'attentionDropout', 'contextParallelSize']) {
      expect(problems.filter((p) => p.startsWith(key)).length, key).toBe(1)
    }
    const provider = new GPTModelProvider(init)
    provider.finalize()
    provider.finalize()
    expect(provider.isFinal).toBe(true)
    expect(() => {
      provider.numLayers = 3
    }).toThrowError(/final/)
  })

  test.each([
    ['normalization', 'rmsnorm', 'normalization must be one of RMSNorm, LayerNorm, got "rmsnorm"'],
    ['activation', 'sigmoid', 'activation must be one of silu, '],
    ['qkLayernorm', true, 'qkLayernorm must be one of perHead, allHeads, null, got true'],
    ['softmaxType', 'off-by-one', 'softmaxType must be one of vanilla, learnable'],
    ['gatedLinearUnit', 'yes', 'gatedLinearUnit must be true or false, got "yes"'],
    ['windowSize', 0, 'windowSize must be null or a whole number of at least 1, got 0'],
    ['moeFfnHiddenSize', 2.5, 'moeFfnHiddenSize must be null or a whole number'],
    ['clipQkv', -1, 'clipQkv must be null or above 0, got -1'],
    ['moeLayerFreq', [1], 'moeLayerFreq must be 1 or a list of 0 and 1 for each of 2 layers, got [1]'],
    ['moeLayerFreq', 2, 'moeLayerFreq must be 1 or a list'],
  ])('%s cannot be %j', (key, value, message) => {
    const provider = new GPTModelProvider({ ...init, numLayers: 2 })
    Reflect.set(provider, key, value)
    expect(() => provider.finalize()).toThrow(message)
  })

  test('experts are filled up to a capacity, by all-to-all', () => {
    const padded = { ...init, numMoeExperts: 4, moePadExpertInputToCapacity: true }
    expect(() => new GPTModelProvider(padded).finalize()).toThrow(/needs moeExpertCapacityFactor/)
    expect(() =>
      new GPTModelProvider({ ...padded, moeExpertCapacityFactor: 1, moeTokenDispatcherType: 'allgather' }).finalize(),
    ).toThrow(/needs moeTokenDispatcherType=alltoall, got allgather/)
    new GPTModelProvider({ ...padded, moeExpertCapacityFactor: 1 }).finalize()
  })

  test('balance losses are one or none with a number, or a list with as many numbers', () => {
    const finalize = (moeRouterLoadBalancingType: unknown, moeAuxLossCoeff: unknown) => {
      const provider = new GPTModelProvider({ ...init, numMoeExperts: 4 })
      Object.assign(provider, { moeRouterLoadBalancingType, moeAuxLossCoeff })
      provider.finalize()
    }
    finalize('none', 0)
    finalize(['aux_loss', 'global_aux_loss'], [0.1, 0])
    expect(() => finalize('sinkhorn', 0.1)).toThrow(/moeRouterLoadBalancingType must be one of aux_loss, seq_aux_loss/)
    expect(() => finalize(['none'], [0.1])).toThrow(/moeRouterLoadBalancingType must be one of/)
    expect(() => finalize([], [])).toThrow(/moeRouterLoadBalancingType must be one of/)
    expect(() => finalize(['aux_loss', 'aux_loss'], [0.1, 0.2])).toThrow(/must name each loss once/)
    expect(() => finalize(['aux_loss', 'seq_aux_loss'], [0.1])).toThrow(/a number for each type .*got \[0.1\]/)
    expect(() => finalize(['aux_loss'], 0.1)).toThrow(/a number for each type/)
    expect(() => finalize('aux_loss', [0.1])).toThrow(/a number for each type/)
    expect(() => finalize('aux_loss', -1)).toThrow(/moeAuxLossCoeff must be at least 0, got -1/)
  })

  test('a tensor-parallel size that does not fit names the sizes that do', () => {
    const provider = new GPTModelProvider({ ...init, tensorModelParallelSize: 3 })
    expect(() => provider.finalize()).toThrowError(
      expect.objectContaining({
        code: 'ERR_LAYOUT_INVALID',
        message: expect.stringMatching(/numAttentionHeads=4, got 3: use 1, 2, 4/),
      }),
    )
  })

  test('the vocabulary is padded in memory to a multiple for every rank', () => {
    expect(new GPTModelProvider(init).paddedVocabSize).toBe(128)
    expect(
      new GPTModelProvider({ ...init, makeVocabSizeDivisibleBy: 8, tensorModelParallelSize: 2 }).paddedVocabSize,
    ).toBe(112)
  })

  test('gives a model with initial weights, runs hooks, and frees everything', async () => {
    const before = Device.open('cpu').liveSlots()
    const provider = new GPTModelProvider(init)
    const seen: string[] = []
    provider.registerPreWrapHook(async (model) => {
      for (const [name, parameter] of model.namedParameters()) {
        if (name.startsWith('embedding')) parameter.requiresGrad = false
        seen.push(name)
      }
    })
    const model = await provider.provideDistributedModel({ wrapWithDdp: false, dtype: 'bfloat16', seed: 3 })
    expect(seen[0]).toBe('embedding.word_embeddings.weight')
    const words = model.chunks[0]!.embedding!.wordEmbeddings.weight
    expect([words.requiresGrad, words.data.dtype, model.wrapWithDdp]).toEqual([false, 'bfloat16', false])
    await model.dispose()
    await model.dispose()
    expect(Device.open('cpu').liveSlots()).toBe(before)
  })

  test('a loader fills the model instead; what it throws leaves nothing behind', async () => {
    const before = Device.open('cpu').liveSlots()
    const provider = new GPTModelProvider(init)
    let loads = 0
    provider.weightsLoader = async () => {
      loads++
    }
    models.push(await provider.provideDistributedModel())
    models.push(await provider.provideDistributedModel({ loadWeights: false }))
    expect(loads).toBe(1)
    for (const model of models.splice(0)) await model.dispose()
    const failing = new GPTModelProvider(init)
    failing.weightsLoader = async () => {
      throw new Error('broken file')
    }
    await expect(failing.provideDistributedModel()).rejects.toThrowError('broken file')
    await expect(
      new GPTModelProvider(init).provideDistributedModel({ signal: AbortSignal.abort() }),
    ).rejects.toThrowError()
    expect(Device.open('cpu').liveSlots()).toBe(before)
  })
})

test('an aborted signal is ERR_ABORTED, and a disposed model says that it was', async () => {
  const provider = new GPTModelProvider(init)
  await expect(provider.provideDistributedModel({ signal: AbortSignal.abort('late') })).rejects.toMatchObject({
    code: 'ERR_ABORTED',
    cause: 'late',
  })
  const model = await provider.provideDistributedModel()
  const [name, parameter] = [...model.namedParameters()][0] as [string, Parameter]
  await model.dispose()
  expect(() => parameter.data).toThrowError(
    expect.objectContaining({ code: 'ERR_HANDLE', message: expect.stringMatching(`disposed.*${name}`) }),
  )
})
