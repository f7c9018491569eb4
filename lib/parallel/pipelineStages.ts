// Which stage, and which chunk of it, holds each block. With virtual stages the pipeline passes all stages once for chunk 0, then
// again for chunk 1: "slots" below are these passes in order, slot = chunk * pp + stage. Counts are Megatron's.
import { defaultParallel, type ParallelConfig, refuseLayout } from './config.js'

/** A block of the model by index, or what lies before and after all blocks. */
export type LayerPlace = number | 'embedding' | 'final'

/** What one chunk of one stage holds. */
export interface PipelinePart {
  /** Blocks `first` to `end` - 1 of the whole model. */
  readonly first: number
  readonly end: number
  readonly hasEmbedding: boolean
  /** Final norm, output layer and loss. */
  readonly hasHead: boolean
}

export interface PipelineStages {
  /** Chunks on each stage. */
  readonly chunks: number
  /** Number of blocks in each slot, in the order of the pipeline. */
  readonly slots: readonly number[]
  /** The stage and chunk of a block, of the embedding, or of the final norm and output layer. */
  placeOf(layer: LayerPlace): { readonly stage: number; readonly chunk: number }
  /** What a chunk of a stage holds. */
  partOf(stage: number, chunk: number): PipelinePart
}

/** Longest expanded layout, in characters: some hundred times more than any model has layers. */
const longestLayout = 100_000

const layoutForm = 'E embedding, t block, L loss, | next stage, t*3 and (tt|)*3 repetition'

const accounting = ['accountForEmbeddingInPipelineSplit', 'accountForLossInPipelineSplit'] as const

/** The stages of a layout string, repetitions written out. */
function readLayout(text: string): { stages: string[]; problem: string | null } {
  let length = 0
  const repeat = (_: string, what: string, times: string): string => {
    length += what.length * Number(times)
    return length > longestLayout ? '' : what.repeat(Number(times))
  }
  const written = text
    .replaceAll(',', '')
    .replace(/\(([^()]+)\)\*(\d+)/g, repeat)
    .replace(/([^*()])\*(\d+)/g, repeat)
  if (length > longestLayout) return { stages: [], problem: `has more than ${longestLayout} layers` }
  if (written.includes('m'))
    return { stages: [], problem: 'has a layer m (multi-token prediction): the model has none, leave it out' }
  const strange = /[^EtL|]/.exec(written)
  if (strange)
    return { stages: [], problem: `has ${JSON.stringify(strange[0])} where one of these is expected: ${layoutForm}` }
  return { stages: written.split('|'), problem: null }
}

/** A layout that fits: blocks as even as they go, the first stages have one more. */
function exampleLayout(parallel: ParallelConfig, numLayers: number): string {
  const slots = parallel.pipelineModelParallelSize * (parallel.virtualPipelineModelParallelSize ?? 1)
  const counts = Array.from({ length: slots }, (_, slot) => Math.max(0, Math.ceil((numLayers - slot) / slots)))
  const blocks = counts.map((count) => (count === 0 ? '' : count === 1 ? 't' : `t*${count}`))
  return `E${blocks.join('|')}L`
}

function slotsOfLayout(text: string, parallel: ParallelConfig, numLayers: number, problems: string[]): number[] {
  const { pipelineModelParallelSize: pp, virtualPipelineModelParallelSize: vpp } = parallel
  const { stages, problem } = readLayout(text)
  const at = `pipelineModelParallelLayout=${JSON.stringify(text)}`
  const say = (what: string) => problems.push(`${at} ${what}; this fits: ${exampleLayout(parallel, numLayers)}`)
  if (problem !== null) say(problem)
  else {
    if (stages.length % pp !== 0 || (vpp !== null && stages.length !== pp * vpp)) {
      const wanted = vpp === null ? `a multiple of pipelineModelParallelSize=${pp}` : `pp·vpp = ${pp * vpp}`
      say(`must have ${wanted} stages, got ${stages.length}`)
    }
    const all = stages.join('')
    const ends = stages[0]?.startsWith('E') && stages.at(-1)?.endsWith('L')
    if (!ends || all.lastIndexOf('E') !== 0 || all.indexOf('L') !== all.length - 1)
      say('must begin with its only E in the first stage and end with its only L in the last')
    const blocks = all.split('t').length - 1
    if (blocks !== numLayers) say(`must have numLayers=${numLayers} times t, got ${blocks}`)
  }
  for (const [key, count] of fixedEnds(parallel))
    if (count !== null) problems.push(`${key}=${count} conflicts with ${at}: leave it out`)
  for (const key of accounting) if (parallel[key]) problems.push(`${key}=true conflicts with ${at}: use false`)
  return stages.map((stage) => stage.split('t').length - 1)
}

