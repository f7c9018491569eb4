// Random models and layouts that fit together, for property tests: dense and with experts, odd vocabularies, kv heads fewer than tp,
// stages of every kind. Sizes are small, at most 16 ranks. Nothing here uses the code that cuts.
import * as fc from 'fast-check'
import { plainDecoder, type TransformerConfig } from '../../../lib/models/transformerConfig.js'
import { defaultParallel, type ParallelConfig } from '../../../lib/parallel/config.js'

export interface RandomLayout {
  readonly config: TransformerConfig
  readonly parallel: ParallelConfig
  readonly worldSize: number
}

/** Stages: how many blocks, and the fields that say how they are spread. */
interface Stages {
  readonly numLayers: number
  readonly fields: Partial<ParallelConfig>
}

const size = (min: number, max: number) => fc.integer({ min, max })

function evenStages(pp: number, vpp: number): fc.Arbitrary<Stages> {
  const chunks = vpp > 1 ? { virtualPipelineModelParallelSize: vpp } : {}
  return size(1, 2).map((each) => ({ numLayers: each * pp * vpp, fields: chunks }))
}

function accountedStages(pp: number, vpp: number): fc.Arbitrary<Stages> {
  return fc
    .tuple(size(2, 3), fc.boolean(), fc.boolean())
    .map(([each, accountForEmbeddingInPipelineSplit, accountForLossInPipelineSplit]) => ({
      numLayers: each * pp * vpp - Number(accountForEmbeddingInPipelineSplit) - Number(accountForLossInPipelineSplit),
      fields: {
        ...(vpp > 1 ? { virtualPipelineModelParallelSize: vpp } : {}),
        accountForEmbeddingInPipelineSplit,
        accountForLossInPipelineSplit,
      },
    }))
}

function unevenStages(pp: number, vpp: number): fc.Arbitrary<Stages> {
  const end = fc.option(size(1, 3), { nil: null })
  return fc.tuple(end, end, size(1, 2)).map(([first, last, each]) => {
    const middle = pp - Number(first !== null) - Number(last !== null)
    return {
      numLayers: vpp * ((first ?? 0) + (last ?? 0) + each * middle),
      fields: {
        ...(vpp > 1 ? { virtualPipelineModelParallelSize: vpp } : {}),
        numLayersInFirstPipelineStage: first === null ? null : first * vpp,
        numLayersInLastPipelineStage: last === null ? null : last * vpp,
      },
    }
  })
}

function writtenStages(pp: number, vpp: number): fc.Arbitrary<Stages> {
  const count = fc.array(size(0, 3), { minLength: pp * vpp, maxLength: pp * vpp })
  return fc
    .tuple(count, fc.boolean())
    .filter(([counts]) => counts.some((n) => n > 0))
    .map(([counts, short]) => {
      const blocks = counts.map((n) => (short && n > 1 ? `t*${n}` : 't'.repeat(n)))
      return {
        numLayers: counts.reduce((sum, n) => sum + n, 0),
        fields: { pipelineModelParallelLayout: `E${blocks.join(short ? ',|' : '|')}L` },
      }
    })
}

const stages: fc.Arbitrary<Stages & { pp: number }> = fc
  .tuple(fc.constantFrom(1, 2, 3, 4), size(1, 3), size(0, 3))
  .chain(([pp, chunks, kind]) => {
    const vpp = pp === 1 ? 1 : chunks
    const make = [evenStages, accountedStages, unevenStages, writtenStages][pp === 1 && kind === 2 ? 0 : kind]
    return (make as typeof evenStages)(pp, vpp).map((made) => ({ ...made, pp }))
  })

/** A model and a layout of at most 16 ranks that it fits. */
export const randomLayout: fc.Arbitrary<RandomLayout> = fc
  .record({
    stages,
    tp: fc.constantFrom(1, 2, 3, 4, 6, 8),
    cp: fc.constantFrom(1, 1, 2),
    dp: fc.constantFrom(1, 1, 2, 3),
    etp: fc.constantFrom(1, 1, 2, 4),
    ep: fc.constantFrom(1, 2, 3, 4),
    // Query groups: a divisor of tp (copies of key and value), tp, or a multiple.
    groups: size(0, 9),
    queries: size(1, 2),
    widths: fc.record({ hidden: size(1, 3), ffn: size(1, 2), vocab: size(1, 29) }),
    experts: fc.option(size(1, 2), { nil: null }),
    denseLayers: fc.array(fc.boolean(), { maxLength: 3 }),
    flags: fc.record({
      tied: fc.boolean(),
      bias: fc.boolean(),
      gated: fc.boolean(),
      layerNorm: fc.boolean(),
      sequenceParallel: fc.boolean(),
    }),
    qkLayernorm: fc.constantFrom(null, 'perHead', 'allHeads'),
  })
  .filter((r) => {
    const model = r.tp * r.cp * r.dp
    return model * r.stages.pp <= 16 && (r.experts === null || model % (r.etp * r.ep) === 0)
  })
  .map(
    ({
      stages: made,
      tp,
      cp,
      dp,
      etp,
      ep,
      groups: choice,
      queries,
      widths,
      experts,
      denseLayers,
      flags,
      qkLayernorm,
    }) => {
      const groupsThatFit = [...Array.from({ length: tp }, (_, i) => i + 1).filter((n) => tp % n === 0), 2 * tp]
      const groups = groupsThatFit[choice % groupsThatFit.length] as number
      const { numLayers } = made
      const config: TransformerConfig = {
        ...plainDecoder,
        numLayers,
        hiddenSize: widths.hidden,
        ffnHiddenSize: tp * widths.ffn,
        numAttentionHeads: Math.max(groups, tp) * queries,
        numQueryGroups: groups,
        kvChannels: 2,
        normalization: flags.layerNorm ? 'LayerNorm' : 'RMSNorm',
        layernormEpsilon: 1e-5,
        activation: 'silu',
        gatedLinearUnit: flags.gated,
        addQkvBias: flags.bias,
        addProjBias: flags.bias,
        addMlpBias: flags.bias,
        rotaryBase: 10_000,
        rotaryPercent: 1,
        rotaryInterleaved: false,
        ropeScaling: { type: 'default' },
        maxPositionEmbeddings: 64,
        vocabSize: widths.vocab,
        shareEmbeddingsAndOutputWeights: flags.tied,
        initMethodStd: 0.02,
        attentionDropout: 0,
        hiddenDropout: 0,
        paramsDtype: 'float32',
        qkLayernorm,
        ...(experts === null
          ? {}
          : {
              numMoeExperts: ep * experts,
              moeFfnHiddenSize: etp * widths.ffn,
              moeLayerFreq: Array.from({ length: numLayers }, (_, i) => (i > 0 && denseLayers[i % 3] ? 0 : 1)),
            }),
      }
      const parallel: ParallelConfig = {
        ...defaultParallel,
        tensorModelParallelSize: tp,
        pipelineModelParallelSize: made.pp,
        contextParallelSize: cp,
        expertModelParallelSize: experts === null ? 1 : ep,
        expertTensorParallelSize: experts === null ? 1 : etp,
        sequenceParallel: flags.sequenceParallel,
        ...made.fields,
      }
      return { config, parallel, worldSize: tp * cp * dp * made.pp }
    },
  )
