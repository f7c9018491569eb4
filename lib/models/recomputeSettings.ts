// Which activations are computed again in the backward pass instead of being kept, by Megatron-Core's settings: what they may be, and
// how a chunk's layers run by them.
import type { PipelinePart } from '../parallel/pipelineStages.js'

const modules = ['core_attn', 'layernorm', 'mlp_act', 'mlp', 'moe'] as const

/** A part of a layer that can run again by itself. */
export type RecomputeModule = (typeof modules)[number]

/** Megatron-Core's other modules, and what a model of ours lacks for them. */
const unbuilt: Readonly<Record<string, string>> = {
  moe_act: 'activations of experts alone',
  shared_experts: 'shared experts',
  mla_up_proj: 'multi-latent attention',
}

export interface RecomputeSettings {
  /** 'full': whole layers run again, 'selective': the parts that recomputeModules names; null: all activations are kept. */
  recomputeGranularity: 'full' | 'selective' | null
  /**
   * full: 'uniform': the layers of a chunk in groups of recomputeNumLayers, of which only the input is kept; 'block': the first
   * recomputeNumLayers layers of each chunk one by one, the others keep their activations. null: uniform.
   */
  recomputeMethod: 'uniform' | 'block' | null
  /** full: layers of a group (uniform) or of each chunk (block); null: 1, uniform only. */
  recomputeNumLayers: number | null
  /**
   * selective: 'core_attn': attention without its linears; 'layernorm': the norms of a layer; 'mlp_act': the gated activation of
   * dense layers (Megatron-Core has it for experts alone); these give up what they made as soon as it was read. 'mlp': the feed-forward
   * part of dense layers with its norm, 'moe': of those with experts. null: core_attn.
   */
  recomputeModules: readonly RecomputeModule[] | null
}

export const defaultRecompute: Readonly<RecomputeSettings> = {
  recomputeGranularity: null,
  recomputeMethod: null,
  recomputeNumLayers: null,
  recomputeModules: ['core_attn'],
}

/** The modules that run again; none unless selective. */
export function selectedModules(settings: RecomputeSettings): ReadonlySet<RecomputeModule> {
  if (settings.recomputeGranularity !== 'selective') return new Set()
  return new Set(settings.recomputeModules ?? defaultRecompute.recomputeModules)
}

/** Consecutive layers of a chunk, by index. */
export interface LayerRun {
  readonly layers: readonly number[]
  /** They run again together in the backward pass; only the input of the first is kept. */
  readonly again: boolean
}

/** How the layers of a chunk run under a tape, in order. */
export function layerRuns(settings: RecomputeSettings, { first, end }: PipelinePart): LayerRun[] {
  const layers = Array.from({ length: end - first }, (_, i) => first + i)
  if (settings.recomputeGranularity !== 'full') return layers.length === 0 ? [] : [{ layers, again: false }]
  const count = settings.recomputeNumLayers ?? 1
  if (settings.recomputeMethod === 'block') {
    const again = layers.slice(0, count).map((layer) => ({ layers: [layer], again: true }))
    return layers.length > count ? [...again, { layers: layers.slice(count), again: false }] : again
  }
  const groups: LayerRun[] = []
  for (let at = 0; at < layers.length; at += count) groups.push({ layers: layers.slice(at, at + count), again: true })
  return groups
}

/**
 * Everything that is wrong with the settings, each line beginning with its field.
 * @param mostLayers - layers of the largest chunk of a stage; null where the layout does not tell.
 */
export function recomputeProblems(settings: RecomputeSettings, mostLayers: number | null): string[] {
  const { recomputeGranularity: granularity, recomputeMethod: method, recomputeNumLayers: count } = settings
  const problems: string[] = []
  const say = (bad: boolean, text: string) => bad && problems.push(text)
  const shown = JSON.stringify
  say(
    !['full', 'selective', null].includes(granularity),
    `recomputeGranularity must be 'full', 'selective' or null, got ${shown(granularity)}`,
  )
  say(
    !['uniform', 'block', null].includes(method),
    `recomputeMethod must be 'uniform', 'block' or null, got ${shown(method)}`,
  )
  const needsFull = `needs recomputeGranularity='full', got ${shown(granularity)}: set that, or null here`
  say(method !== null && granularity !== 'full', `recomputeMethod=${shown(method)} ${needsFull}`)
  say(count !== null && granularity !== 'full', `recomputeNumLayers=${shown(count)} ${needsFull}`)
  const isCount = Number.isSafeInteger(count) && (count as number) >= 1
  if (count !== null && !isCount)
    problems.push(`recomputeNumLayers must be a whole number of at least 1, got ${shown(count)}`)
  else if (count !== null && mostLayers !== null && count > mostLayers)
    problems.push(
      `recomputeNumLayers must be at most ${mostLayers}, the layers of a stage's largest chunk, got ${count}`,
    )
  say(
    method === 'block' && count === null,
    "recomputeNumLayers must be set for recomputeMethod='block': the number of layers of each chunk that run again",
  )
  return [...problems, ...moduleProblems(settings)]
}

function moduleProblems({ recomputeGranularity, recomputeModules: names }: RecomputeSettings): string[] {
  if (names === null) return []
  const known = modules.join(', ')
  if (!Array.isArray(names)) return [`recomputeModules must be a list of ${known}, got ${JSON.stringify(names)}`]
  const problems = (names as readonly unknown[]).flatMap((name) => {
    if ((modules as readonly unknown[]).includes(name)) return []
    const lacks = typeof name === 'string' && Object.hasOwn(unbuilt, name) ? unbuilt[name] : undefined
    const got = `recomputeModules has ${JSON.stringify(name)}`
    return [
      lacks === undefined
        ? `${got}, expected ${known}`
        : `${got}, which belongs to ${lacks}, not built yet: use ${known}`,
    ]
  })
  const isDefault = names.length === 1 && names[0] === 'core_attn'
  if (recomputeGranularity === 'selective') {
    if (names.length === 0)
      problems.push(`recomputeModules is empty for recomputeGranularity='selective': use ${known}`)
  } else if (!isDefault && names.length > 0)
    problems.push(
      `recomputeModules=[${names.join(', ')}] needs recomputeGranularity='selective', got ${JSON.stringify(recomputeGranularity)}`,
    )
  return problems
}
