// Bytes on a rank of each pipeline stage, as a table.
import type { ResolvedConfig } from '../config/resolve.js'
import { type PipelinePart, pipelineStages } from '../parallel/pipelineStages.js'
import type { MemoryUse } from '../plan/memory.js'
import { formatBytes, table } from './terminal.js'

/** `embedding, 0-3` */
function nameOf({ first, end, hasEmbedding, hasHead }: PipelinePart): string {
  const layers = end - first === 0 ? [] : [end - first === 1 ? String(first) : `${first}-${end - 1}`]
  return [...(hasEmbedding ? ['embedding'] : []), ...layers, ...(hasHead ? ['output'] : [])].join(', ') || 'nothing'
}

/**
 * A row a stage: its blocks, chunk by chunk, and what a rank of it needs at its peak; of the host's memory where something is offloaded.
 * @param stages - as memoryByStage gives them.
 */
export function memoryTable({ config }: ResolvedConfig, stages: readonly MemoryUse[]): string {
  const { model } = config
  const { chunks, partOf } = pipelineStages(model, model.numLayers)
  const offloads = stages.some(({ host }) => host > 0)
  return table(
    [
      'stage',
      'blocks',
      'weights',
      'gradients',
      'optimizer',
      'activations',
      'total a rank',
      ...(offloads ? ['host'] : []),
    ],
    stages.map(({ weights, gradients, optimizer, activations, total, host }, stage) => [
      String(stage),
      Array.from({ length: chunks }, (_, chunk) => nameOf(partOf(stage, chunk))).join(' | '),
      ...[weights, gradients, optimizer, activations, total, ...(offloads ? [host] : [])].map((bytes) =>
        formatBytes(Math.round(bytes)),
      ),
    ]),
  )
}
