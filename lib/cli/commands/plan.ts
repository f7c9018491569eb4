// `viaduct plan`: a run before it starts, bytes on each pipeline stage and the schedule, or a schedule of given sizes alone: bubble,
// activations, picture.
import { writeFile } from 'node:fs/promises'
import { ViaductError } from '../../base/errors.js'
import type { ResolvedConfig } from '../../config/resolve.js'
import {
  bubbleFormula,
  defaultSchedule,
  mostActivations,
  pipelineSchedule,
  type ScheduleKind,
  type ScheduleSizes,
} from '../../parallel/schedules.js'
import { describePrice, priceOf } from '../../plan/price.js'
import { type PassCosts, simulate } from '../../plan/timeline.js'
import { timelineSvg } from '../../plan/timelineSvg.js'
import { memoryTable } from '../memoryTable.js'
import { fetchModel } from '../modelSource.js'
import { print, say, table } from '../terminal.js'
import { resolveTraining, type TrainFlags, trainConfig } from '../trainConfig.js'

interface Flags extends TrainFlags {
  schedule?: ScheduleKind
  microBatches?: number
  groupSize?: number
  costs: string
  svg?: string
  revision?: string
  json?: boolean
}

/** `F,B,W` or `F,B,W,SEND`: times of a whole stage. */
function passCosts(text: string): PassCosts {
  const numbers = text.split(',').map(Number)
  const isPositive = numbers.slice(0, 3).every((n) => n > 0 && Number.isFinite(n))
  const [forward, backwardInput, backwardWeight, send = 0] = numbers as [number, number, number, number?]
  if (numbers.length < 3 || numbers.length > 4 || !isPositive || !(send >= 0 && Number.isFinite(send)))
    throw new ViaductError(
      'ERR_USAGE',
      'plan',
      `expected --costs of three positive numbers, e.g. 1,1,1, and optionally the time of a transfer, got ${text}`,
    )
  return { forward, backwardInput, backwardWeight, send }
}

export async function planCommand(recipe: string | undefined, overrides: string[], flags: Flags): Promise<void> {
  if (recipe === undefined && flags.hf === undefined) return await planSchedule(sizesOfFlags(flags), flags)
  const resolved = await plannedRun(recipe, overrides, flags)
  const price = priceOf(resolved, null)
  const sizes = resolved.config.model.scheduleSizes(resolved.numMicroBatches)
  if (!flags.json) {
    for (const line of describePrice(resolved, price, resolved.config.train.trainIters)) say(line)
    print(memoryTable(resolved, price.memoryByStage))
    if (sizes.stages > 1) print()
  }
  if (flags.json || sizes.stages > 1) await planSchedule(sizes, flags, { ...price, ranks: resolved.worldSize })
}

/** The schedule that flags alone describe. */
function sizesOfFlags({ schedule, pp, vpp, microBatches, groupSize }: Flags): ScheduleSizes {
  if (pp === undefined || microBatches === undefined)
    throw new ViaductError(
      'ERR_USAGE',
      'plan',
      'expected a recipe, a .yaml file or --hf DIR to plan a run, or --pp and --micro-batches to plan a schedule',
    )
  const chunks = vpp ?? 1
  return { kind: schedule ?? defaultSchedule(chunks), stages: pp, chunks, microBatches, groupSize }
}

/** The checked configuration that `viaduct train` with the same arguments would run. */
async function plannedRun(recipe: string | undefined, overrides: string[], flags: Flags): Promise<ResolvedConfig> {
  if (flags.microBatches !== undefined)
    throw new ViaductError(
      'ERR_USAGE',
      'plan',
      `expected no --micro-batches beside a run, got ${flags.microBatches}: a run has train.globalBatchSize / train.microBatchSize / dp of them`,
    )
  const fetched = flags.hf === undefined ? null : await fetchModel(flags.hf, flags)
  const config = await trainConfig(recipe, overrides, fetched === null ? flags : { ...flags, hf: fetched.folder })
  if (flags.schedule !== undefined) config.model.pipelineSchedule = flags.schedule
  if (flags.groupSize !== undefined) config.model.microbatchGroupSizePerVpStage = flags.groupSize
  return resolveTraining(config, flags, null).resolved
}

/** @param about - told in JSON besides. */
async function planSchedule(sizes: ScheduleSizes, flags: Flags, about: object = {}): Promise<void> {
  const { kind, stages, chunks, microBatches } = sizes
  const { svg } = flags
  const actions = pipelineSchedule(sizes)
  // A chunk is a part of a stage; a transfer is as large whatever is computed in between.
  const { forward, backwardInput, backwardWeight, send = 0 } = passCosts(flags.costs)
  const costs = {
    forward: forward / chunks,
    backwardInput: backwardInput / chunks,
    backwardWeight: backwardWeight / chunks,
    send,
  }
  const timeline = simulate({ stages, chunks, microBatches, actions }, costs)
  const formula = bubbleFormula(sizes, costs)
  const virtual = chunks > 1 ? `, ${chunks} virtual stages` : ''
  const title = `${kind}: ${stages} ${stages === 1 ? 'stage' : 'stages'}${virtual}, ${microBatches} micro-${microBatches === 1 ? 'batch' : 'batches'}`
  if (svg !== undefined) await writeFile(svg, timelineSvg(timeline, title, chunks))
  if (flags.json) {
    const schedule = timeline.stages.map(({ work, idle, activations }) => ({ work, idle, activations }))
    return print(
      JSON.stringify({ ...sizes, costs, ...timeline, stages: schedule, formula, actions, svg: svg ?? null, ...about }),
    )
  }
  const percent = (share: number) => `${(100 * share).toFixed(1)}%`
  const number = (x: number) => String(Number(x.toFixed(3)))
  say(title)
  print(
    table(
      ['stage', 'work', 'idle', 'bubble', 'activations held', 'at most'],
      timeline.stages.map(({ work, idle, activations }, stage) => [
        String(stage),
        number(work),
        number(idle),
        percent(idle / work),
        String(activations),
        String(mostActivations(sizes, stage)),
      ]),
    ),
  )
  print(
    `bubble ${percent(timeline.bubble)} of the work, ${percent(timeline.bubble / (1 + timeline.bubble))} of the time; formula ${percent(formula)}`,
  )
  if (svg !== undefined) print(svg)
}
