// The layout flags: --tp --pp --vpp --cp --ep --etp --dp --no-sp and how blocks are spread over stages; and the number of ranks
// that they mean.
import { type Command, InvalidArgumentError } from 'commander'
import { ViaductError } from '../base/errors.js'
import { checkParallel, checkRunnable, type ParallelConfig, parallelOf, smallestWorld } from '../parallel/config.js'

/** The flags as commander gives them. */
export interface LayoutFlags {
  tp?: number
  pp?: number
  vpp?: number
  cp?: number
  ep?: number
  etp?: number
  dp?: number
  sp?: boolean
  pipelineLayout?: string
  numLayersInFirstPipelineStage?: number
  numLayersInLastPipelineStage?: number
}

/** For commander: a whole number of at least 1. */
export function positiveInt(text: string): number {
  const value = Number(text)
  if (!Number.isInteger(value) || value < 1) throw new InvalidArgumentError('expected a whole number of at least 1.')
  return value
}

/** Adds the layout flags to a command. */
export function addLayoutFlags(command: Command): Command {
  return command
    .option('--tp <n>', 'tensor parallel size', positiveInt)
    .option('--pp <n>', 'pipeline parallel size', positiveInt)
    .option('--vpp <n>', 'virtual stages a pipeline rank', positiveInt)
    .option('--cp <n>', 'context parallel size', positiveInt)
    .option('--ep <n>', 'expert parallel size', positiveInt)
    .option('--etp <n>', 'expert tensor parallel size', positiveInt)
    .option('--dp <n>', 'data parallel size', positiveInt)
    .option('--no-sp', 'no sequence parallelism (it is on where --tp > 1)')
    .option('--pipeline-layout <stages>', "what each stage holds, in Megatron's form, e.g. 'Ett|(ttt|)*2tL'")
    .option('--num-layers-in-first-pipeline-stage <n>', 'blocks of the first stage', positiveInt)
    .option('--num-layers-in-last-pipeline-stage <n>', 'blocks of the last stage', positiveInt)
}

/** The flags again as arguments, for the ranks that are started. */
export function layoutArguments(flags: LayoutFlags): string[] {
  const names = {
    tp: 'tp',
    pp: 'pp',
    vpp: 'vpp',
    cp: 'cp',
    ep: 'ep',
    etp: 'etp',
    dp: 'dp',
    pipelineLayout: 'pipeline-layout',
    numLayersInFirstPipelineStage: 'num-layers-in-first-pipeline-stage',
    numLayersInLastPipelineStage: 'num-layers-in-last-pipeline-stage',
  } as const
  const given = Object.entries(names).flatMap(([key, flag]) => {
    const value = flags[key as keyof typeof names]
    return value === undefined ? [] : [`--${flag}`, String(value)]
  })
  return flags.sp === false ? [...given, '--no-sp'] : given
}

/** Sizes of a layout that converts; what was not given is 1. @throws ERR_LAYOUT_INVALID with all problems. */
export function parallelFromFlags(flags: LayoutFlags): ParallelConfig {
  const parallel = parallelOf({
    tensorModelParallelSize: flags.tp ?? 1,
    pipelineModelParallelSize: flags.pp ?? 1,
    virtualPipelineModelParallelSize: flags.vpp ?? null,
    contextParallelSize: flags.cp ?? 1,
    expertModelParallelSize: flags.ep ?? 1,
    expertTensorParallelSize: flags.etp ?? 1,
    sequenceParallel: flags.sp !== false && (flags.tp ?? 1) > 1,
    pipelineModelParallelLayout: flags.pipelineLayout ?? null,
    numLayersInFirstPipelineStage: flags.numLayersInFirstPipelineStage ?? null,
    numLayersInLastPipelineStage: flags.numLayersInLastPipelineStage ?? null,
  })
  checkParallel(parallel)
  return parallel
}

/** As parallelFromFlags, for a model that runs. @throws ERR_LAYOUT_INVALID also for what is not built yet. */
export function runnableFromFlags(flags: LayoutFlags): ParallelConfig {
  const parallel = parallelFromFlags(flags)
  checkRunnable(parallel)
  return parallel
}

/**
 * Ranks that a stand-alone command starts: tp·pp·cp·dp, with dp as given or the smallest that lets ep·etp divide.
 * Under a launcher the world is given: a --dp that conflicts is wrong use.
 */
export function worldSizeOf(flags: LayoutFlags, launched: number | null): number {
  const model = (flags.tp ?? 1) * (flags.pp ?? 1) * (flags.cp ?? 1)
  if (launched === null) return flags.dp === undefined ? smallestWorld(parallelFromFlags(flags)) : model * flags.dp
  if (launched % model !== 0) {
    throw new ViaductError(
      'ERR_LAYOUT_INVALID',
      'layout',
      `tp·pp·cp = ${model} must divide the ${launched} ranks of the launcher`,
    )
  }
  const dp = launched / model
  if (flags.dp !== undefined && flags.dp !== dp) {
    throw new ViaductError(
      'ERR_LAYOUT_INVALID',
      'layout',
      `--dp ${flags.dp} conflicts with WORLD_SIZE / (tp·pp·cp) = ${dp}: leave --dp out`,
    )
  }
  return launched
}
