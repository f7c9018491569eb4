// `viaduct plan --schedule`: a pipeline schedule's bubble, stage by stage, and its picture.
import { writeFile } from 'node:fs/promises'
import { ViaductError } from '../../base/errors.js'
import {
  bubbleFormula,
  defaultSchedule,
  mostActivations,
  pipelineSchedule,
  type ScheduleKind,
  type ScheduleSizes,
} from '../../parallel/schedules.js'
import { type PassCosts, simulate } from '../../plan/timeline.js'
import { timelineSvg } from '../../plan/timelineSvg.js'
import { print, say, table } from '../terminal.js'

interface Flags {
  schedule?: ScheduleKind
  pp: number
  vpp: number
  microBatches: number
  groupSize?: number
  costs: string
  svg?: string
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

export async function planCommand(flags: Flags): Promise<void> {
  const { pp: stages, vpp: chunks, microBatches, groupSize, svg } = flags
  const kind = flags.schedule ?? defaultSchedule(chunks)
  const sizes: ScheduleSizes = { kind, stages, chunks, microBatches, groupSize }
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
    const stageRows = timeline.stages.map(({ work, idle, activations }) => ({ work, idle, activations }))
    return print(
      JSON.stringify({ ...sizes, costs, ...timeline, stages: stageRows, formula, actions, svg: svg ?? null }),
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
