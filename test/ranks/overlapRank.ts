// One rank of overlap.test.ts: each linear of tensor parallelism with its collectives beside the products and behind them, on the same
// numbers, must have the same bits. Then ranks wait for one that is late, and a trace must show what the others compute meanwhile.
import assert from 'node:assert/strict'
import type { Span } from '../../lib/addon/functions.js'
import { native } from '../../lib/addon/load.js'
import type { DType } from '../../lib/base/dtype.js'
import { linear } from '../../lib/ops/linear.js'
import { Tape, type WeightSchedule } from '../../lib/ops/tape.js'
import type { TrainableWeight } from '../../lib/ops/weight.js'
import { assertSameOnAllRanks, barrier } from '../../lib/parallel/collectives.js'
import { gatheredLinear } from '../../lib/parallel/gatheredLinear.js'
import type { CommGroup } from '../../lib/parallel/group.js'
import {
  overlappedCopiedLinear,
  overlappedGatheredLinear,
  overlappedScatteredLinear,
  overlappedSummedLinear,
} from '../../lib/parallel/overlappedLinear.js'
import { copyForwardReduceBackward, sumParts } from '../../lib/parallel/regions.js'
import { sharedRows } from '../../lib/parallel/sharedRows.js'
import { initDistributed } from '../../lib/parallel/world.js'
import { Ctx, type Tensor, withScope } from '../../lib/tensor/index.js'

interface Size {
  /** Rows, input and output channels of a rank. */
  readonly tokens: number
  readonly K: number
  readonly N: number
}

interface Layer {
  /** The input is this rank's run of the rows. */
  readonly takesRun: boolean
  /** So is the output. */
  readonly givesRun: boolean
  behind(ctx: Ctx, x: Tensor, weight: TrainableWeight, bias: TrainableWeight, group: CommGroup, tokens: number): Tensor
  beside(ctx: Ctx, x: Tensor, weight: TrainableWeight, bias: TrainableWeight, group: CommGroup, tokens: number): Tensor
}

const layers: Readonly<Record<string, Layer>> = {
  'column, rows shared out': {
    takesRun: true,
    givesRun: false,
    behind: (ctx, x, weight, bias, group, tokens) => gatheredLinear(ctx, { x, weight, bias, tokens, group }).y,
    beside: (ctx, x, weight, bias, group, tokens) =>
      overlappedGatheredLinear(ctx, { x, weight, bias, tokens, group }).y,
  },
  column: {
    takesRun: false,
    givesRun: false,
    behind: (ctx, x, weight, bias, group) =>
      linear(ctx, { x: copyForwardReduceBackward(ctx, x, group), weight, bias }).y,
    beside: (ctx, x, weight, bias, group) => overlappedCopiedLinear(ctx, { x, weight, bias, group }).y,
  },
  'row, rows shared out': {
    takesRun: false,
    givesRun: true,
    behind: (ctx, x, weight, _, group) => sumParts(ctx, linear(ctx, { x, weight }).y, group),
    beside: (ctx, x, weight, _, group) => overlappedScatteredLinear(ctx, { x, weight, group }),
  },
  row: {
    takesRun: false,
    givesRun: false,
    behind: (ctx, x, weight, _, group) => sumParts(ctx, linear(ctx, { x, weight }).y, group),
    beside: (ctx, x, weight, _, group) => overlappedSummedLinear(ctx, { x, weight, group }).y,
  },
}

/** Repeatable numbers, other ones on each rank where `rank` is given. */
function numbers(ctx: Ctx, shape: readonly number[], dtype: DType, seed: number): Tensor {
  const t = ctx.empty(shape, dtype)
  native.randomNormal(
    ctx.stream.id,
    t.handle,
    seed,
    1,
    shape.map(() => 0),
    [...strides(shape)],
    0,
    1,
  )
  return t
}

