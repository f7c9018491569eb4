// One rank of collectives.test.ts. `all`: every collective on the GPU against the same one of the CPU's transport; otherwise it
// does what the scenario asks and says as JSON how its operation ended.
import assert from 'node:assert/strict'
import { native } from '../../lib/addon/load.js'
import type { ViaductError } from '../../lib/base/errors.js'
import {
  allGather,
  allGatherInPlace,
  allReduce,
  allToAll,
  assertSameOnAllRanks,
  barrier,
  broadcast,
  pointToPoint,
  type Reduction,
  reduceScatter,
  reduceScatterInPlace,
} from '../../lib/parallel/collectives.js'
import { defaultParallel } from '../../lib/parallel/config.js'
import type { CommGroup } from '../../lib/parallel/group.js'
import { Mesh } from '../../lib/parallel/mesh.js'
import { initDistributed, type World } from '../../lib/parallel/world.js'
import { Ctx, type Tensor, withScope } from '../../lib/tensor/index.js'
import { arrayOf, type ReducedDtype } from '../ranks/rankOrder.js'

const [scenario = 'all', timeout = '60000'] = process.argv.slice(2)
const report = (value: unknown) => console.log(`RESULT ${JSON.stringify(value)}`)
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms))
const bytesOf = (view: ArrayBufferView) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength)

interface Both {
  readonly gpu: Ctx
  readonly cpu: Ctx
}

function put(ctx: Ctx, dtype: ReducedDtype, data: ArrayBufferView, shape: readonly number[]): Tensor {
  const t = ctx.empty(shape, dtype)
  native.upload(ctx.stream.id, t.handle, bytesOf(data))
  return t
}

/** Runs `make` on the GPU and on the CPU and compares the bytes. */
async function same({ gpu, cpu }: Both, what: string, make: (ctx: Ctx) => Tensor): Promise<void> {
  const run = (ctx: Ctx) => withScope(ctx, async (inner) => Buffer.from(await make(inner).bytes()))
  const [got, expected] = [await run(gpu), await run(cpu)]
  const at = got.findIndex((byte, i) => byte !== expected[i])
  assert.ok(at < 0 && got.length === expected.length, `${what}: byte ${at} of ${expected.length} differs`)
}

// Sums of small whole numbers are exact in every dtype, in whatever order and precision they are taken.
const whole = (dtype: ReducedDtype, n: number, rank: number) => {
  const values = arrayOf(dtype, n)
  const halves = dtype === 'float16' ? [0, 0x3c00, 0x4000, 0x4200, 0x4400] : [0, 0x3f80, 0x4000, 0x4040, 0x4080]
  for (let i = 0; i < n; i++) {
    const value = (i + 3 * rank) % 5
    const isHalf = dtype === 'float16' || dtype === 'bfloat16'
    values[i] =
      values instanceof BigInt64Array || values instanceof BigUint64Array
        ? BigInt(value)
        : isHalf
          ? (halves[value] as number)
          : value
  }
  return values
}

async function checkReductions(both: Both, { group, rank, size }: World): Promise<void> {
  const dtypes = [
    'float32',
    'bfloat16',
    'float16',
    'float64',
    'int64',
    'int32',
    'int8',
    'uint8',
    'uint32',
    'uint64',
  ] as const
  for (const dtype of dtypes) {
    for (const n of dtype === 'float32' ? [1, 17, 300_007] : [1, 1003]) {
      for (const op of ['sum', 'max', 'min'] as const satisfies Reduction[]) {
        const data = whole(dtype, n, rank)
        await same(both, `allReduce ${dtype} [${n}] ${op}`, (ctx) =>
          allReduce(ctx, put(ctx, dtype, data, [n]), group, op),
        )
      }
    }
    const rows = whole(dtype, size * 35, rank)
    const shape = [size * 5, 7]
    await same(both, `reduceScatter ${dtype}`, (ctx) => reduceScatter(ctx, put(ctx, dtype, rows, shape), group))
    await same(both, `allGather ${dtype}`, (ctx) => allGather(ctx, put(ctx, dtype, rows, shape), group))
    await same(both, `allGatherInPlace ${dtype}`, (ctx) => {
      const t = put(ctx, dtype, rows, shape)
      allGatherInPlace(ctx, t, group)
      return t
    })
    await same(both, `reduceScatterInPlace ${dtype}`, (ctx) => {
      const t = put(ctx, dtype, rows, shape)
      reduceScatterInPlace(ctx, t, group)
      return t.slice(ctx, 0, rank * 5, 5)
    })
  }
}

