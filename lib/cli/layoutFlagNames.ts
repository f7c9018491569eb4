// The layout flags by the config's names, for messages that name fields where a user gave flags. What flags do is in layout.ts.

/** Field of a ParallelConfig to flag. */
export const flagsOfFields = {
  tensorModelParallelSize: '--tp',
  pipelineModelParallelSize: '--pp',
  virtualPipelineModelParallelSize: '--vpp',
  contextParallelSize: '--cp',
  cpCommType: '--cp-comm-type',
  hierarchicalContextParallelSizes: '--hierarchical-context-parallel-sizes',
  expertModelParallelSize: '--ep',
  expertTensorParallelSize: '--etp',
  pipelineModelParallelLayout: '--pipeline-layout',
  numLayersInFirstPipelineStage: '--num-layers-in-first-pipeline-stage',
  numLayersInLastPipelineStage: '--num-layers-in-last-pipeline-stage',
} as const

/** One line that says which flags set the fields that a text names; empty where there is none. */
export function flagsNamed(text: string): string {
  const named = Object.entries(flagsOfFields).filter(([key]) => new RegExp(`\\b${key}\\b`).test(text))
  return named.length === 0 ? '' : `flags: ${named.map(([key, flag]) => `${flag} is ${key}`).join(', ')}`
}
