// The configuration of `viaduct train`: recipe, then YAML, then flags, then overrides.
import { readFile } from 'node:fs/promises'
import { resolve as absolute, basename } from 'node:path'
import { parse } from 'yaml'
import { recipes } from '../../recipes/index.js'
import { nearest, ViaductError } from '../base/errors.js'
import { AutoBridge } from '../bridge/autoBridge.js'
import { isCheckpoint } from '../checkpoint/checkpointIndex.js'
import { applyOverrides, applyYaml } from '../config/overrides.js'
import { configProblems, type ResolvedConfig, refuseConfig, resolve } from '../config/resolve.js'
import { type RunConfig, runConfig } from '../config/runConfig.js'
import type { RecomputeModule } from '../models/recomputeSettings.js'
import { parallelOf } from '../parallel/config.js'
import { chosenLayout, chosenWorld, type LayoutFlags, layoutArguments } from './layout.js'

/** The flags of `viaduct train` that make the configuration. */
export interface TrainFlags extends LayoutFlags {
  hf?: string
  data?: string
  tokenizer?: string
  save?: string
  load?: string
  recomputeGranularity?: 'full' | 'selective'
  recomputeMethod?: 'uniform' | 'block'
  recomputeNumLayers?: number
  recomputeModules?: string
  cpuOffloadingNumLayers?: number
  fsdp?: boolean
  optimizerCpuOffload?: boolean
  optimizerOffloadFraction?: number
}

const isYaml = (name: string) => /\.ya?ml$/i.test(name)

function fromRecipe(name: string): RunConfig {
  const found = recipes.find((recipe) => recipe.name === name)
  if (found !== undefined) return found.config()
  const near = nearest(
    name,
    recipes.map((recipe) => recipe.name),
  )
  const help = near === undefined ? '`viaduct recipes` lists them' : `did you mean ${near}?`
  throw new ViaductError(
    'ERR_USAGE',
    'train',
    `expected a recipe or a .yaml file, got ${JSON.stringify(name)}: ${help}`,
  )
}

/** A YAML file may name the recipe that it changes under `recipe:`; the rest is sections of a RunConfig. */
async function readYaml(file: string): Promise<{ recipe: string | null; text: string }> {
  let text: string
  try {
    text = await readFile(file, 'utf8')
  } catch (cause) {
    throw new ViaductError(
      'ERR_FILE_MISSING',
      'train',
      `cannot read ${file}: ${(cause as Error).message}`,
      { file },
      { cause },
    )
  }
  let document: unknown
  try {
    document = parse(text)
  } catch (cause) {
    throw new ViaductError('ERR_CONFIG', 'train', `${file}: ${(cause as Error).message}`, { file }, { cause })
  }
  const recipe = (document as { recipe?: unknown } | null)?.recipe
  if (recipe === undefined) return { recipe: null, text }
  if (typeof recipe !== 'string')
    throw new ViaductError(
      'ERR_CONFIG',
      'train',
      `expected recipe in ${file} to be a name, got ${JSON.stringify(recipe)}`,
    )
  return { recipe, text: text.replace(/^recipe:.*$/m, '') }
}

/**
 * The configuration of a command line.
 * @param recipe - recipe name, YAML file or, for --hf alone, undefined; a `key=value` here is the first override.
 */
export async function trainConfig(
  recipe: string | undefined,
  overrides: readonly string[],
  flags: TrainFlags,
): Promise<RunConfig> {
  const named = recipe !== undefined && !recipe.includes('=') ? recipe : undefined
  const changes = named === recipe ? overrides : [recipe as string, ...overrides]
  const yaml = named !== undefined && isYaml(named) ? await readYaml(named) : null
  const base = yaml === null ? named : (yaml.recipe ?? undefined)
  if (base === undefined && flags.hf === undefined) {
    throw new ViaductError(
      'ERR_USAGE',
      'train',
      'expected a recipe, a .yaml file that names one under `recipe:`, or --hf DIR: `viaduct recipes` lists recipes',
    )
  }
  const provider =
    flags.hf === undefined
      ? null
      : (await AutoBridge.fromHfPretrained(flags.hf)).toMegatronProvider({ loadWeights: false })
  let config: RunConfig
  if (base !== undefined) {
    config = fromRecipe(base)
    if (provider !== null) {
      provider.seqLength = Math.min(config.model.seqLength, provider.maxPositionEmbeddings)
      config.model = provider
    }
  } else {
    const model = provider as NonNullable<typeof provider>
    model.seqLength = Math.min(512, model.maxPositionEmbeddings)
    config = runConfig({
      model,
      mixedPrecision: model.paramsDtype === 'float32' ? 'fp32' : 'bf16_mixed',
      // Also a small text leaves a sequence for validation.
      dataset: { split: '95,5' },
    })
  }
  if (flags.hf !== undefined) {
    config.checkpoint.pretrainedCheckpoint = absolute(flags.hf)
    config.tokenizer.tokenizerType = 'HuggingFaceTokenizer'
    config.tokenizer.tokenizerModel = absolute(flags.hf)
  }
  if (yaml !== null) applyYaml(config, yaml.text)
  await applyFlags(config, flags)
  applyOverrides(config, changes)
  return config
}

