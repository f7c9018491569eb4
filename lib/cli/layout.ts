// The layout flags: --tp --pp --vpp --cp --ep --etp --dp --no-sp and how blocks are spread over stages; the ranks that
// they mean, and whether a model fits.
import { type Command, InvalidArgumentError, Option } from 'commander'
import { layoutProblems, runnableProblems } from '../models/layoutShards.js'
import type { TransformerConfig } from '../models/transformerConfig.js'
import {
  type CpCommType,
  cpCommTypes,
  defaultParallel,
  type ParallelConfig,
  parallelOf,
  parallelProblems,
  refuseLayout,
  smallestWorld,
} from '../parallel/config.js'

/** The flags as commander gives them. */
export interface LayoutFlags {
  tp?: number
  pp?: number
  vpp?: number
  cp?: number
  cpCommType?: CpCommType
  hierarchicalContextParallelSizes?: number[]
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
    .addOption(
      new Option('--cp-comm-type <form>', 'how attention sees tokens of other ranks of cp').choices(cpCommTypes),
    )
    .option(
      '--hierarchical-context-parallel-sizes <a,b>',
      'for a2a+p2p: ranks that exchange tokens for heads, and groups of them in the ring',
      (text) => text.split(',').map(positiveInt),
    )
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
    cpCommType: 'cp-comm-type',
    hierarchicalContextParallelSizes: 'hierarchical-context-parallel-sizes',
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

/** Sizes, and the ranks that they mean. Whether they fit a model is not checked yet: see checkLayout. */
export interface ChosenLayout {
  readonly parallel: ParallelConfig
  /** tp·pp·cp·dp; 0 where the sizes do not even make a world. */
  readonly worldSize: number
  /** Flags that contradict each other. */
  readonly conflicts: readonly string[]
}

/** Sizes as given; what was not given is 1. */
function parallelOfFlags(flags: LayoutFlags): ParallelConfig {
  return parallelOf({
    tensorModelParallelSize: flags.tp ?? 1,
    pipelineModelParallelSize: flags.pp ?? 1,
    virtualPipelineModelParallelSize: flags.vpp ?? null,
    contextParallelSize: flags.cp ?? 1,
    cpCommType: flags.cpCommType ?? defaultParallel.cpCommType,
    hierarchicalContextParallelSizes: flags.hierarchicalContextParallelSizes ?? null,
    expertModelParallelSize: flags.ep ?? 1,
    expertTensorParallelSize: flags.etp ?? 1,
    sequenceParallel: flags.sp !== false && (flags.tp ?? 1) > 1,
    pipelineModelParallelLayout: flags.pipelineLayout ?? null,
    numLayersInFirstPipelineStage: flags.numLayersInFirstPipelineStage ?? null,
    numLayersInLastPipelineStage: flags.numLayersInLastPipelineStage ?? null,
  })
}

/**
 * The ranks of a layout: those that are given (a launcher's, or --nproc-per-node), else tp·pp·cp·dp with dp as given or the
 * smallest that lets ep·etp divide.
 */
export function chosenWorld(parallel: ParallelConfig, dp: number | undefined, ranks: number | null): ChosenLayout {
  if (parallelProblems(parallel).length > 0) return { parallel, worldSize: 0, conflicts: [] }
  const model = parallel.tensorModelParallelSize * parallel.pipelineModelParallelSize * parallel.contextParallelSize
  if (ranks === null)
    return { parallel, worldSize: dp === undefined ? smallestWorld(parallel) : model * dp, conflicts: [] }
  const fits = dp === undefined || dp * model === ranks
  const instead = ranks % model === 0 ? `leave it out, or give --dp ${ranks / model}` : 'leave it out'
  const conflicts = fits ? [] : [`--dp ${dp} times tp·pp·cp = ${model} conflicts with ${ranks} ranks: ${instead}`]
  return { parallel, worldSize: ranks, conflicts }
}

/**
 * What the flags say.
 * @param ranks - of the launcher that started this process; null: a stand-alone command.
 * @throws ERR_LAYOUT_INVALID for sizes that do not fit these ranks.
 */
export function chosenLayout(flags: LayoutFlags, ranks: number | null): ChosenLayout {
  const layout = chosenWorld(parallelOfFlags(flags), flags.dp, ranks)
  const { parallel, conflicts } = layout
  refuseLayout(ranks === null ? [] : [...conflicts, ...parallelProblems(parallel, ranks)])
  return layout
}

/**
 * Refuses a layout before any process starts.
 * @param runs - the model is to compute in it; false: it only converts.
 * @throws ERR_LAYOUT_INVALID with all problems, each with what works.
 */
export function checkLayout(layout: ChosenLayout, model: TransformerConfig, runs: boolean): void {
  refuseLayout((runs ? runnableProblems : layoutProblems)(model, layout.parallel, layout.worldSize))
}
