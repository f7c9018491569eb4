// Proves a pipeline schedule, whoever made it: each pass once, nothing before what it needs, no deadlock, transfers in one order on both
// sides, activations within a bound. Knows nothing of how schedules are made.
import type { PipelineAction } from './schedules.js'

/** A schedule with the sizes that give its actions a meaning. */
export interface Schedule {
  readonly stages: number
  readonly chunks: number
  readonly microBatches: number
  /** By stage. */
  readonly actions: readonly (readonly PipelineAction[])[]
}

/** An action with its stage. */
export interface PlacedAction extends PipelineAction {
  readonly stage: number
}

/** What has to be done before an action, as keys of `actionKey`. */
export function dependencies({ stages, chunks }: Schedule, action: PlacedAction): string[] {
  const { kind, stage, chunk, microBatch } = action
  const slot = chunk * stages + stage
  const at = (of: number, what: 'forward' | 'backward') =>
    actionKey({ kind: what, stage: of % stages, chunk: Math.floor(of / stages), microBatch })
  if (kind === 'forward') return slot === 0 ? [] : [at(slot - 1, 'forward')]
  if (kind === 'backwardWeight') return [at(slot, 'backward')]
  return slot === stages * chunks - 1 ? [at(slot, 'forward')] : [at(slot, 'forward'), at(slot + 1, 'backward')]
}

/** One name for what an action gives: `backward` and `backwardInput` both give the gradient of the chunk's input. */
export function actionKey({ kind, stage, chunk, microBatch }: PlacedAction): string {
  const what = kind === 'backwardInput' ? 'backward' : kind
  return `${what} of micro-batch ${microBatch}, chunk ${chunk}, stage ${stage}`
}

/**
 * All that is wrong with a schedule; empty when it is right.
 * @param bound - the most micro-batches, counted by chunk, whose activations a stage may hold at once.
 */
export function scheduleFaults(schedule: Schedule, bound?: (stage: number) => number): string[] {
  return [
    ...countFaults(schedule),
    ...deadlocks(schedule),
    ...orderFaults(schedule),
    ...(bound === undefined ? [] : boundFaults(schedule, bound)),
  ]
}

/** Each forward and backward once, each split gradient in both halves, nothing that is not there. */
function countFaults({ stages, chunks, microBatches, actions }: Schedule): string[] {
  const faults: string[] = []
  if (actions.length !== stages) faults.push(`expected actions of ${stages} stages, got ${actions.length}`)
  actions.forEach((list, stage) => {
    const counts = new Map<string, number>()
    for (const { kind, microBatch, chunk } of list) {
      const key = `${microBatch} ${chunk} ${kind}`
      counts.set(key, (counts.get(key) ?? 0) + 1)
    }
    const count = (microBatch: number, chunk: number, kind: string) => {
      const key = `${microBatch} ${chunk} ${kind}`
      const n = counts.get(key) ?? 0
      counts.delete(key)
      return n
    }
    for (let m = 0; m < microBatches; m++) {
      for (let c = 0; c < chunks; c++) {
        const forward = count(m, c, 'forward')
        const [whole, input, weight] = [
          count(m, c, 'backward'),
          count(m, c, 'backwardInput'),
          count(m, c, 'backwardWeight'),
        ]
        const once = forward === 1 && whole + input === 1 && input === weight
        if (!once)
          faults.push(
            `stage ${stage}, micro-batch ${m}, chunk ${c}: ${forward} forward, ${whole} backward, ${input} backwardInput, ${weight} backwardWeight`,
          )
      }
    }
    for (const key of counts.keys()) faults.push(`stage ${stage}: there is no micro-batch, chunk and kind ${key}`)
  })
  return faults
}

/** Runs all stages as far as they come, with sends that never wait; whoever is left waits for ever. */
function deadlocks(schedule: Schedule): string[] {
  const done = new Set<string>()
  const next = schedule.actions.map(() => 0)
  for (let moved = true; moved; ) {
    moved = false
    schedule.actions.forEach((list, stage) => {
      for (let action = list[next[stage] as number]; action !== undefined; action = list[next[stage] as number]) {
        const placed = { ...action, stage }
        if (!dependencies(schedule, placed).every((key) => done.has(key))) return
        done.add(actionKey(placed))
        next[stage] = (next[stage] as number) + 1
        moved = true
      }
    })
  }
  return schedule.actions.flatMap((list, stage) => {
    const stuck = list[next[stage] as number]
    if (stuck === undefined) return []
    const placed = { ...stuck, stage }
    const missing = dependencies(schedule, placed).filter((key) => !done.has(key))
    return [`${actionKey(placed)} waits for ever for ${missing.join(' and ')}`]
  })
}

/** Transfers between two stages keep their order: who receives must want them as they are sent. */
function orderFaults({ stages, chunks, actions }: Schedule): string[] {
  const passesOf = (stage: number, forward: boolean, slots: (slot: number) => boolean) =>
    (actions[stage] ?? []).flatMap(({ kind, microBatch, chunk }) =>
      kind !== 'backwardWeight' && (kind === 'forward') === forward && slots(chunk * stages + stage)
        ? [{ microBatch, slot: chunk * stages + stage }]
        : [],
    )
  const faults: string[] = []
  const last = stages * chunks - 1
  for (let stage = 0; stage < stages; stage++) {
    const next = (stage + 1) % stages
    const checks = [
      [
        'forward',
        passesOf(stage, true, (slot) => slot < last).map(({ microBatch, slot }) => `${microBatch} ${slot + 1}`),
        passesOf(next, true, (slot) => slot > 0).map(({ microBatch, slot }) => `${microBatch} ${slot}`),
      ],
      [
        'backward',
        passesOf(next, false, (slot) => slot > 0).map(({ microBatch, slot }) => `${microBatch} ${slot - 1}`),
        passesOf(stage, false, (slot) => slot < last).map(({ microBatch, slot }) => `${microBatch} ${slot}`),
      ],
    ] as const
    for (const [what, sent, wanted] of checks) {
      const at = sent.findIndex((key, i) => key !== wanted[i])
      if (at >= 0 || sent.length !== wanted.length)
        faults.push(`between stages ${stage} and ${next}, ${what}: transfer ${at} is not the one that is wanted then`)
    }
  }
  return faults
}

function boundFaults({ actions }: Schedule, bound: (stage: number) => number): string[] {
  return actions.flatMap((list, stage) => {
    const held = heldActivations(list)
    return held <= bound(stage)
      ? []
      : [`stage ${stage} holds ${held} activations at once, expected at most ${bound(stage)}`]
  })
}

/** The most activations that a stage holds at once: from a forward pass to the end of its backward pass. */
export function heldActivations(actions: readonly PipelineAction[]): number {
  let held = 0
  let most = 0
  for (const { kind } of actions) {
    if (kind === 'forward') held++
    most = Math.max(most, held)
    if (kind === 'backward' || kind === 'backwardWeight') held--
  }
  return most
}
