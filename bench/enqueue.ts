// The cost of JavaScript and binding for each op: a whole training step is enqueued while the stream is held up, so that no kernel
// runs beside it, and divided by the number of native ops in it. All that the enqueuing thread does is counted, collection of
// garbage there included. The figure is that thread's own clock: the process's counts V8's compiler threads and kernels too.
import type { Addon } from '../lib/addon/functions.js'
import { native } from '../lib/addon/load.js'
import { type TokenBatch, uploadBatch } from '../lib/models/batch.js'
import { Tape } from '../lib/ops/tape.js'
import { Scope } from '../lib/tensor/scope.js'
import { Tensor } from '../lib/tensor/tensor.js'
import type { TrainState } from '../lib/train/state.js'

/** The stream is held up for so long: more than enqueueing a round takes. */
const heldMicroseconds = 100_000
/** Steps in a round: their ops stay below the bound of the stream's queue. */
const steps = 20
/** Rounds before the first measured one: 800 steps, until the compiler of JavaScript has settled. The first ones cost twice as much. */
const warmups = 40

export interface EnqueueCost {
  /** Native ops of one step: forward, backward, optimizer. */
  readonly ops: number
  /** Of each round: microseconds an op, of the enqueuing thread's processor time. */
  readonly microseconds: number[]
  /** The same of all threads of the process. */
  readonly allThreads: number[]
  /** The same by the clock. */
  readonly elapsed: number[]
}

/** Names of the rows that enqueue a kernel. */
function opNames(): string[] {
  const other = /Stream|download|upload|setPlace|Event|Profile|debug|empty/
  return native
    .table()
    .filter((row) => row.args[0] === 'Stream' && !other.test(row.name))
    .map((row) => row.name)
}

/** Forward, loss, backward and update of one micro-batch, without waiting for a value. */
async function enqueueStep(state: TrainState, host: TokenBatch): Promise<void> {
  const { model, optimizer } = state
  const scope = new Scope()
  const tape = new Tape()
  const ctx = model.ctx({ scope, tape, rng: { seed: 1, step: 1, rngSlot: state.rngSlot } })
  const one = Tensor.full(ctx, [1], 'float32', 1)
  optimizer.gradients.zero(ctx)
  const batch = uploadBatch(ctx, host, model.config)
  for (const chunk of model.chunks) {
    const { lossSum } = await chunk.loss(ctx, batch)
    await tape.backward(ctx, [lossSum], [one])
  }
  optimizer.step(ctx, { lr: 0, factor: 1 })
  tape.dispose()
  scope.close()
}

async function countOps(state: TrainState, batch: TokenBatch): Promise<number> {
  const functions = native as unknown as Record<string, (...args: unknown[]) => unknown>
  let count = 0
  const plain = opNames().map((name) => [name, functions[name] as (typeof functions)[string]] as const)
  for (const [name, f] of plain) {
    functions[name] = (...args) => {
      count++
      return f.apply(native as Addon, args)
    }
  }
  await enqueueStep(state, batch)
  for (const [name, f] of plain) functions[name] = f
  return count
}

/** Measures rounds of 20 steps. The weights stay as they are: the learning rate is 0. */
export async function measureEnqueue(state: TrainState, batch: TokenBatch, rounds: number): Promise<EnqueueCost> {
  const { stream } = state.model.device
  const ops = await countOps(state, batch)
  const microseconds: number[] = []
  const allThreads: number[] = []
  const elapsed: number[] = []
  for (let i = -warmups; i < rounds; i++) {
    await stream.sync()
    native.debugDelay(stream.id, heldMicroseconds)
    const from = performance.now()
    const before = process.cpuUsage()
    const own = native.threadMicroseconds()
    for (let step = 0; step < steps; step++) await enqueueStep(state, batch)
    const spent = native.threadMicroseconds() - own
    const { user, system } = process.cpuUsage(before)
    const took = (performance.now() - from) * 1000
    if (i < 0) continue
    elapsed.push(took / ops / steps)
    microseconds.push(spent / ops / steps)
    allThreads.push((user + system) / ops / steps)
  }
  await stream.sync()
  return { ops, microseconds, allThreads, elapsed }
}
