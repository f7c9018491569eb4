// What a configuration says of routers: what they are built from, what cannot be, and which losses of theirs a run tells.
import type { RouterLossName } from '../parallel/routerTotals.js'
import { type BalanceType, balanceNames, type RouterConfig } from '../parallel/topKRouter.js'
import { hasExperts, type TransformerConfig } from './transformerConfig.js'

export function routerConfig(config: TransformerConfig): RouterConfig {
  return {
    numExperts: config.numMoeExperts as number,
    topk: config.moeRouterTopk,
    preSoftmax: config.moeRouterPreSoftmax,
    scoreFunction: config.moeRouterScoreFunction,
    groups: config.moeRouterNumGroups ?? 1,
    groupTopk: config.moeRouterGroupTopk ?? 1,
    scaling: config.moeRouterTopkScalingFactor ?? 1,
    biasUpdateRate: config.moeRouterEnableExpertBias ? config.moeRouterBiasUpdateRate : null,
    float32: config.moeRouterDtype === 'fp32',
    auxLossCoeffs: auxLossCoeffs(config),
    zLossCoeff: config.moeZLossCoeff ?? 0,
    jitterEps: config.moeInputJitterEps ?? 0,
    forceBalance: config.moeRouterForceLoadBalancing,
  }
}

/** Of each balance loss its coefficient. */
export function auxLossCoeffs(config: TransformerConfig): RouterConfig['auxLossCoeffs'] {
  const { moeRouterLoadBalancingType: types, moeAuxLossCoeff: coeffs } = config
  const [named, numbers] = [[types].flat(), [coeffs].flat()] as const
  return Object.fromEntries(named.flatMap((type, i) => (type === 'none' ? [] : [[type, numbers[i] as number]])))
}

/** One type or `none` with a number, or as many numbers as types, each once. */
function balanceProblems({ moeRouterLoadBalancingType: types, moeAuxLossCoeff: coeffs }: TransformerConfig): string[] {
  const problems: string[] = []
  const known = Object.keys(balanceNames)
  const listed = Array.isArray(types)
  const named: readonly unknown[] = [types].flat()
  const numbers: readonly unknown[] = [coeffs].flat()
  const allowed = listed ? known : [...known, 'none']
  if (named.length === 0 || !named.every((type) => allowed.includes(type as string)))
    problems.push(
      `moeRouterLoadBalancingType must be one of ${known.join(', ')}, none, or a list of the first ${known.length}, got ${JSON.stringify(types)}`,
    )
  else if (new Set(named).size < named.length)
    problems.push(`moeRouterLoadBalancingType must name each loss once, got ${JSON.stringify(types)}`)
  if (!numbers.every((number) => typeof number === 'number' && number >= 0))
    problems.push(`moeAuxLossCoeff must be at least 0, got ${JSON.stringify(coeffs)}`)
  if (listed !== Array.isArray(coeffs) || (listed && named.length !== numbers.length))
    problems.push(
      `moeAuxLossCoeff must be a number for each type of moeRouterLoadBalancingType=${JSON.stringify(types)}, got ${JSON.stringify(coeffs)}`,
    )
  return problems
}

/** Everything about routers that cannot be. */
export function routerProblems(config: TransformerConfig): string[] {
  const { numMoeExperts: E, moeRouterTopk: K } = config
  if (E === null) return []
  const problems: string[] = []
  const say = (bad: boolean, text: string) => bad && problems.push(text)
  const oneOf = (key: keyof TransformerConfig, known: readonly (string | null)[]) =>
    say(
      !known.includes(config[key] as string | null),
      `${key} must be one of ${known.join(', ')}, got ${JSON.stringify(config[key])}`,
    )
  oneOf('moeRouterScoreFunction', ['softmax', 'sigmoid'])
  oneOf('moeRouterDtype', ['fp32', null])
  oneOf('moeTokenDropPolicy', ['probs', 'position'])
  oneOf('moeTokenDispatcherType', ['alltoall', 'allgather'])
  problems.push(...balanceProblems(config))
  say(!(K >= 1 && K <= E), `moeRouterTopk must be from 1 to numMoeExperts=${E}, got ${K}`)
  const { moeRouterNumGroups: groups, moeRouterGroupTopk: best, moeInputJitterEps: eps } = config
  say((groups === null) !== (best === null), 'moeRouterNumGroups and moeRouterGroupTopk go together: set both or none')
  if (groups !== null && best !== null) {
    const fits = E % groups === 0 && best >= 1 && best <= groups && K % best === 0 && K <= best * (E / groups)
    say(
      !fits,
      `moeRouterNumGroups=${groups} must divide numMoeExperts=${E}, moeRouterGroupTopk=${best} must divide moeRouterTopk=${K} and have as many experts`,
    )
  }
  const z = config.moeZLossCoeff
  say(z !== null && !(z >= 0), `moeZLossCoeff must be at least 0, got ${z}`)
  say(eps !== null && !(eps >= 0 && eps < 1), `moeInputJitterEps must be from 0 to below 1, got ${eps}`)
  say(
    config.moeRouterEnableExpertBias && config.moeRouterScoreFunction !== 'sigmoid',
    `moeRouterEnableExpertBias=true needs moeRouterScoreFunction=sigmoid, got ${config.moeRouterScoreFunction}`,
  )
  const capacity = config.moeExpertCapacityFactor
  say(capacity !== null && !(capacity > 0), `moeExpertCapacityFactor must be above 0, got ${capacity}`)
  const pads = config.moePadExpertInputToCapacity
  say(
    pads && capacity === null,
    'moePadExpertInputToCapacity=true needs moeExpertCapacityFactor: set that, or false here',
  )
  say(
    pads && config.moeTokenDispatcherType !== 'alltoall',
    `moePadExpertInputToCapacity=true needs moeTokenDispatcherType=alltoall, got ${config.moeTokenDispatcherType}`,
  )
  const rate = config.moeRouterBiasUpdateRate
  say(!(rate >= 0 && Number.isFinite(rate)), `moeRouterBiasUpdateRate must be at least 0, got ${rate}`)
  const scaling = config.moeRouterTopkScalingFactor
  say(scaling !== null && !(scaling > 0), `moeRouterTopkScalingFactor must be above 0, got ${scaling}`)
  return problems
}

/** Rows that an expert takes at most of so many choices of a rank's tokens. */
export const expertCapacity = (choices: number, numExperts: number, factor: number): number =>
  Math.ceil((choices / numExperts) * factor)

/** Losses of routers that a run tells beside the model's, in this order. */
export function routerLosses(config: TransformerConfig): RouterLossName[] {
  if (layersWithExperts(config) === 0) return []
  const { moeZLossCoeff } = config
  return [
    ...(Object.entries(auxLossCoeffs(config)) as [BalanceType, number][]).flatMap(([type, coeff]) =>
      coeff > 0 ? [balanceNames[type]] : [],
    ),
    ...(moeZLossCoeff !== null && moeZLossCoeff > 0 ? ['z_loss' as const] : []),
  ]
}

export function layersWithExperts(config: TransformerConfig): number {
  return Array.from({ length: config.numLayers }, (_, layer) => hasExperts(config, layer)).filter(Boolean).length
}
