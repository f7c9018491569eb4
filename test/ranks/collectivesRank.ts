// One rank of collectives.test.ts: every collective against values computed on the host, over shared memory and over Gloo.
import assert from 'node:assert/strict'
import { native } from '../../lib/addon/load.js'
import { dtypes } from '../../lib/base/dtype.js'
import {
  allGather,
  allGatherObject,
  allReduce,
  allToAll,
  assertSameOnAllRanks,
  barrier,
  broadcast,
  pointToPoint,
  type Reduction,
  reduceScatter,
} from '../../lib/parallel/collectives.js'
import { defaultParallel } from '../../lib/parallel/config.js'
import type { CommGroup } from '../../lib/parallel/group.js'
import { Mesh } from '../../lib/parallel/mesh.js'
import { initDistributed, type World } from '../../lib/parallel/world.js'
import { Ctx, Tensor, withScope } from '../../lib/tensor/index.js'
import { inputOf, type ReducedDtype, reducedDtypes, reduceInOrder } from './rankOrder.js'

const bytesOf = (view: ArrayBufferView) => Buffer.from(view.buffer, view.byteOffset, view.byteLength)

async function same(t: Tensor, expected: ArrayBufferView, what: string): Promise<void> {
  const got = Buffer.from(await t.bytes())
  if (!got.equals(bytesOf(expected))) {
    const at = got.findIndex((byte, i) => byte !== bytesOf(expected)[i])
    assert.fail(`${what}: byte ${at} of ${got.length} differs`)
  }
}

function put(ctx: Ctx, dtype: ReducedDtype, data: ArrayBufferView, shape: readonly number[]): Tensor {
  const t = ctx.empty(shape, dtype)
  native.upload(ctx.stream.id, t.handle, bytesOf(data))
  return t
}

async function checkReductions(ctx: Ctx, world: World, list: readonly ReducedDtype[]): Promise<void> {
  const { size, rank, group } = world
  const ranks = Array.from({ length: size }, (_, r) => r)
  for (const dtype of list) {
    const width = dtypes[dtype].bits / 8
    // Up to 16 KiB everybody sends everything; 300007 float32 are several chunks of the pipeline.
    const big = dtype === 'float32' ? 300_007 : 16_384 / width + 1
    for (const n of [1, 17, big]) {
      const inputs = ranks.map((r) => inputOf(dtype, n, r))
      for (const op of n === 300_007 ? (['sum'] as const) : (['sum', 'max', 'min'] as const satisfies Reduction[])) {
        await withScope(ctx, async (inner) => {
          const t = put(inner, dtype, inputs[rank] as ArrayBufferView, [n])
          await same(
            allReduce(inner, t, group, op),
            reduceInOrder(dtype, inputs, op),
            `allReduce ${dtype} [${n}] ${op}`,
          )
        })
      }
    }
    const rows = ranks.map((r) => inputOf(dtype, size * 5 * 7, r))
    await withScope(ctx, async (inner) => {
      const t = put(inner, dtype, rows[rank] as ArrayBufferView, [size * 5, 7])
      const whole = bytesOf(reduceInOrder(dtype, rows, 'sum'))
      const part = whole.subarray(rank * 35 * width, (rank + 1) * 35 * width)
      const out = reduceScatter(inner, t, group)
      assert.deepEqual(out.shape, [5, 7])
      await same(out, part, `reduceScatter ${dtype}`)
      await same(allGather(inner, out, group), whole, `allGather ${dtype}`)
    })
  }
}

async function checkMoves(ctx: Ctx, world: World): Promise<void> {
  const { size, rank, group } = world
  for (let root = 0; root < size; root++) {
    await withScope(ctx, async (inner) => {
      const t = Tensor.fromHost(inner, new Int32Array(100_003).fill(rank === root ? 7 + root : -1), [100_003], 'int32')
      await same(broadcast(inner, t, root, group), new Int32Array(100_003).fill(7 + root), `broadcast from ${root}`)
    })
  }
  // Rank r sends p + 1 + r rows to rank p, none to the next one.
  const counts = (from: number, to: number) => (to === (from + 1) % size ? 0 : to + 1 + from)
  const all = Array.from({ length: size }, (_, r) => r)
  const sends = all.map((p) => counts(rank, p))
  const recvs = all.map((p) => counts(p, rank))
  await withScope(ctx, async (inner) => {
    const flat = (rows: { from: number; to: number }[]) =>
      Float32Array.from(rows.flatMap(({ from, to }) => [from, to, 10 * from + to]))
    const out = all.flatMap((to) => Array.from({ length: counts(rank, to) }, () => ({ from: rank, to })))
    const into = all.flatMap((from) => Array.from({ length: counts(from, rank) }, () => ({ from, to: rank })))
    const t = Tensor.fromHost(inner, flat(out), [out.length, 3], 'float32')
    await same(allToAll(inner, t, sends, recvs, group), flat(into), 'allToAll')
  })
  // Everybody sends a lot to everybody before anybody receives: only progress together ends this.
  await withScope(ctx, async (inner) => {
    const n = 400_000
    const others = all.filter((p) => p !== rank)
    const outgoing = others.map((peer) => ({
      peer,
      tensor: Tensor.fromHost(inner, new Float32Array(n).fill(rank * 10 + peer), [n], 'float32'),
    }))
    const incoming = others.map((peer) => ({ peer, tensor: inner.empty([n], 'float32') }))
    pointToPoint(inner, group, outgoing, incoming)
    for (const { peer, tensor } of incoming)
      await same(tensor, new Float32Array(n).fill(peer * 10 + rank), `from ${peer}`)
  })
}