/** What is fixed about the first and the last stage. */
const fixedEnds = (parallel: ParallelConfig) =>
  [
    ['numLayersInFirstPipelineStage', parallel.numLayersInFirstPipelineStage],
    ['numLayersInLastPipelineStage', parallel.numLayersInLastPipelineStage],
  ] as const

/** Blocks spread evenly, but for what is fixed about the ends; null where that does not work out. */
function evenSlots(parallel: ParallelConfig, numLayers: number): number[] | null {
  const pp = parallel.pipelineModelParallelSize
  const chunks = parallel.virtualPipelineModelParallelSize ?? 1
  const { numLayersInFirstPipelineStage: first, numLayersInLastPipelineStage: last } = parallel
  const embedding = parallel.accountForEmbeddingInPipelineSplit ? 1 : 0
  const loss = parallel.accountForLossInPipelineSplit ? 1 : 0
  const free = pp - (first === null ? 0 : 1) - (last === null ? 0 : 1)
  const rest = numLayers + embedding + loss - (first ?? 0) - (last ?? 0)
  const every = free === 0 ? 0 : rest / (free * chunks)
  if (free < 0 || rest < 0 || (free === 0 && rest !== 0)) return null
  const counts = Array.from({ length: chunks * pp }, (_, slot) => {
    const stage = slot % pp
    if (stage === 0 && first !== null) return first / chunks
    return stage === pp - 1 && last !== null ? last / chunks : every
  })
  counts[0] = (counts[0] as number) - embedding
  counts[counts.length - 1] = (counts.at(-1) as number) - loss
  return counts.every((count) => Number.isInteger(count) && count >= 0) ? counts : null
}

/** What is wrong about sizes, fixed ends and accounting, without ways out. */
function spreadProblems(parallel: ParallelConfig, numLayers: number): string[] {
  const problems: string[] = []
  const pp = parallel.pipelineModelParallelSize
  const chunks = parallel.virtualPipelineModelParallelSize ?? 1
  const ends = fixedEnds(parallel).filter(([, count]) => count !== null) as [string, number][]
  const accounted = accounting.filter((key) => parallel[key]).length
  const needsStages = 'needs pipelineModelParallelSize of at least 2, got 1'
  if (chunks > 1 && pp === 1) problems.push(`virtualPipelineModelParallelSize=${chunks} ${needsStages}`)
  for (const [key, count] of ends) {
    if (pp === 1) problems.push(`${key}=${count} ${needsStages}`)
    if (!Number.isInteger(count) || count < 1 || count % chunks !== 0)
      problems.push(
        `${key} must be a whole number that virtualPipelineModelParallelSize=${chunks} divides, got ${count}`,
      )
    if (accounted > 0) problems.push(`${key}=${count} conflicts with accounting for the embedding or the loss`)
  }
  if (problems.length > 0 || evenSlots(parallel, numLayers) !== null) return problems
  const free = pp - ends.length
  const what = [
    `numLayers=${numLayers}`,
    ...(accounted > 0 ? [`${accounted} for embedding and loss`] : []),
    ...ends.map(([key, count]) => `less ${key}=${count}`),
  ]
  const over = chunks > 1 ? `${free} stages of ${chunks} chunks` : `${free} ${free === 1 ? 'stage' : 'stages'}`
  return [`pipelineModelParallelSize=${pp}: ${what.join(', ')} cannot be spread evenly over ${over}`]
}

