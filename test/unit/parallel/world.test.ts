// Who this process is, from launchers' variables; groups of a mesh as lists of ranks; a world of one.
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { environment } from '../../../lib/base/env.js'
import { allGatherObject, assertSameOnAllRanks, barrier } from '../../../lib/parallel/collectives.js'
import { defaultParallel } from '../../../lib/parallel/config.js'
import { hostAddress } from '../../../lib/parallel/hostAddress.js'
import { Mesh, partsAlong } from '../../../lib/parallel/mesh.js'
import { initDistributed } from '../../../lib/parallel/world.js'
import { detectWorld, firstSlurmHost, slurmTasksOnNode } from '../../../lib/parallel/worldFacts.js'

beforeEach(() => {
  for (const name of Object.keys(environment)) vi.stubEnv(name, undefined)
})
afterEach(() => vi.unstubAllEnvs())

function set(variables: Record<string, string>): void {
  for (const [name, value] of Object.entries(variables)) vi.stubEnv(name, value)
}

const slurm = {
  SLURM_STEP_ID: '0',
  SLURM_PROCID: '9',
  SLURM_NTASKS: '20',
  SLURM_LOCALID: '1',
  SLURM_NODEID: '1',
  SLURM_TASKS_PER_NODE: '8(x2),4',
  SLURM_JOB_ID: '123456',
  SLURM_JOB_NODELIST: 'gpu[07-09,12]',
}
const openmpi = {
  OMPI_COMM_WORLD_RANK: '1',
  OMPI_COMM_WORLD_SIZE: '2',
  OMPI_COMM_WORLD_LOCAL_RANK: '1',
  OMPI_COMM_WORLD_LOCAL_SIZE: '2',
}

describe('the address of this host', () => {
  const entry = (address: string, family: 'IPv4' | 'IPv6' = 'IPv4') => ({
    address,
    family,
    netmask: '',
    mac: '',
    internal: false,
    cidr: null,
    scopeid: 0,
  })
  const interfaces = { lo: [entry('127.0.0.1')], eth0: [entry('fe80::1', 'IPv6'), entry('10.0.0.5')] }
  const more = { ...interfaces, docker0: [entry('172.17.0.1')] }
  const facts = { size: 4, localSize: 2, masterAddr: 'node0' }

  it('is the one on the way to the master', () => {
    expect(hostAddress(facts, '10.0.0.5', more as never)).toBe('10.0.0.5')
    expect(hostAddress({ ...facts, localSize: 4 }, '127.0.1.1', more as never)).toBe('127.0.1.1')
    expect(hostAddress({ ...facts, masterAddr: '127.0.0.1' }, '127.0.0.1', more as never)).toBe('127.0.0.1')
  })
  it('is that of the interface in GLOO_SOCKET_IFNAME', () => {
    set({ GLOO_SOCKET_IFNAME: 'ib0,docker0' })
    expect(hostAddress(facts, '10.0.0.5', more as never)).toBe('172.17.0.1')
    expect(() => hostAddress(facts, '10.0.0.5', interfaces as never)).toThrow(/got ib0,docker0: this host has lo, eth0/)
    set({ VIADUCT_COMM_ADDR: '1.2.3.4' })
    expect(hostAddress(facts, '10.0.0.5', more as never)).toBe('1.2.3.4')
  })
  it("is no loopback where the host's own name leads to one", () => {
    expect(hostAddress(facts, '127.0.1.1', interfaces as never)).toBe('10.0.0.5')
    expect(() => hostAddress(facts, '127.0.1.1', more as never)).toThrow(
      /got 127.0.1.1, and 10.0.0.5, 172.17.0.1 to choose from: set GLOO_SOCKET_IFNAME/,
    )
  })
})

