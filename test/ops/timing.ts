// Timing of the case list, by hand: `npx tsx test/ops/timing.ts`. JavaScript and binding time of each op with its tape record,
// measured while the stream is held up, so that no kernel runs beside it. Goal: at most 3 µs an enqueued native op.

import { readFileSync } from 'node:fs'
import type { Addon } from '../../lib/addon/functions.js'
import { native } from '../../lib/addon/load.js'
import { uploadBatch } from '../../lib/models/batch.js'
import { GPTModel } from '../../lib/models/gpt.js'
import { allocateParameter, initializeParameter } from '../../lib/models/initialize.js'
import { Tape } from '../../lib/ops/tape.js'
import type { TrainableWeight } from '../../lib/ops/weight.js'
import { Ctx, soloGroups } from '../../lib/tensor/ctx.js'
import { Scope } from '../../lib/tensor/scope.js'
import { Tensor } from '../../lib/tensor/tensor.js'
import { readFixture } from '../parity/llamaLayout.js'
import { cases } from './cases.js'

const ops = new Set(
  native
    .table()
    .filter((row) => row.args[0] === 'Stream' && !/Stream|download|upload|set|Event|debug/.test(row.name))
    .map((row) => row.name),
)
let enqueued = 0

/** Milliseconds that this thread has run: on a busy machine the clock on the wall says little. */
function threadTime(): number {
  return Number(readFileSync(`/proc/self/task/${process.pid}/schedstat`, 'utf8').split(' ')[0]) / 1e6
}

const functions = native as unknown as Record<string, (...args: unknown[]) => unknown>
const plain = new Map([...ops].map((name) => [name, functions[name] as (typeof functions)[string]]))

function counting(on: boolean): void {
  for (const [name, f] of plain) {
    functions[name] = on
      ? (...args) => {
          enqueued++
          return f.apply(native as Addon, args)
        }
      : f
  }
}

const repeats = 60
const rows: { op: string; ops: number; 'µs a call': string; 'µs an op': string }[] = []
for (const op of cases) {
  const root = Ctx.create({ device: 'cpu' })
  const x: Record<string, Tensor> = {}
  const w: Record<string, TrainableWeight> = {}
  const outer = new Tape()
  for (const [name, input] of Object.entries(op.inputs)) {
    const data = Tensor.full(root, input.shape, 'float32', 0.5)
    if (input.weight) w[name] = { name, data, requiresGrad: true, mainGrad: Tensor.zeros(root, input.shape, 'float32') }
    else x[name] = data
  }
  const step = async () => {
    const tape = new Tape()
    for (const t of Object.values(x)) tape.watch(t)
    const ctx = root.with({ tape, scope: new Scope() })
    const outputs = op.run(ctx, x, w)
    await tape.backward(ctx, outputs, outputs)
    tape.dispose()
    ctx.scope.close()
  }
  counting(true)
  enqueued = 0
  await step()
  const count = enqueued
  counting(false)
  let total = 0
  for (let round = 0; round < 20; round++) {
    await root.stream.sync()
    native.debugDelay(root.stream.id, 30_000)
    const from = threadTime()
    for (let i = 0; i < repeats; i++) await step()
    if (round >= 4) total += threadTime() - from
  }
  const each = total / (16 * repeats)
  await root.stream.sync()
  outer.dispose()
  root.scope.close()
  rows.push({
    op: op.name,
    ops: count,
    'µs a call': (each * 1e3).toFixed(1),
    'µs an op': ((each * 1e3) / count).toFixed(2),
  })
}
console.table(rows)

// A whole training pass of a small model: what a program pays.
const config = { ...readFixture('plain').config, numLayers: 8 }
const root = Ctx.create({ device: 'cpu' })
const model = new GPTModel(config, { groups: soloGroups })
for (const [, p] of model.namedParameters()) {
  allocateParameter(root, p)
  initializeParameter(root, p, 1)
}
const tokens = Int32Array.of(1, 2, 3, 4)
const batch = uploadBatch(root, { batchSize: 1, seqLength: 4, tokens, labels: tokens }, config)
const seed = Tensor.full(root, [1], 'float32', 1)
const pass = async () => {
  const tape = new Tape()
  const ctx = root.with({ tape, scope: new Scope() })
  const { lossSum } = await model.loss(ctx, batch)
  await tape.backward(ctx, [lossSum], [seed])
  tape.dispose()
  ctx.scope.close()
}
counting(true)
enqueued = 0
await pass()
const count = enqueued
counting(false)
let total = 0
for (let round = 0; round < 44; round++) {
  await root.stream.sync()
  native.debugDelay(root.stream.id, 60_000)
  const from = threadTime()
  for (let i = 0; i < 8; i++) await pass()
  // The first rounds are the compiler's.
  if (round >= 4) total += threadTime() - from
}
console.log(`GPT, 8 layers, forward and backward: ${count} ops, ${((total / 320 / count) * 1e3).toFixed(2)} µs an op`)
process.exit(0)