/** What could be written instead, each by itself and enough. */
function waysOut(parallel: ParallelConfig, numLayers: number): string[] {
  const works = (change: Partial<ParallelConfig>) => spreadProblems({ ...parallel, ...change }, numLayers).length === 0
  const counts = Array.from({ length: numLayers + 2 }, (_, i) => i + 1)
  const ends = fixedEnds(parallel).flatMap(([key, count]) => (count === null ? [] : [key]))
  const sizes = (['pipelineModelParallelSize', ...ends] as const).flatMap((key) => {
    // An end that takes all leaves nothing to the other stages.
    const most = key === 'pipelineModelParallelSize' ? counts.length : numLayers - 1
    const good = counts.filter((count) => count <= most && works({ [key]: count }))
    return good.length === 0 ? [] : [`${key}=${good.join(', ')}`]
  })
  const vpp = parallel.virtualPipelineModelParallelSize === null ? [] : (['virtualPipelineModelParallelSize'] as const)
  const fixed = [...ends, ...accounting.filter((key) => parallel[key])]
  const leave = (keys: readonly (keyof ParallelConfig)[]) =>
    works(Object.fromEntries(keys.map((key) => [key, defaultParallel[key]]))) ? [`no ${keys.join(' and no ')}`] : []
  const one = [...vpp, ...fixed].flatMap((key) => leave([key]))
  const all = one.length === 0 && vpp.length + fixed.length > 1 ? leave([...vpp, ...fixed]) : []
  if (parallel.pipelineModelParallelSize === 1) return [...sizes, ...one, ...all]
  const without = fixed.length === 0 ? '' : `, without ${fixed.join(' and ')}`
  return [...sizes, ...one, ...all, `pipelineModelParallelLayout=${exampleLayout(parallel, numLayers)}${without}`]
}

function slotsOfSizes(parallel: ParallelConfig, numLayers: number, problems: string[]): number[] {
  const wrong = spreadProblems(parallel, numLayers)
  if (wrong.length === 0) return evenSlots(parallel, numLayers) ?? []
  const ways = waysOut(parallel, numLayers).join(', or ')
  problems.push(...wrong.map((problem) => `${problem}: use ${ways}`))
  return []
}

function slotsOf(parallel: ParallelConfig, numLayers: number): { slots: number[]; problems: string[] } {
  const problems: string[] = []
  const text = parallel.pipelineModelParallelLayout
  const slots =
    text === null ? slotsOfSizes(parallel, numLayers, problems) : slotsOfLayout(text, parallel, numLayers, problems)
  return { slots, problems }
}

/** What about the stages does not fit a model of so many blocks; empty when it fits. The sizes must be checked. */
export function pipelineProblems(parallel: ParallelConfig, numLayers: number): string[] {
  return slotsOf(parallel, numLayers).problems
}

/** Blocks of the largest chunk; null where they do not fit. The sizes must be checked. */
export function mostLayers(parallel: ParallelConfig, numLayers: number): number | null {
  const { slots, problems } = slotsOf(parallel, numLayers)
  return problems.length > 0 ? null : Math.max(...slots)
}

/** @throws ERR_LAYOUT_INVALID with all of pipelineProblems. */
export function pipelineStages(parallel: ParallelConfig, numLayers: number): PipelineStages {
  const { slots, problems } = slotsOf(parallel, numLayers)
  refuseLayout(problems)
  const pp = parallel.pipelineModelParallelSize
  const slotOfBlock = slots.flatMap((count, slot) => Array<number>(count).fill(slot))
  return {
    chunks: slots.length / pp,
    slots,
    placeOf(layer) {
      const slot = layer === 'embedding' ? 0 : layer === 'final' ? slots.length - 1 : (slotOfBlock[layer] as number)
      return { stage: slot % pp, chunk: Math.floor(slot / pp) }
    },
    partOf(stage, chunk) {
      const slot = chunk * pp + stage
      const first = slots.slice(0, slot).reduce((sum, count) => sum + count, 0)
      const end = first + (slots[slot] as number)
      return { first, end, hasEmbedding: slot === 0, hasHead: slot === slots.length - 1 }
    },
  }
}