/** Flags that are not given leave what the recipe says. Which names and numbers fit is checked with the whole configuration. */
function applyRecompute({ model }: RunConfig, flags: TrainFlags): void {
  const { recomputeGranularity, recomputeMethod, recomputeNumLayers, recomputeModules } = flags
  if (recomputeGranularity !== undefined) model.recomputeGranularity = recomputeGranularity
  if (recomputeMethod !== undefined) model.recomputeMethod = recomputeMethod
  if (recomputeNumLayers !== undefined) model.recomputeNumLayers = recomputeNumLayers
  if (recomputeModules !== undefined) model.recomputeModules = recomputeModules.split(',') as RecomputeModule[]
}

function applyOffload({ model, optimizer }: RunConfig, flags: TrainFlags): void {
  const { cpuOffloadingNumLayers, optimizerCpuOffload, optimizerOffloadFraction } = flags
  if (cpuOffloadingNumLayers !== undefined)
    Object.assign(model, { cpuOffloading: cpuOffloadingNumLayers > 0, cpuOffloadingNumLayers })
  if (optimizerCpuOffload !== undefined) optimizer.optimizerCpuOffload = optimizerCpuOffload
  if (optimizerOffloadFraction !== undefined) optimizer.optimizerOffloadFraction = optimizerOffloadFraction
}

async function applyFlags(config: RunConfig, flags: TrainFlags): Promise<void> {
  const { dp: _dp, sp: _sp, ...model } = flags
  if (layoutArguments(model).length > 0) Object.assign(config.model, chosenLayout(flags, null).parallel)
  else if (flags.sp === false) config.model.sequenceParallel = false
  applyRecompute(config, flags)
  applyOffload(config, flags)
  if (flags.fsdp !== undefined) config.ddp.useMegatronFsdp = flags.fsdp
  if (flags.data !== undefined) {
    config.dataset.kind = 'text'
    config.dataset.path = absolute(flags.data)
    if (/\.(bin|idx)$/.test(basename(flags.data))) {
      config.dataset.kind = 'indexed'
      config.dataset.path = absolute(flags.data).replace(/\.(bin|idx)$/, '')
    }
  }
  if (flags.tokenizer !== undefined) {
    config.tokenizer.tokenizerType = 'HuggingFaceTokenizer'
    config.tokenizer.tokenizerModel = absolute(flags.tokenizer)
  }
  if (flags.save !== undefined) {
    config.checkpoint.save = absolute(flags.save)
    config.checkpoint.load = absolute(flags.save)
  }
  if (flags.load !== undefined && !(flags.save !== undefined && (await isCheckpoint(flags.save)))) {
    config.checkpoint.load = absolute(flags.load)
    config.checkpoint.exitOnMissingCheckpoint = true
  }
}

/** A configuration that can run, and on how many ranks. */
export interface ResolvedTraining {
  readonly resolved: ResolvedConfig
  readonly ranks: number
}

/**
 * Finds everything that can be wrong before a process starts.
 * @param given - ranks of a launcher or of --nproc-per-node; null: those of the layout.
 * @throws ERR_CONFIG with all problems.
 */
export function resolveTraining(config: RunConfig, flags: LayoutFlags, given: number | null): ResolvedTraining {
  const parallel = parallelOf(config.model)
  const { worldSize: ranks, conflicts } = chosenWorld(parallel, flags.dp, given)
  refuseConfig([...conflicts, ...configProblems(config, ranks)])
  return { resolved: resolve(config, ranks), ranks }
}
