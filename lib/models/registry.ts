// The families that are built, and those that a program adds. A family is found by `architectures`, and `model_type` must agree.
import { nearest, ViaductError } from '../base/errors.js'
import { llama } from './families/llama.js'
import { mixtral } from './families/mixtral.js'
import { olmoe } from './families/olmoe.js'
import { qwen2Moe } from './families/qwen2Moe.js'
import { qwen3Moe } from './families/qwen3Moe.js'
import type { FamilySpec, HfConfig } from './family.js'
import type { TransformerConfig } from './transformerConfig.js'

const families = new Map<string, FamilySpec>()

/**
 * Adds a family; later conversions find it by its architectures.
 * @throws ERR_CONFIG when an architecture is taken.
 */
export function registerFamily(spec: FamilySpec): void {
  const taken = spec.architectures.filter((name) => families.has(name) && families.get(name) !== spec)
  if (taken.length > 0)
    throw new ViaductError('ERR_CONFIG', 'registry', `expected new architectures, got ${taken.join(', ')} again`)
  for (const name of spec.architectures) families.set(name, spec)
}

for (const family of [llama, mixtral, olmoe, qwen2Moe, qwen3Moe]) registerFamily(family)

/** True when models of this architecture train and generate, besides converting. */
export function runs(architecture: string): boolean {
  return families.get(architecture)?.runs ?? false
}

/** Architectures that convert, sorted. */
export function listArchitectures(): string[] {
  return [...families.keys()].sort()
}

/** What is known of each architecture, sorted by name. */
export function describeArchitectures(): { architecture: string; modelType: string; converts: true; runs: boolean }[] {
  return listArchitectures().map((architecture) => {
    const { modelType, runs } = families.get(architecture) as FamilySpec
    return { architecture, modelType, converts: true, runs }
  })
}

/** Architectures that a config names. */
function architecturesOf(config: HfConfig): string[] {
  const value = config['architectures']
  return Array.isArray(value) ? value.filter((name): name is string => typeof name === 'string') : []
}

/** True when a family is there for this config; nothing else is checked. */
export function supports(config: HfConfig): boolean {
  return architecturesOf(config).some((name) => {
    const family = families.get(name)
    return family !== undefined && family.modelType === config['model_type']
  })
}

/**
 * The family of a config.
 * @throws ERR_ARCHITECTURE naming what came and what is supported.
 */
export function familyOf(config: HfConfig): FamilySpec {
  const names = architecturesOf(config)
  const known = listArchitectures().join(', ')
  for (const name of names) {
    const family = families.get(name)
    if (family === undefined) continue
    if (config['model_type'] === family.modelType) return family
    throw new ViaductError(
      'ERR_ARCHITECTURE',
      'registry',
      `expected model_type ${JSON.stringify(family.modelType)} for ${name}, got ${JSON.stringify(config['model_type'] ?? null)}`,
      { architectures: names, modelType: config['model_type'] ?? null },
    )
  }
  const near = names.map((name) => nearest(name, families.keys())).find((name) => name !== undefined)
  throw new ViaductError(
    'ERR_ARCHITECTURE',
    'registry',
    `expected architectures to hold one of ${known}, got ${JSON.stringify(config['architectures'] ?? null)}${near ? `: did you mean ${near}?` : ''}`,
    { architectures: names, supported: listArchitectures() },
  )
}

/** The first family that can write this model as its own, with the config it would have; null when none can. */
export function expressAsHf(
  config: TransformerConfig,
): { readonly family: FamilySpec; readonly config: HfConfig } | null {
  for (const family of new Set(families.values())) {
    try {
      return { family, config: family.toHf(config, null) }
    } catch (error) {
      // This family has another shape; the next one may fit.
      if (!(error instanceof ViaductError)) throw error
    }
  }
  return null
}