describe('a launcher', () => {
  it('may be missing: one rank', () => {
    expect(detectWorld()).toMatchObject({ launcher: 'none', rank: 0, size: 1, localRank: 0, localSize: 1 })
  })
  it('torchrun comes before srun and mpirun', () => {
    set({
      ...slurm,
      ...openmpi,
      RANK: '3',
      WORLD_SIZE: '4',
      LOCAL_RANK: '1',
      LOCAL_WORLD_SIZE: '2',
      MASTER_ADDR: 'm',
      MASTER_PORT: '7',
      TORCHELASTIC_RESTART_COUNT: '2',
      TORCHELASTIC_RUN_ID: 'r',
    })
    expect(detectWorld()).toEqual({
      launcher: 'torchrun',
      rank: 3,
      size: 4,
      localRank: 1,
      localSize: 2,
      masterAddr: 'm',
      masterPort: 7,
      jobId: 'r',
      restart: 2,
    })
  })
  it('srun', () => {
    set(slurm)
    expect(detectWorld()).toMatchObject({
      launcher: 'slurm',
      rank: 9,
      size: 20,
      localRank: 1,
      localSize: 8,
      masterAddr: 'gpu07',
      masterPort: 10000 + (123456 % 50000),
    })
    vi.stubEnv('SLURM_STEP_ID', undefined)
    expect(detectWorld().launcher).toBe('none')
  })
  it('mpirun of Open MPI and of others', () => {
    set(openmpi)
    expect(detectWorld()).toMatchObject({
      launcher: 'openmpi',
      rank: 1,
      size: 2,
      localRank: 1,
      localSize: 2,
      masterAddr: '127.0.0.1',
    })
    vi.stubEnv('OMPI_COMM_WORLD_LOCAL_SIZE', '1')
    vi.stubEnv('OMPI_COMM_WORLD_LOCAL_RANK', '0')
    expect(() => detectWorld()).toThrow(/MASTER_ADDR/)
    for (const name of Object.keys(openmpi)) vi.stubEnv(name, undefined)
    set({ PMI_RANK: '1', PMI_SIZE: '2', MV2_COMM_WORLD_LOCAL_RANK: '1', MV2_COMM_WORLD_LOCAL_SIZE: '2' })
    expect(detectWorld()).toMatchObject({ launcher: 'pmi', rank: 1, size: 2, localRank: 1, localSize: 2 })
  })
  it.each([
    [{ RANK: '0' }, /only RANK/],
    [{ WORLD_SIZE: '2' }, /only WORLD_SIZE/],
    [{ RANK: '2', WORLD_SIZE: '2' }, /rank of 0 to 1, got 2/],
    [{ RANK: 'x', WORLD_SIZE: '2' }, /RANK.*"x"/],
    [{ RANK: '1', WORLD_SIZE: '2', LOCAL_RANK: '1' }, /local rank/],
  ] as [Record<string, string>, RegExp][])('that contradicts itself is refused: %o', (variables, message) => {
    set(variables)
    expect(() => detectWorld()).toThrow(message)
  })
  it.each([
    ['n1', 'n1'],
    ['n1,n2', 'n1'],
    ['n[01-03,7],m4', 'n01'],
    ['a-b[10]', 'a-b10'],
    ['r[1-2]x,z', 'r1x'],
    ['login,n[1-2]', 'login'],
  ])("Slurm's list %s begins with %s", (list, host) => expect(firstSlurmHost(list)).toBe(host))
  it("Slurm's counts are read by node", () => {
    expect([0, 1, 2, 3].map((node) => slurmTasksOnNode('8(x2),4', node))).toEqual([8, 8, 4, undefined])
    expect(slurmTasksOnNode('many', 0)).toBeUndefined()
  })
})

describe('rank order tp-cp-dp-pp', () => {
  const grid = [
    ['tp', 2],
    ['cp', 1],
    ['dp', 2],
    ['pp', 2],
  ] as const
  it('has tensor-parallel neighbours next to each other', () => {
    expect(partsAlong(grid, ['tp'])).toEqual([
      [0, 1],
      [2, 3],
      [4, 5],
      [6, 7],
    ])
    expect(partsAlong(grid, ['dp'])).toEqual([
      [0, 2],
      [1, 3],
      [4, 6],
      [5, 7],
    ])
    expect(partsAlong(grid, ['pp'])).toEqual([
      [0, 4],
      [1, 5],
      [2, 6],
      [3, 7],
    ])
    expect(partsAlong(grid, ['dp', 'cp'])).toEqual(partsAlong(grid, ['dp']))
  })
  it('puts every rank into one part', () => {
    for (const axes of [['tp'], ['dp'], ['tp', 'pp'], ['tp', 'cp', 'dp', 'pp'], []]) {
      expect(partsAlong(grid, axes).flat().sort()).toEqual([0, 1, 2, 3, 4, 5, 6, 7])
    }
  })
})

describe('a world of one', () => {
  it('needs no network and has every axis', async () => {
    const world = await initDistributed()
    expect(world).toMatchObject({ rank: 0, size: 1, launcher: 'none' })
    expect(await initDistributed()).toBe(world)
    const mesh = await Mesh.create({ ...defaultParallel, numQueryGroups: 2 }, world)
    for (const axis of ['tp', 'cp', 'dp', 'pp', 'ep', 'etp', 'dp_cp', 'tp_kv', 'embd', 'world'] as const) {
      expect(mesh.get(axis)).toMatchObject({ rank: 0, size: 1, comm: 0 })
    }
    expect(() => mesh.get('depth')).toThrow(/expected an axis of tp, /)
    expect(await allGatherObject({ a: 1 }, world.group)).toEqual([{ a: 1 }])
    await assertSameOnAllRanks({}, 'nothing', world.group)
    await barrier(world.group)
    await expect(Mesh.create({ ...defaultParallel, tensorModelParallelSize: 2 }, world)).rejects.toThrow(
      'tp·pp·cp = 2 but 1 rank runs: viaduct run --nproc-per-node 2',
    )
    await mesh.dispose()
    await world.dispose()
    await world.dispose()
    const next = await initDistributed()
    expect(next).not.toBe(world)
    await next.dispose()
  })
  it('refuses half of its options', async () => {
    await expect(initDistributed({ rank: 0 })).rejects.toMatchObject({ code: 'ERR_USAGE' })
    await expect(initDistributed({ rank: 2, worldSize: 2 })).rejects.toMatchObject({ code: 'ERR_USAGE' })
    await expect(initDistributed({ backend: 'nccl' as never })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
  })
  it('names the address where nobody listens', async () => {
    const lonely = initDistributed({ rank: 1, worldSize: 2, masterPort: 1, timeoutMs: 200 })
    await expect(lonely).rejects.toMatchObject({ code: 'ERR_TIMEOUT', message: expect.stringContaining('127.0.0.1:1') })
  })
})