function strides(shape: readonly number[]): number[] {
  return shape.map((_, i) => shape.slice(i + 1).reduce((a, b) => a * b, 1))
}

interface Way {
  readonly schedule: WeightSchedule
  readonly frozen: boolean
  readonly dtype: DType
}

/** Is called around the forward and around the backward half of a pass. */
interface Watch {
  before(): Promise<void>
  after(): Promise<void>
}

/** y, dx, dw and dbias of one pass. */
async function pass(
  base: Ctx,
  layer: Layer,
  kind: 'behind' | 'beside',
  size: Size,
  group: CommGroup,
  way: Way,
  watch?: Watch,
) {
  const { tokens, K, N } = size
  const { dtype, frozen, schedule } = way
  const shares = layer.takesRun || layer.givesRun
  return await withScope(base, async (scoped) => {
    const none = numbers(scoped, [1], 'float32', 1)
    const batch = shares ? { sampleIds: none, positions: none, sharedTokens: tokens } : null
    const tape = new Tape()
    const ctx = scoped.with({ batch, tape })
    const run = sharedRows(tokens, group)
    const weight = {
      name: 'w',
      data: numbers(ctx, [N, K], dtype, 10 + group.rank),
      requiresGrad: !frozen,
      mainGrad: null,
    }
    const bias = { name: 'b', data: numbers(ctx, [N], dtype, 30 + group.rank), requiresGrad: true, mainGrad: null }
    // Rows that fill the last runs up hold anything.
    const x = numbers(
      ctx,
      [layer.takesRun ? run : tokens, K],
      dtype,
      layer.takesRun || layer.givesRun ? 50 + group.rank : 50,
    )
    tape.watch(x)
    await watch?.before()
    const y = layer[kind](ctx, x, weight, bias, group, tokens)
    await watch?.after()
    const dy = numbers(ctx, y.shape, dtype, layer.givesRun || !layer.takesRun ? 70 : 70 + group.rank)
    await watch?.before()
    const found = await tape.backward(ctx, [y], [dy], { weights: schedule })
    await tape.backwardWeight(ctx)
    await watch?.after()
    const parts = [y, found.get(x), weight.mainGrad as Tensor | null, bias.mainGrad as Tensor | null]
    const bytes = []
    for (const t of parts) bytes.push(t ? Buffer.from(await t.bytes()).toString('base64') : '')
    for (const { mainGrad } of [weight, bias]) (mainGrad as Tensor | null)?.dispose()
    tape.dispose()
    return bytes
  })
}

const world = await initDistributed({ timeoutMs: 60_000 })
const { group } = world
const ctx = Ctx.create()
const sizes: Size[] = [
  { tokens: 1, K: 24, N: 40 },
  { tokens: 30, K: 24, N: 40 },
  { tokens: 67, K: 40, N: 24 },
  { tokens: 512, K: 600, N: 32 }, // a long sum in parts
  { tokens: 1024, K: 64, N: 96 },
  { tokens: 1027, K: 64, N: 544 },
]
let count = 0
for (const [name, layer] of Object.entries(layers)) {
  for (const size of sizes) {
    for (const dtype of ['float32', 'bfloat16'] as const) {
      for (const [schedule, frozen] of [
        ['now', false],
        ['defer', false],
        ['now', true],
      ] as const) {
        const way = { schedule, frozen, dtype }
        const payload = () => ({ ...group.info()?.payload })
        const start = payload()
        const expected = await pass(ctx, layer, 'behind', size, group, way)
        const middle = payload()
        const live = native.liveSlots()
        const got = await pass(ctx, layer, 'beside', size, group, way)
        const end = payload()
        const what = `${name}, ${JSON.stringify({ ...size, ...way })}`
        assert.equal(native.liveSlots(), live, `${what}: tensors left behind`)
        for (const [i, part] of ['y', 'dx', 'dw', 'dbias'].entries()) {
          const has = part !== 'dbias' || name.startsWith('column')
          assert.equal(expected[i] !== '', has && !(part === 'dw' && frozen), `${what}: ${part}`)
          assert.ok(got[i] === expected[i], `${what}: ${part} differs`)
        }
        const used = (from: Record<string, number>, to: Record<string, number>) =>
          Object.fromEntries(Object.entries(to).map(([op, bytes]) => [op, bytes - (from[op] ?? 0)]))
        assert.deepEqual(used(middle, end), { ...used(start, middle) }, `${what}: bytes`)
        count++
      }
    }
  }
}

