// Pipeline schedules as data: what each stage does, in order, from sizes alone. Sends and receives are implied: a forward pass takes
// what the slot before it gave, a backward pass what the slot after it gave; slot = chunk · stages + stage, as in pipelineStages.ts.
// Executed in lib/train, drawn in lib/plan, proved in scheduleFaults.ts.
import { refuseLayout } from './config.js'

/**
 * - `gpipe`: all forward passes, then all backward passes.
 * - `1f1b`: a stage begins the backward pass of a micro-batch as soon as it can (Narayanan et al. 2019).
 * - `interleaved`: 1F1B over several chunks a stage, in Megatron's order (Narayanan et al. 2021).
 * - `zb-h1`: 1F1B whose weight gradients wait for what would be idle time, with the memory of 1F1B's first stage (Qi et al. 2023).
 */
export type ScheduleKind = 'gpipe' | '1f1b' | 'interleaved' | 'zb-h1'

/** All kinds, in the order in which they are told. */
export const scheduleKinds: readonly ScheduleKind[] = ['gpipe', '1f1b', 'interleaved', 'zb-h1']

/** `backward` is `backwardInput` and `backwardWeight` in one. */
export type ActionKind = 'forward' | 'backward' | 'backwardInput' | 'backwardWeight'

/** One thing that a stage does. */
export interface PipelineAction {
  readonly kind: ActionKind
  readonly microBatch: number
  readonly chunk: number
}

/** What a schedule is made from. */
export interface ScheduleSizes {
  readonly kind: ScheduleKind
  /** Pipeline stages, pp. */
  readonly stages: number
  /** Chunks on each stage, vpp; more than 1 with `interleaved` only. */
  readonly chunks: number
  readonly microBatches: number
  /** interleaved: micro-batches that pass one chunk before the next one begins; at least `stages`. Default: `stages`. */
  readonly groupSize?: number | undefined
}

/** The schedule that a run takes when none is named: 1F1B, interleaved where stages have several chunks. */
export const defaultSchedule = (chunks: number): ScheduleKind => (chunks > 1 ? 'interleaved' : '1f1b')

/** What about the sizes does not fit; empty when all does. */
export function scheduleProblems({ kind, stages, chunks, microBatches, groupSize }: ScheduleSizes): string[] {
  const counts = { 'pipeline stages': stages, 'virtual stages': chunks, 'micro-batches': microBatches }
  const problems = Object.entries(counts).flatMap(([name, n]) =>
    Number.isSafeInteger(n) && n >= 1 ? [] : [`${name} must be a whole number of at least 1, got ${n}`],
  )
  if (!scheduleKinds.includes(kind))
    problems.push(`expected a schedule of ${scheduleKinds.join(', ')}, got ${JSON.stringify(kind)}`)
  else if (kind !== 'interleaved' && chunks > 1)
    problems.push(`schedule ${kind} has one chunk a stage, got ${chunks} virtual stages: use interleaved`)
  if (groupSize !== undefined && !(Number.isSafeInteger(groupSize) && groupSize >= stages))
    problems.push(
      `a group of micro-batches must have at least as many as there are stages, ${stages}, got ${groupSize}`,
    )
  return problems
}

/**
 * What each stage does, in order.
 * @throws ERR_LAYOUT_INVALID with all of scheduleProblems.
 */
export function pipelineSchedule(sizes: ScheduleSizes): PipelineAction[][] {
  refuseLayout(scheduleProblems(sizes))
  const stages = Array.from({ length: sizes.stages }, (_, stage) => stage)
  switch (sizes.kind) {
    case 'gpipe':
      return stages.map(() => oneForwardOneBackward(sizes, sizes.microBatches))
    case '1f1b':
    case 'interleaved':
      return stages.map((stage) => oneForwardOneBackward(sizes, warmup(sizes, stage)))
    case 'zb-h1':
      return stages.map((stage) => zeroBubble(sizes, stage))
  }
}

/** The forward passes alone: evaluation, logits. Any schedule's, each stage in the same order. */
export function forwardSchedule(sizes: ScheduleSizes): PipelineAction[][] {
  return pipelineSchedule(sizes).map((actions) => actions.filter(({ kind }) => kind === 'forward'))
}

