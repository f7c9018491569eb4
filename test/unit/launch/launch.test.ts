// The launcher's parts that start nothing: flags, lines, who failed first, command lines, error files.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { readErrorFile, writeErrorFile } from '../../../lib/base/errorFile.js'
import { ViaductError } from '../../../lib/base/errors.js'
import { rankCommand } from '../../../lib/launch/command.js'
import { firstCause } from '../../../lib/launch/firstCause.js'
import { type LaunchOptions, planLaunch } from '../../../lib/launch/options.js'
import { LinePrefixer } from '../../../lib/launch/output.js'
import { type RankEnd, shellCode } from '../../../lib/launch/rankProcess.js'

afterEach(() => vi.unstubAllEnvs())

const plan = (options: Partial<LaunchOptions> = {}) => planLaunch({ script: 'a.ts', ...options })

describe('flags', () => {
  it('default to one rank on a free port', () => {
    expect(plan()).toMatchObject({
      localSize: 1,
      nodes: 1,
      nodeRank: 0,
      masterAddr: '127.0.0.1',
      masterPort: 0,
      maxRestarts: 0,
      prefix: true,
    })
  })
  it('come as text, and from PET_ variables where they are not given', () => {
    vi.stubEnv('PET_NPROC_PER_NODE', '3')
    vi.stubEnv('PET_NNODES', '2')
    vi.stubEnv('PET_NODE_RANK', '1')
    vi.stubEnv('PET_MASTER_ADDR', 'n0')
    expect(plan({ masterPort: '1234' })).toMatchObject({
      localSize: 3,
      nodes: 2,
      nodeRank: 1,
      masterAddr: 'n0',
      masterPort: 1234,
      jobId: 'none',
    })
    expect(plan({ nprocPerNode: '2', standalone: true })).toMatchObject({
      localSize: 2,
      nodes: 1,
      masterPort: 0,
      masterAddr: '127.0.0.1',
    })
  })
  it.each([{ masterPort: '65536' }, { masterPort: 99_999 }, { rdzvEndpoint: 'n0:99999' }])(
    'refuse the port of %j',
    (options) => {
      expect(() => plan(options)).toThrowError(
        expect.objectContaining({ code: 'ERR_USAGE', message: expect.stringContaining('at most 65535') }),
      )
    },
  )
  it('take an endpoint, by which node ranks go by arrival', () => {
    expect(plan({ nnodes: '2:2', rdzvEndpoint: 'host:77', rdzvBackend: 'c10d', rdzvId: 'j' })).toMatchObject({
      nodes: 2,
      nodeRank: null,
      masterAddr: 'host',
      masterPort: 77,
      jobId: 'j',
    })
    expect(plan({ nnodes: 2, rdzvEndpoint: '[::1]:5', nodeRank: 1 })).toMatchObject({
      nodeRank: 1,
      masterAddr: '::1',
      masterPort: 5,
    })
    expect(plan({ nnodes: 2, rdzvEndpoint: 'host' }).masterPort).toBe(29500)
  })
  it("take the time for nodes to come from torchrun's settings", () => {
    expect(plan().joinMs).toBe(600_000)
    expect(plan({ rdzvConf: ' join_timeout=90' }).joinMs).toBe(90_000)
    expect(plan({ rdzvConf: 'join_timeout=1.5,' }).joinMs).toBe(1500)
  })
  it('say which streams go where', () => {
    expect(plan({ nprocPerNode: 3, redirects: '0:1,2:3', tee: '2' })).toMatchObject({
      redirects: [1, 0, 3],
      tee: [2, 2, 2],
    })
    expect(plan({ nprocPerNode: 2, logDir: 'x' }).tee).toEqual([3, 3])
    expect(plan({ nprocPerNode: 3, localRanksFilter: '0,2' }).shown).toEqual([true, false, true])
  })
  it.each<[string, Partial<LaunchOptions>, RegExp]>([
    ['a module', { module: true }, /-m names a Python module/],
    ['no number of ranks', { nprocPerNode: 'many' }, /--nproc-per-node.*"many"/],
    ['no ranks', { nprocPerNode: 0 }, /--nproc-per-node/],
    ['a range of nodes', { nnodes: '1:4' }, /does not change during a run/],
    ['nodes without an address', { nnodes: 2, nodeRank: 0 }, /--master-addr/],
    ['nodes without a rank', { nnodes: 2, masterAddr: 'h' }, /--node-rank/],
    ['a node rank that is too high', { nnodes: 2, nodeRank: 2, masterAddr: 'h' }, /0 to 1, got 2/],
    ['another backend', { rdzvBackend: 'etcd' }, /c10d or static/],
    [
      'another setting of the rendezvous',
      { rdzvConf: 'join_timeout=5,read_timeout=9' },
      /join_timeout=SECONDS, got "read/,
    ],
    ['a time that is none', { rdzvConf: 'join_timeout=soon' }, /join_timeout to be seconds, got "soon"/],
    ['a strange redirect', { redirects: '4' }, /--redirects/],
    ['GPUs where there are none', { nprocPerNode: 'gpu' }, /found none/],
  ])('refuse %s', (_name, options, message) => {
    vi.stubEnv('CUDA_VISIBLE_DEVICES', '-1')
    expect(() => plan(options)).toThrow(message)
    expect(() => plan(options)).toThrow(ViaductError)
  })
})