interface Beside {
  readonly half: 'forward' | 'backward'
  readonly collective: string
  readonly work: string
  /** How often the work comes before the collective, which needs it. */
  readonly first?: number
}

/** What must run beside what on a rank that waits for a late one. */
const besides: Readonly<Record<string, readonly Beside[]>> = {
  // The others' rows travel beside the product of the own ones; for the weight's gradient, beside the product of the input's.
  'column, rows shared out': [
    { half: 'forward', collective: 'allGather', work: 'matmulRows' },
    { half: 'backward', collective: 'allGather', work: 'matmul' },
  ],
  // The input's gradient is summed beside what is computed of the weights': here the bias, where the weight is frozen.
  'column, rows shared out, frozen': [{ half: 'backward', collective: 'reduceScatter', work: 'sumRows' }],
  column: [{ half: 'backward', collective: 'allReduce', work: 'matmul', first: 1 }],
  // A piece of the sum travels beside the product of the next one, the gradient's rows beside the product of the own ones.
  'row, rows shared out': [
    { half: 'forward', collective: 'reduceScatter', work: 'matmulRows', first: group.size },
    { half: 'backward', collective: 'allGather', work: 'matmulRows' },
  ],
  row: [{ half: 'forward', collective: 'allReduce', work: 'matmulRows', first: 1 }],
}
const lateSeconds = 0.2

/** A pass whose halves the last rank begins late: what the streams of the others do meanwhile. */
async function checkLate(name: string, kind: 'behind' | 'beside'): Promise<void> {
  const streams = [ctx.stream, ctx.device.communication('tp')] as const
  const isLate = group.rank === group.size - 1
  const halves: [compute: readonly Span[], comm: readonly Span[]][] = []
  const watch: Watch = {
    async before() {
      await barrier(group)
      for (const { id } of streams) native.startTrace(id)
      if (isLate) native.debugDelay(ctx.stream.id, 1e6 * lateSeconds)
    },
    async after() {
      await Promise.all(streams.map((stream) => stream.sync()))
      halves.push([native.endTrace(streams[0].id), native.endTrace(streams[1].id)])
    },
  }
  const [layer, frozen] = name.endsWith(', frozen') ? [name.slice(0, -', frozen'.length), true] : [name, false]
  const way: Way = { schedule: 'now', frozen, dtype: 'float32' }
  await pass(ctx, layers[layer] as Layer, kind, { tokens: 1024, K: 64, N: 96 }, group, way, watch)
  if (isLate) return
  for (const { half, collective, work, first = 0 } of besides[name] ?? []) {
    const [compute, comm] = halves[half === 'forward' ? 0 : 1] as (typeof halves)[0]
    const waiting = comm.find(({ op, start, end }) => op === collective && end - start > lateSeconds / 2)
    // Done long before the late rank came.
    const done = compute.filter(({ op, end }) => op === work && waiting && end < waiting.end - lateSeconds / 2)
    const what = `${name}, ${half}: ${work} beside ${collective}: ${JSON.stringify({ compute, comm })}`
    assert.equal(done.length > first, kind === 'beside', what)
  }
}
for (const name of Object.keys(besides)) for (const kind of ['behind', 'beside'] as const) await checkLate(name, kind)

await assertSameOnAllRanks(group.info()?.fingerprint, 'program order', group)
ctx.scope.close()
console.log(`${count} passes are equal`)
await world.dispose()