async function checkMoves(both: Both, { group, rank, size }: World): Promise<void> {
  const all = Array.from({ length: size }, (_, r) => r)
  for (const root of all) {
    const data = new Int16Array(10_003).fill(rank === root ? 7 + root : -1)
    await same(both, `broadcast from ${root}`, (ctx) => broadcast(ctx, put(ctx, 'int16', data, [10_003]), root, group))
  }
  // Rank r sends p + 1 + r rows to rank p, none to the next one.
  const counts = (from: number, to: number) => (to === (from + 1) % size ? 0 : to + 1 + from)
  const sends = all.map((p) => counts(rank, p))
  const recvs = all.map((p) => counts(p, rank))
  const rows = sends.reduce((sum, n) => sum + n, 0)
  const data = Float32Array.from({ length: rows * 3 }, (_, i) => rank * 1000 + i)
  await same(both, 'allToAll', (ctx) => allToAll(ctx, put(ctx, 'float32', data, [rows, 3]), sends, recvs, group))
  // Everybody sends a lot to everybody before anybody receives: only progress together ends this.
  const n = 200_000
  const others = all.filter((p) => p !== rank)
  await same(both, 'pointToPoint', (ctx) => {
    const into = ctx.empty([size, n], 'float32')
    native.fill(ctx.stream.id, into.handle, -1)
    const outgoing = others.map((peer) => ({
      peer,
      tensor: put(ctx, 'float32', new Float32Array(n).fill(rank * 10 + peer), [n]),
    }))
    pointToPoint(
      ctx,
      group,
      outgoing,
      others.map((peer) => ({ peer, tensor: into.slice(ctx, 0, peer, 1) })),
    )
    return into
  })
}

/** An operation waits for what its stream has before it, what follows waits for the operation, and two streams keep one order. */
async function checkOrder(gpu: Ctx, { group, rank, size }: World): Promise<void> {
  const side = gpu.device.createStream('side')
  await withScope(gpu, async (inner) => {
    const total = (size * (size + 1)) / 2
    const x = inner.empty([1000], 'float32')
    const y = inner.empty([1000], 'float32')
    await gpu.stream.sync()
    for (let i = 0; i < 5; i++) {
      if (rank === i % size) native.debugDelay(gpu.stream.id, 5000)
      native.fill(gpu.stream.id, x.handle, rank + 1)
      allReduce(inner, x, group)
      native.fill(side.id, y.handle, 10 * (rank + 1))
      native.allReduce(group.comm, side.id, y.handle, y.handle, 0)
      native.add(gpu.stream.id, x.handle, x.handle, x.handle)
      native.add(side.id, y.handle, y.handle, y.handle)
      await side.sync()
      assert.deepEqual(
        new Set(new Float32Array((await x.bytes()).slice().buffer)),
        new Set([2 * total]),
        `x of round ${i}`,
      )
      assert.deepEqual(
        new Set(new Float32Array((await y.bytes()).slice().buffer)),
        new Set([20 * total]),
        `y of round ${i}`,
      )
    }
    native.barrier(group.comm, gpu.stream.id)
    await gpu.stream.sync()
  })
  side.dispose()
  await assertSameOnAllRanks(group.info()?.fingerprint, 'program order', group)
  const before = group.info()?.payload.allReduce as number
  await withScope(gpu, async (inner) => {
    allReduce(inner, put(inner, 'float32', new Float32Array(10), [10]), group)
    assert.throws(() => broadcast(inner, inner.empty([1], 'float32'), size, group), /expected a root/)
    assert.throws(() => allReduce(inner, inner.empty([1], 'int16'), group), /a dtype that can be summed/)
    await gpu.stream.sync()
  })
  assert.equal(group.info()?.payload.allReduce, before + 40)
  await barrier(group)
}