async function checkMesh(ctx: Ctx, world: World): Promise<void> {
  const { size, rank } = world
  const tp = size % 2 === 0 ? 2 : 1
  const mesh = await Mesh.create({ ...defaultParallel, tensorModelParallelSize: tp, numQueryGroups: 1 }, world)
  const expectRanks = (group: CommGroup, ranks: number[]) => assert.deepEqual(group.ranks, ranks, group.name)
  const first = rank - (rank % tp)
  expectRanks(
    mesh.get('tp'),
    Array.from({ length: tp }, (_, i) => first + i),
  )
  expectRanks(
    mesh.get('dp'),
    Array.from({ length: size / tp }, (_, i) => (rank % tp) + i * tp),
  )
  expectRanks(mesh.get('tp_kv'), [...mesh.get('tp').ranks])
  assert.equal(mesh.get('pp').size, 1)
  const again = await Mesh.create({ ...defaultParallel, tensorModelParallelSize: tp, numQueryGroups: 1 }, world)
  assert.equal(again.get('dp'), mesh.get('dp'), 'groups are shared between meshes of the same sizes')
  for (const axis of ['tp', 'dp', 'world'] as const) {
    const group = mesh.get(axis)
    await withScope(ctx, async (inner) => {
      const t = Tensor.fromHost(inner, Float64Array.of(rank + 1), [1], 'float64')
      await same(allReduce(inner, t, group), Float64Array.of(group.ranks.reduce((sum, r) => sum + r + 1, 0)), axis)
    })
  }
}

async function checkOrder(ctx: Ctx, world: World): Promise<void> {
  const { group, rank, size } = world
  await assertSameOnAllRanks(group.info()?.fingerprint, 'program order', group)
  await assert.rejects(
    assertSameOnAllRanks({ same: 1, odd: rank === size - 1 }, 'configuration', group),
    /got another on rank/,
  )
  const before = group.info()?.fingerprint
  const t = Tensor.fromHost(ctx, new Float32Array(4), [4], 'float32')
  allReduce(ctx, t, group)
  const one = group.info()?.fingerprint
  allReduce(ctx, t, group)
  assert.notEqual(one, before)
  assert.notEqual(group.info()?.fingerprint, one)
  await ctx.stream.sync()
  // NaN wins.
  const nan = Tensor.fromHost(ctx, Float32Array.of(rank === size - 1 ? Number.NaN : 5), [1], 'float32')
  assert.equal(Number.isNaN(await allReduce(ctx, nan, group, 'max').item()), true)
  assert.deepEqual(
    await allGatherObject({ rank, text: 'ü'.repeat(rank) }, group),
    Array.from({ length: size }, (_, r) => ({ rank: r, text: 'ü'.repeat(r) })),
  )
  await barrier(group)
  // Wrong calls are refused at the call and leave the group usable.
  assert.throws(() => reduceScatter(ctx, ctx.empty([size + 1], 'float32'), group), /ERR_SHAPE|expected a first dim/)
  assert.throws(() => broadcast(ctx, t, size, group), /expected a root/)
  await barrier(group)
}

const started = Date.now()
for (const transport of ['auto', 'gloo']) {
  process.env.VIADUCT_TRANSPORT = transport
  const world = await initDistributed({ timeoutMs: 30_000 })
  assert.equal(world.group.info()?.transport, transport === 'gloo' ? 'gloo' : 'shm')
  const ctx = Ctx.create()
  await withScope(ctx, async (inner) => {
    // The sums do not know what carried the bytes: one dtype of each kind is enough for the second way.
    await checkReductions(inner, world, transport === 'gloo' ? ['float32', 'bfloat16', 'int64'] : reducedDtypes)
    await checkMoves(inner, world)
    await checkMesh(inner, world)
    await checkOrder(inner, world)
  })
  await world.dispose()
  console.log(`${transport} ${Date.now() - started} ms`)
}
console.log(`fine after ${Date.now() - started} ms`)
