// When each stage of a pipeline does what: a schedule played with given durations. Stages compute one thing at a time and never wait to
// send; the bubble is what they wait to receive.
import {
  actionKey,
  dependencies,
  heldActivations,
  type PlacedAction,
  type Schedule,
} from '../parallel/scheduleFaults.js'

/** Durations of one chunk's passes, in any unit. */
export interface PassCosts {
  readonly forward: number
  /** Gradients of the chunk's input. */
  readonly backwardInput: number
  /** Gradients of the chunk's weights. */
  readonly backwardWeight: number
  /** From a stage to the next. Default 0. */
  readonly send?: number
}

/** An action with its time. */
export interface TimedAction extends PlacedAction {
  readonly start: number
  readonly end: number
}

/** A schedule in time. */
export interface Timeline {
  readonly stages: readonly {
    readonly actions: readonly TimedAction[]
    /** Time at work. */
    readonly work: number
    /** Time without work, from the start of the first stage to the end of the last. */
    readonly idle: number
    /** The most micro-batches, counted by chunk, whose activations are held at once. */
    readonly activations: number
  }[]
  /** From the first action's start to the last one's end. */
  readonly duration: number
  /** Idle time over work, over all stages: (p-1)/m for 1F1B. */
  readonly bubble: number
}

/**
 * Plays a schedule that has no faults.
 * @param costs - of a pass; a function where stages or chunks differ.
 */
export function simulate(schedule: Schedule, costs: PassCosts | ((action: PlacedAction) => PassCosts)): Timeline {
  const costOf = typeof costs === 'function' ? costs : () => costs
  const ends = new Map<string, { readonly end: number; readonly stage: number }>()
  const timed: TimedAction[][] = schedule.actions.map(() => [])
  for (let moved = true; moved; ) {
    moved = false
    for (const [stage, actions] of schedule.actions.entries()) {
      const list = timed[stage] as TimedAction[]
      for (let next = actions[list.length]; next !== undefined; next = actions[list.length]) {
        const action = { ...next, stage }
        const { send = 0, ...cost } = costOf(action)
        const needed = dependencies(schedule, action).map((key) => ends.get(key))
        if (needed.includes(undefined)) break
        const ready = needed.map((from) => (from ? from.end + (from.stage === stage ? 0 : send) : 0))
        const start = Math.max(list.at(-1)?.end ?? 0, ...ready)
        const length = action.kind === 'backward' ? cost.backwardInput + cost.backwardWeight : cost[action.kind]
        const end = start + length
        ends.set(actionKey(action), { end, stage })
        list.push({ ...action, start, end })
        moved = true
      }
    }
  }
  const duration = Math.max(0, ...timed.map((list) => list.at(-1)?.end ?? 0))
  const stages = timed.map((actions) => {
    const work = actions.reduce((sum, { start, end }) => sum + end - start, 0)
    return { actions, work, idle: duration - work, activations: heldActivations(actions) }
  })
  const total = (key: 'work' | 'idle') => stages.reduce((sum, stage) => sum + stage[key], 0)
  return { stages, duration, bubble: total('idle') / total('work') }
}