/** The most micro-batches, counted by chunk, whose activations a stage holds at once. */
export function mostActivations(sizes: ScheduleSizes, stage: number): number {
  const { kind, stages, chunks, microBatches } = sizes
  if (kind === 'gpipe') return microBatches
  if (kind === 'zb-h1') return Math.min(microBatches, stages)
  return Math.min(microBatches * chunks, warmup(sizes, stage) + 1)
}

/**
 * Idle time over work of a schedule whose stages are alike and whose transfers take no time, from the literature's formulas. For
 * interleaved schedules it holds where `stages` divides `microBatches`, for zb-h1 from `stages` micro-batches on.
 */
export function bubbleFormula(
  { kind, stages, chunks, microBatches }: ScheduleSizes,
  costs: { readonly forward: number; readonly backwardInput: number; readonly backwardWeight: number },
): number {
  const { forward, backwardInput, backwardWeight } = costs
  const fill = (stages - 1) / (chunks * microBatches)
  if (kind !== 'zb-h1') return fill
  return (fill * (forward + backwardInput - backwardWeight)) / (forward + backwardInput + backwardWeight)
}

/** Sizes of the groups; a rest that is smaller than the pipeline would stall it and joins the group before. */
function groupSizes({ stages, microBatches, groupSize = stages }: ScheduleSizes): number[] {
  const groups = Array<number>(Math.floor(microBatches / groupSize)).fill(groupSize)
  const rest = microBatches % groupSize
  if (rest >= stages || (rest > 0 && groups.length === 0)) groups.push(rest)
  else if (rest > 0) groups[groups.length - 1] = groupSize + rest
  return groups
}

/** Micro-batches and chunks in the order of the forward passes: each group passes chunk after chunk. */
function passes(sizes: ScheduleSizes): { microBatch: number; chunk: number }[] {
  const order: { microBatch: number; chunk: number }[] = []
  let first = 0
  for (const size of groupSizes(sizes)) {
    for (let chunk = 0; chunk < sizes.chunks; chunk++)
      for (let i = 0; i < size; i++) order.push({ microBatch: first + i, chunk })
    first += size
  }
  return order
}

/** Forward passes before the first backward pass. */
function warmup(sizes: ScheduleSizes, stage: number): number {
  const { stages, chunks, microBatches } = sizes
  const behind = stages - 1 - stage
  if (chunks === 1) return Math.min(behind, microBatches)
  // Until its first micro-batch has passed the last chunk; twice the stages behind, since each gap is made and filled again.
  return Math.min(2 * behind + (chunks - 1) * Math.max(...groupSizes(sizes)), microBatches * chunks)
}

/** Some forward passes, then one forward and one backward in turn, then the rest of the backward passes. */
function oneForwardOneBackward(sizes: ScheduleSizes, ahead: number): PipelineAction[] {
  const order = passes(sizes)
  const actions: PipelineAction[] = []
  for (let i = 0; i < order.length + ahead; i++) {
    const forward = order[i]
    const back = order[i - ahead]
    if (forward !== undefined) actions.push({ kind: 'forward', ...forward })
    if (back !== undefined) actions.push({ kind: 'backward', ...back, chunk: sizes.chunks - 1 - back.chunk })
  }
  return actions
}

/** As 1F1B, but weight gradients stay behind by as many micro-batches as there are stages before this one. */
function zeroBubble({ stages, microBatches }: ScheduleSizes, stage: number): PipelineAction[] {
  const ahead = Math.min(stages - 1 - stage, microBatches)
  const actions: PipelineAction[] = []
  const add = (kind: ActionKind, microBatch: number) => {
    if (microBatch >= 0 && microBatch < microBatches) actions.push({ kind, microBatch, chunk: 0 })
  }
  for (let i = 0; i < microBatches + stages - 1; i++) {
    add('forward', i)
    add('backwardInput', i - ahead)
    add('backwardWeight', i - ahead - stage)
  }
  return actions
}