describe('command lines', () => {
  const here = import.meta.filename
  it('load TypeScript through tsx, JavaScript through Node, programs as they are', () => {
    expect(rankCommand('prog', ['a'], true)).toEqual({ program: 'prog', args: ['a'], beats: false })
    const script = rankCommand(here, ['--x', '1'], false)
    expect(script.program).toBe(process.execPath)
    expect(script.args.slice(-3)).toEqual([here, '--x', '1'])
    expect(script.args.join(' ')).toMatch(/--import \S*tsx\S* .*rankPreload/)
  })
  it('refuse other files and files that are not there', () => {
    expect(() => rankCommand('train.py', [], false)).toThrow(/--no-python/)
    expect(() => rankCommand('/nowhere/a.ts', [], false)).toThrow(expect.objectContaining({ code: 'ERR_FILE_MISSING' }))
  })
})

describe('lines', () => {
  const feed = (...chunks: string[]) => {
    const lines = new LinePrefixer('[rank7] ')
    return chunks.map((chunk) => lines.push(Buffer.from(chunk)).toString()).join('') + lines.end().toString()
  }
  it('have a prefix each, whatever the chunks', () => {
    expect(feed('a\nb', 'c\n\n', 'last')).toBe('[rank7] a\n[rank7] bc\n[rank7] \n[rank7] last\n')
    expect(feed('')).toBe('')
  })
  it('keep characters of several bytes whole', () => {
    const lines = new LinePrefixer('> ')
    const bytes = Buffer.from('grün\n')
    const parts = [...bytes].map((byte) => lines.push(Buffer.from([byte])))
    expect(Buffer.concat(parts).toString()).toBe('> grün\n')
  })
  it('do not grow without bound', () => {
    const out = feed('x'.repeat(100_000), 'y'.repeat(10), '\n')
    expect(out.replace(/\[rank7\] |\n/g, '')).toBe('x'.repeat(100_000) + 'y'.repeat(10))
    expect(out.split('\n').length).toBeGreaterThan(2)
  })
})