/** Groups of a mesh, whose members come by colour and key. */
async function checkMesh(gpu: Ctx, world: World): Promise<void> {
  const tp = 2
  const mesh = await Mesh.create({ ...defaultParallel, tensorModelParallelSize: tp }, world)
  const reversed = await world.part('reversed', [Array.from({ length: world.size }, (_, r) => world.size - 1 - r)])
  for (const group of [mesh.get('tp'), mesh.get('dp'), reversed] as CommGroup[]) {
    if (group.size === 1) continue
    assert.equal(group.info()?.transport, 'nccl', 'the world has a communicator on the GPU, and so have its parts')
    await withScope(gpu, async (inner) => {
      const t = put(inner, 'float64', Float64Array.of(world.rank), [1])
      const all = new Float64Array((await allGather(inner, t, group).bytes()).slice().buffer)
      assert.deepEqual([...all], group.ranks, `order of ${group.name}`)
    })
  }
}

async function checkAll(): Promise<void> {
  const both: Both = { gpu: Ctx.create({ device: 'cuda' }), cpu: Ctx.create({ device: 'cpu' }) }
  // The first world connects at its first operation on the GPU, its part by itself.
  const world = await initDistributed({ timeoutMs: 60_000 })
  const part = await world.part('part', [Array.from({ length: world.size }, (_, r) => r)])
  await same(both, 'part', (ctx) => allReduce(ctx, put(ctx, 'float32', Float32Array.of(world.rank), [1]), part))
  assert.equal(part.info()?.transport, 'nccl')
  assert.notEqual(world.group.info()?.transport, 'nccl')
  await checkReductions(both, world)
  await checkMoves(both, world)
  await world.dispose()
  const second = await initDistributed({ timeoutMs: 60_000 })
  second.useDevice(both.gpu.device)
  await checkMesh(both.gpu, second)
  await checkOrder(both.gpu, second)
  await second.dispose()
}

async function fault(): Promise<void> {
  const world = await initDistributed({ timeoutMs: 60_000 })
  const gpu = Ctx.create({ device: 'cuda' })
  const last = world.rank === world.size - 1
  const begin = Date.now()
  const n = 500_000
  const t = gpu.empty([n], 'float32')
  native.fill(gpu.stream.id, t.handle, 1)
  try {
    if (scenario !== 'absent') {
      for (let i = 0; i < 3; i++) allReduce(gpu, t, world.group)
      await gpu.stream.sync()
    }
    await barrier(world.group)
    world.group.setTimeout(Number(timeout))
    if (last) {
      await sleep(300)
      if (scenario === 'kill') process.kill(process.pid, 'SIGKILL')
      if (scenario === 'stop' || scenario === 'absent') await sleep(Number(timeout) + 3000)
      if (scenario === 'abort') world.abort('the test says so')
      if (scenario === 'poison') native.debugFail(gpu.stream.id, 'a kernel failed')
    }
    native.setPlace(gpu.stream.id, 'decoder.layers.3.mlp')
    // Each waits for the other: neither can end.
    if (scenario === 'mismatch' && last) broadcast(gpu, gpu.empty([1], 'float32'), 0, world.group)
    else if (scenario === 'mismatch') broadcast(gpu, t, world.size - 1, world.group)
    else allReduce(gpu, t, world.group)
    if (scenario === 'kill') allReduce(gpu, t, world.group)
    await gpu.stream.sync()
    report({ ok: true })
  } catch (error) {
    const { code, message } = error as ViaductError
    let later = ''
    try {
      gpu.stream.reset()
      allReduce(gpu, t, world.group)
    } catch (again) {
      later = (again as ViaductError).code
    }
    report({ code, message, ms: Date.now() - begin, later })
  }
  await sleep(500)
}

if (scenario === 'all') await checkAll().then(() => console.log('fine'))
else await fault().catch((error: ViaductError) => report({ code: error.code, message: error.message }))
