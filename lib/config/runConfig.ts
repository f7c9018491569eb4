// RunConfig: everything that decides a training run, in one sealed tree. Recipes make one, users assign to it, `resolve`
// checks and freezes it. Unknown and snake_case keys throw at the assignment and name the key that is meant.
import { ViaductError } from '../base/errors.js'
import { sealed, unknownKey } from '../base/sealed.js'
import type { GPTModelProvider } from '../models/provider.js'
import { defaults, type MixedPrecision, type SectionName, type Sections } from './sections.js'

/** Everything that decides a training run. */
export interface RunConfig extends Sections {
  /** The model, its parallel sizes and its sequence length. */
  model: GPTModelProvider
  mixedPrecision: MixedPrecision
}

/** What `runConfig` takes: sections may be given in part. */
export type RunConfigInit = { readonly [K in SectionName]?: Partial<Sections[K]> } & {
  readonly model: GPTModelProvider
  readonly mixedPrecision?: MixedPrecision
}

const frozenConfigs = new WeakSet<object>()
export const sectionNames = Object.keys(defaults) as SectionName[]

/**
 * A sealed RunConfig: defaults, with `init` on top.
 * @throws ERR_CONFIG for an unknown key; it names the nearest.
 */
export function runConfig(init: RunConfigInit): RunConfig {
  const tree = {} as Record<string, unknown>
  const isFrozen = () => frozenConfigs.has(tree)
  const section = (name: SectionName, given: unknown) => {
    if (typeof given !== 'object' || given === null || Array.isArray(given)) {
      throw new ViaductError('ERR_CONFIG', `config.${name}`, `expected an object, got ${JSON.stringify(given)}`)
    }
    const object = sealed(structuredClone(defaults[name]) as object, `config.${name}`, { frozen: isFrozen })
    for (const [key, value] of Object.entries(given)) Reflect.set(object, key, value)
    return object
  }
  for (const key of Object.keys(init)) {
    if (key !== 'model' && key !== 'mixedPrecision' && !Object.hasOwn(defaults, key)) {
      throw unknownKey('config', key, ['model', ...sectionNames, 'mixedPrecision'])
    }
  }
  tree['model'] = init.model
  for (const name of sectionNames) tree[name] = section(name, init[name] ?? {})
  tree['mixedPrecision'] = init.mixedPrecision === undefined ? 'bf16_mixed' : init.mixedPrecision
  const config = sealed(tree, 'config', {
    frozen: isFrozen,
    check: (key, value) => (Object.hasOwn(defaults, key) ? section(key as SectionName, value) : value),
  })
  trees.set(config, tree)
  return config as unknown as RunConfig
}

const trees = new WeakMap<object, object>()

/** No field may change any more. */
export function freezeConfig(config: RunConfig): void {
  const tree = trees.get(config)
  if (tree !== undefined) frozenConfigs.add(tree)
}

/** True after `freezeConfig`. */
export function isFrozenConfig(config: RunConfig): boolean {
  return frozenConfigs.has(trees.get(config) ?? config)
}