describe('who failed first', () => {
  const end = (rank: number, fields: Partial<RankEnd>): RankEnd => ({
    rank,
    localRank: rank,
    pid: 100 + rank,
    exitCode: 1,
    signal: null,
    timeMs: 1000,
    error: null,
    stopped: false,
    silence: null,
    ...fields,
  })
  const error = (code: string | null, timeMs: number | null) => ({ message: 'm', code, timeMs })
  it('is the earliest by exit or by its error file', () => {
    expect(firstCause([end(0, { timeMs: 5 }), end(1, { timeMs: 3 })])?.rank).toBe(1)
    expect(firstCause([end(0, { timeMs: 5 }), end(1, { timeMs: 9, error: error('ERR_DATA', 2) })])?.rank).toBe(1)
  })
  it('is a cause rather than a rank that lost others', () => {
    const ends = [
      end(0, { timeMs: 1, error: error('ERR_COMM', 1) }),
      end(1, { exitCode: null, signal: 'SIGKILL', timeMs: 4 }),
    ]
    expect(firstCause(ends)?.rank).toBe(1)
    expect(firstCause(ends.slice(0, 1))?.rank).toBe(0)
  })
  const lost = (rank: number, code: string, message: string) =>
    end(rank, { timeMs: rank, error: { message: `${code} [allReduce] ${message}`, code, timeMs: rank } })
  const timeout = (rank: number, place: string, missing: string) =>
    lost(rank, 'ERR_TIMEOUT', `expected all ranks in ${place} within 2.0 s, not heard from ${missing}: it is stopped`)
  const silence = { ms: 8500, state: ', a signal has stopped it' }
  const killed = { exitCode: null, signal: 'SIGKILL', stopped: true } as const

  it('is a rank without heartbeat, where none died by itself', () => {
    const silent = end(2, { ...killed, silence })
    const ends = [timeout(0, 'operation 7 of group tp', 'rank 1'), end(1, killed), silent]
    expect(firstCause(ends)).toMatchObject({
      rank: 2,
      end: silent,
      what: 'no heartbeat for 8.5 s, a signal has stopped it',
    })
    expect(firstCause([...ends, end(3, { exitCode: 9 })])?.rank).toBe(3)
  })
  it('is the rank that others waited for and that did not wait itself, in the lowest operation', () => {
    const ends = [
      timeout(0, 'operation 7 of group tp', 'rank 1'),
      timeout(1, 'operation 9 of group dp', 'ranks 3, 5'),
      lost(3, 'ERR_COMM', 'operation 9 of group dp ended because rank 1 gave up: it timed out'),
      end(5, killed),
    ]
    expect(firstCause(ends)).toMatchObject({
      rank: 5,
      what: 'was lost in or never entered operation 9 of group dp, ranks 1, 3 waited in vain',
      drawn: true,
    })
    ends.push(timeout(2, 'operation 4 of group world', 'rank 4'))
    expect(firstCause(ends)).toMatchObject({ rank: 4, end: undefined })
  })
  it('is a rank that left without the others, or never came', () => {
    const gone = lost(0, 'ERR_COMM', "operation 3 of group world lost rank 1: see that rank's output")
    expect(firstCause([gone, end(1, { exitCode: 0 })])).toMatchObject({
      rank: 1,
      what: 'exit code 0, was lost in or never entered operation 3 of group world, rank 0 waited in vain',
    })
    const alone = lost(0, 'ERR_TIMEOUT', 'expected 2 ranks within 2 s, not heard from rank 1: see their output')
    expect(firstCause([alone, end(1, killed)])).toMatchObject({
      rank: 1,
      what: 'did not join the others, rank 0 waited in vain',
    })
  })
  it('is nobody where all ended well', () => {
    expect(firstCause([end(0, { exitCode: 0 }), end(1, { exitCode: 0 })])).toBeUndefined()
  })
  it('has an exit code as in a shell', () => {
    expect(shellCode(end(0, { exitCode: 3 }))).toBe(3)
    expect(shellCode(end(0, { exitCode: null, signal: 'SIGKILL' }))).toBe(137)
  })
})

describe('error files', () => {
  const folder = mkdtempSync(join(tmpdir(), 'viaduct-error-'))
  afterEach(() => rmSync(folder, { recursive: true, force: true }))

  it('keep the first error, with code and time', () => {
    const file = join(folder, 'deep', 'error.json')
    vi.stubEnv('TORCHELASTIC_ERROR_FILE', file)
    const before = Date.now()
    writeErrorFile(new ViaductError('ERR_DATA', 'here', 'broken'))
    writeErrorFile(new Error('later'))
    const read = readErrorFile(file)
    expect(read).toMatchObject({ message: 'ERR_DATA [here] broken', code: 'ERR_DATA' })
    expect(read?.timeMs).toBeGreaterThanOrEqual(before)
    // torchrun wants a whole number of seconds beside a message of text.
    expect(Number.isInteger(JSON.parse(readFileSync(file, 'utf8')).timestamp)).toBe(true)
  })
  it('keep the code of an error that another copy of Viaduct has thrown', () => {
    const other = mkdtempSync(join(tmpdir(), 'viaduct-error-'))
    const file = join(other, 'error.json')
    vi.stubEnv('TORCHELASTIC_ERROR_FILE', file)
    writeErrorFile(Object.assign(new Error('[allReduce] lost'), { name: 'ViaductError', code: 'ERR_COMM' }))
    expect(readErrorFile(file)).toMatchObject({ message: 'ERR_COMM [allReduce] lost', code: 'ERR_COMM' })
    rmSync(other, { recursive: true })
  })
  it("are read in torchrun's form too, and broken ones not at all", () => {
    const folder2 = mkdtempSync(join(tmpdir(), 'viaduct-error-'))
    const file = join(folder2, 'e.json')
    writeFileSync(
      file,
      JSON.stringify({ message: { message: 'RuntimeError: x', extraInfo: { py_callstack: '', timestamp: '17' } } }),
    )
    expect(readErrorFile(file)).toEqual({ message: 'RuntimeError: x', code: null, timeMs: 17_000 })
    writeFileSync(file, '{"message"')
    expect(readErrorFile(file)).toBeNull()
    expect(readErrorFile(join(folder2, 'none'))).toBeNull()
    rmSync(folder2, { recursive: true })
  })
})
