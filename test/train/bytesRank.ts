// A rank that counts what one training step hands to each group's collectives. Rank 0 writes the sums over all ranks.
import { writeFileSync } from 'node:fs'
import { dataParallelAxis } from '../../lib/optim/gradients.js'
import { allGatherObject } from '../../lib/parallel/collectives.js'
import type { CommGroup } from '../../lib/parallel/group.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { forwardStep, setup, trainStep } from '../../lib/train/index.js'
import { fixtureBatches, fixtureData } from './fixtureRun.js'
import { configOf, type PipelineTask } from './pipelineRank.js'

/** Bytes by operation, of each group by name. */
export type Payload = Record<string, Record<string, number>>

function add(to: Payload, group: string, op: string, bytes: number): void {
  to[group] ??= {}
  const ops = to[group]
  ops[op] = (ops[op] ?? 0) + bytes
}

/** The third step of a run; in the first ones buckets are still found out. */
async function count(task: PipelineTask): Promise<Payload> {
  const world = await initDistributed()
  const groups: Promise<CommGroup>[] = [Promise.resolve(world.group)]
  const part = world.part.bind(world)
  world.part = (...args) => {
    const made = part(...args)
    groups.push(made)
    return made
  }
  const config = await configOf(task)
  const { microBatchSize } = config.train
  const state = await setup(config, { data: fixtureData, log: () => {} })
  // Axes of the same ranks share a group, whose name is that of the axis that came first: here they are called by what they do now.
  const byComm = new Map((await Promise.all(groups)).map((group) => [group.comm, [group.name, group] as const]))
  for (const axis of [
    'tp_kv',
    'tp_pp',
    'embd',
    'pp',
    'cp',
    'cp_heads',
    'cp_ring',
    'etp',
    'ep',
    'edp',
    dataParallelAxis,
    'tp',
  ] as const) {
    const group = state.mesh.get(axis)
    if (group.size > 1) byComm.set(group.comm, [axis, group])
  }
  const counters = () =>
    [...byComm.values()].flatMap(([name, group]) =>
      Object.entries(group.info()?.payload ?? {}).map(([op, bytes]) => [name, op, bytes] as const),
    )
  const { rank, size } = state.mesh.get('dp')
  const payload: Payload = {}
  for (let step = 0; step < 3; step++) {
    if (step === 2) for (const [group, op, bytes] of counters()) add(payload, group, op, -bytes)
    await trainStep(state, fixtureBatches(step, microBatchSize, rank, size), forwardStep)
  }
  for (const [group, op, bytes] of counters()) add(payload, group, op, bytes)
  await state.dispose()
  const total: Payload = {}
  for (const one of await allGatherObject(payload, world.group))
    for (const [group, ops] of Object.entries(one))
      for (const [op, bytes] of Object.entries(ops)) add(total, group, op, bytes)
  world.part = part
  return total
}

const [, script, argument, path] = process.argv
if (script?.endsWith('bytesRank.ts') && argument !== undefined && path !== undefined) {
  const world = await initDistributed()
  const counted: Payload[] = []
  for (const task of JSON.parse(argument) as PipelineTask[]) counted.push(await count(task))
  if (world.rank === 0) writeFileSync(path, JSON.stringify(counted))
}
