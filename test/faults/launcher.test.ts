// The launcher with real processes: output, exit codes, signals, restarts, several nodes, and nobody left behind.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { alive, freePort, gone, pidsIn, program, start } from './launched.js'

const ranked = join(import.meta.dirname, 'launchedRank.ts')

// A rank with a child of its own, which the shell's group must take along.
const waiting = `
  const { spawn } = require('node:child_process')
  const child = spawn('sleep', ['600'])
  process.on('SIGUSR1', () => console.log('rank got SIGUSR1'))
  process.on('SIGTERM', () => { if (process.argv[1] === 'stubborn') return console.log('rank stays'); console.log('rank saves'); setTimeout(() => process.exit(0), 100) })
  console.log('pid=' + process.pid + ' pid=' + child.pid + ' ready' + process.env.RANK)
  setInterval(() => {}, 1000)
`
const readyBoth = /ready[01][\s\S]*ready[01]/

describe('viaduct run', () => {
  it("sets torchrun's variables and puts the rank before each line", async () => {
    const names = [
      'RANK',
      'LOCAL_RANK',
      'WORLD_SIZE',
      'LOCAL_WORLD_SIZE',
      'GROUP_RANK',
      'GROUP_WORLD_SIZE',
      'MASTER_ADDR',
      'TORCHELASTIC_RESTART_COUNT',
      'TORCHELASTIC_RUN_ID',
      'OMP_NUM_THREADS',
    ]
    const code = `console.log(${JSON.stringify(names)}.map((n) => n + '=' + process.env[n]).join(' ')); console.log('two\\nlines'); process.stderr.write('no end')`
    const {
      code: exit,
      out,
      err,
    } = await start(program(code, { nprocPerNode: 2, rdzvId: 'j7' }), { OMP_NUM_THREADS: '' }).ended
    expect(exit).toBe(0)
    const lines = out.split('\n')
    for (const rank of [0, 1]) {
      expect(lines).toContain(
        `[rank${rank}] RANK=${rank} LOCAL_RANK=${rank} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 GROUP_RANK=0 GROUP_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_RUN_ID=j7 OMP_NUM_THREADS=${lines[0]?.split('=').at(-1)}`,
      )
      expect(lines).toContain(`[rank${rank}] lines`)
      expect(err.split('\n')).toContain(`[rank${rank}] no end`)
    }
    expect(Number(lines[0]?.split('=').at(-1))).toBeGreaterThan(0)
  })

  it('ends with the code of the first failing rank, and stops the others', async () => {
    const code = `if (process.env.RANK === '1') process.exit(7); console.log('pid=' + process.pid); setInterval(() => {}, 1000)`
    const begin = Date.now()
    const { code: exit, out, err } = await start(program(code, { nprocPerNode: 3 })).ended
    expect(exit).toBe(7)
    expect(err).toMatch(/viaduct run: rank 1 \(local rank 1, process \d+\) failed first: exit code 7/)
    expect(await gone(pidsIn(out), 0)).toEqual([])
    expect(Date.now() - begin).toBeLessThan(20_000)
  })

  it('tells of a rank that a signal killed, and of a program that cannot start', async () => {
    const killed = await start(program(`process.kill(process.pid, 'SIGKILL')`)).ended
    expect(killed.code).toBe(137)
    expect(killed.err).toContain('rank 0 (local rank 0, process ')
    expect(killed.err).toContain('failed first: signal SIGKILL')
    const absent = await start({ script: '/nowhere/program', noPython: true }).ended
    expect(absent.code).toBe(127)
    expect(absent.err).toContain('/nowhere/program could not be started')
  })

  it('passes signals on: SIGUSR1, then SIGTERM with time to save', async () => {
    const launched = start(program(waiting, { nprocPerNode: 2 }))
    await launched.until(readyBoth)
    launched.child.kill('SIGUSR1')
    await launched.until(/(rank got SIGUSR1[\s\S]*){2}/)
    launched.child.kill('SIGTERM')
    const { code, out } = await launched.ended
    expect(code).toBe(143)
    expect(out.match(/rank saves/g)).toHaveLength(2)
    expect(await gone(pidsIn(out), 1000)).toEqual([])
  })

  it('kills ranks that stay after the grace', async () => {
    const stubborn = program(waiting, { shutdownTimeout: 0.5 })
    const launched = start({ ...stubborn, args: [...(stubborn.args ?? []), 'stubborn'] })
    await launched.until(/ready0/)
    launched.child.kill('SIGTERM')
    const { code, out } = await launched.ended
    expect(code).toBe(143)
    expect(out).toContain('rank stays')
    expect(await gone(pidsIn(out), 1000)).toEqual([])
  })

  it('leaves nobody behind when it is killed itself', async () => {
    const launched = start(program(waiting, { nprocPerNode: 2 }))
    await launched.until(readyBoth)
    const pids = pidsIn(launched.text())
    expect(pids).toHaveLength(4)
    expect(pids.every(alive)).toBe(true)
    launched.child.kill('SIGKILL')
    expect(await gone(pids, 5000)).toEqual([])
  })

  it('writes logs of each attempt and rank, and shows what is asked', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'viaduct-logs-'))
    try {
      const code = `console.log('out' + process.env.RANK); console.error('err' + process.env.RANK)`
      const options = {
        nprocPerNode: 2,
        logDir: folder,
        rdzvId: 'job',
        redirects: '2',
        tee: '1',
        localRanksFilter: '1',
      }
      const { code: exit, out, err } = await start(program(code, options)).ended
      expect({ exit, out, err }).toEqual({ exit: 0, out: '[rank1] out1\n', err: '' })
      const read = (rank: number, name: string) =>
        readFileSync(join(folder, 'job', 'attempt_0', `${rank}`, `${name}.log`), 'utf8')
      expect([read(0, 'stdout'), read(0, 'stderr'), read(1, 'stderr')]).toEqual(['out0\n', 'err0\n', 'err1\n'])
    } finally {
      rmSync(folder, { recursive: true })
    }
  })

  it('starts all ranks again, reports the error of the first, and the scripts meet again', async () => {
    const { code, out, err } = await start({ script: ranked, args: ['failOnce'], nprocPerNode: 2, maxRestarts: 1 })
      .ended
    expect(err).toContain('ERR_DATA [test] expected good data, got bad')
    expect(err).toContain('restart 1 of 1')
    expect(out).toContain('[rank0] restart 1 ranks [[0,0],[1,1]]')
    expect(out).toContain('[rank1] restart 1 ranks [[0,0],[1,1]]')
    expect(code).toBe(0)
    expect(readdirSync('/dev/shm').filter((name) => name.startsWith('viaduct-'))).toEqual([])
  })

  it('joins two nodes, which restart together', async () => {
    const masterPort = await freePort()
    const nodes = [1, 0].map((nodeRank) =>
      start({
        script: ranked,
        args: ['failOnce'],
        nprocPerNode: 1,
        nnodes: 2,
        nodeRank,
        masterAddr: '127.0.0.1',
        masterPort,
        maxRestarts: 1,
      }),
    )
    const [second, first] = await Promise.all(nodes.map((node) => node.ended))
    expect(first?.out).toContain('[rank0] restart 1 ranks [[0,0],[1,0]]')
    expect(second?.out).toContain('[rank1] restart 1 ranks [[0,0],[1,0]]')
    expect([first?.code, second?.code]).toEqual([0, 0])
  })

  it('ends all nodes when one fails for good', async () => {
    const rdzvEndpoint = `127.0.0.1:${await freePort()}`
    const code = `if (process.env.RANK === '1') setTimeout(() => process.exit(5), 300); else setInterval(() => {}, 1000)`
    const nodes = [0, 1].map(() => start(program(code, { nnodes: 2, rdzvEndpoint, rdzvId: 'x' })))
    const ends = await Promise.all(nodes.map((node) => node.ended))
    expect(ends.map((end) => end.code)).toEqual([5, 5])
    expect(ends.map((end) => end.err).join('')).toMatch(/rank 1 .*failed first on node 1: exit code 5/)
    expect(ends.map((end) => end.err).join('')).toMatch(/node 1 ended the run/)
  })

  it('refuses before it starts anything', async () => {
    expect(await start({ script: 'no.ts' }).ended).toMatchObject({
      code: 3,
      err: expect.stringContaining('ERR_FILE_MISSING'),
    })
    const alone = { nnodes: 2, nodeRank: 0, masterAddr: '127.0.0.1', masterPort: await freePort(), joinTimeout: 1 }
    expect(await start(program('', alone)).ended).toMatchObject({
      code: 4,
      err: expect.stringContaining('node 1 did not come'),
    })
  })
})

const torchrun = [
  process.env.VIADUCT_TORCHRUN,
  ...(process.env.PATH ?? '').split(':').map((folder) => join(folder, 'torchrun')),
].find((file) => file !== undefined && existsSync(file))

describe('a script under torchrun itself', () => {
  it.skipIf(torchrun === undefined)(
    'runs unchanged, and after a restart (needs torchrun on PATH or VIADUCT_TORCHRUN)',
    () => {
      const flags = ['--no-python', '--standalone', '--nproc-per-node', '2', '--max-restarts', '1']
      const command = [process.execPath, '--import', 'tsx', ranked, 'failOnce']
      const { status, stdout, stderr } = spawnSync(torchrun as string, [...flags, ...command], {
        encoding: 'utf8',
        timeout: 55_000,
      })
      expect(stdout.match(/restart 1 ranks \[\[0,0\],\[1,1\]\]/g), stderr).toHaveLength(2)
      expect(status).toBe(0)
    },
  )
})
