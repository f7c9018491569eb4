// Downloads from a hub that breaks, lies, refuses and stalls: the cache ends right or untouched, in bounded time.
import { execFile } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, realpathSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { inspect, promisify } from 'node:util'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { snapshotDownload } from '../../lib/io/hub/snapshot.js'
import { randomBytes } from '../hostile/llamaFolder.js'
import { errorOf, temporaryFolder } from '../hostile/temporary.js'
import { MockHub, sha256, token } from './mockHub.js'

const repo = 'org/model'
const big = randomBytes(8 << 20, 7)
const files = () => ({
  'config.json': Buffer.from('{"a": 1}\n'),
  'tokenizer.json': Buffer.from('{}'),
  'nested/extra file.txt': Buffer.from('extra'),
  'model.safetensors': big,
  'pytorch_model.bin': randomBytes(5000, 2),
  'consolidated.safetensors': randomBytes(5000, 3),
})
const quick = { backoffMs: 5, stallMs: 2000 }
const home = temporaryFolder()
let hub: MockHub
let cache: string
let count = 0

beforeEach(async () => {
  hub = await MockHub.start(repo, files())
  cache = join(home, `cache-${count++}`)
  vi.stubEnv('HF_ENDPOINT', hub.endpoint)
  vi.stubEnv('HF_HUB_CACHE', cache)
  vi.stubEnv('HF_HOME', join(home, 'no-home'))
  vi.stubEnv('HF_HUB_OFFLINE', '')
  vi.stubEnv('HF_TOKEN', '')
})
afterEach(() => {
  hub.stop()
  vi.unstubAllEnvs()
})

const blobs = () => {
  const folder = join(cache, 'models--org--model/blobs')
  return existsSync(folder) ? readdirSync(folder).sort() : []
}
const servedOf = (name: string) => hub.asked.filter(({ server, path }) => server === 'store' && path === `/${name}`)

describe('a snapshot', () => {
  test('has the cache layout, one format of weights, a pinned commit, and is not fetched twice', async () => {
    const told: [number, number][] = []
    const got = await snapshotDownload(repo, { ...quick, onDownload: (done, total) => void told.push([done, total]) })
    expect(got).toEqual({ repo, commit: hub.commit, folder: join(cache, 'models--org--model/snapshots', hub.commit) })
    expect(readFileSync(join(cache, 'models--org--model/refs/main'), 'utf8')).toBe(hub.commit)
    for (const name of ['config.json', 'tokenizer.json', 'nested/extra file.txt', 'model.safetensors'] as const) {
      expect(readFileSync(join(got.folder, name)).equals(files()[name])).toBe(true)
      expect(realpathSync(join(got.folder, name))).toContain(join('models--org--model', 'blobs'))
    }
    expect(existsSync(join(got.folder, 'pytorch_model.bin'))).toBe(false)
    expect(existsSync(join(got.folder, 'consolidated.safetensors'))).toBe(false)
    expect(realpathSync(join(got.folder, 'model.safetensors')).endsWith(sha256(big))).toBe(true)
    expect(told.at(-1)?.[0]).toBe(told.at(-1)?.[1])
    expect(told.at(-1)?.[1]).toBe(big.length + 9 + 2 + 5)
    const before = { ...hub.sent }
    expect(await snapshotDownload(repo, quick)).toEqual(got)
    expect(hub.sent).toEqual(before)
    vi.stubEnv('HF_HUB_OFFLINE', '1')
    const calls = hub.asked.length
    expect(await snapshotDownload(repo)).toEqual(got)
    expect(await snapshotDownload(repo, { revision: hub.commit })).toEqual(got)
    expect(hub.asked.length).toBe(calls)
  })

  test('takes the shards that the index names', async () => {
    const map = { a: 'model-1.safetensors', b: 'sub.safetensors' }
    hub.files = {
      'config.json': Buffer.from('{}'),
      'model.safetensors.index.json': Buffer.from(JSON.stringify({ weight_map: map })),
      'model-1.safetensors': randomBytes(2000),
      'sub.safetensors': randomBytes(3000),
      'model.safetensors': randomBytes(4000),
    }
    const { folder } = await snapshotDownload(repo, quick)
    expect(readdirSync(folder).sort()).toEqual([
      'config.json',
      'model-1.safetensors',
      'model.safetensors.index.json',
      'sub.safetensors',
    ])
  })

  test('takes pickles only where there are no safetensors', async () => {
    const { 'model.safetensors': _, 'consolidated.safetensors': __, ...others } = files()
    hub.files = { ...others, 'model.gguf': randomBytes(2000) }
    const { folder } = await snapshotDownload(repo, quick)
    expect(readdirSync(folder).sort()).toEqual(['config.json', 'nested', 'pytorch_model.bin', 'tokenizer.json'])
  })

  test('of a tag is pinned, and patterns choose files', async () => {
    hub.refs['refs/pr/1'] = hub.commit
    const { folder, commit } = await snapshotDownload(repo, { ...quick, revision: 'refs/pr/1', allow: ['*.json'] })
    expect([commit, readdirSync(folder).sort()]).toEqual([hub.commit, ['config.json', 'tokenizer.json']])
    expect(readFileSync(join(cache, 'models--org--model/refs/refs/pr/1'), 'utf8')).toBe(hub.commit)
  })
})

describe('broken transfers', () => {
  test('cut at 30 % and 80 %: resumed by Range, the hash is right, less than 5 % is sent again', async () => {
    hub.faults['model.safetensors'] = { cutAt: [0.3, 0.8] }
    const { folder } = await snapshotDownload(repo, quick)
    expect(sha256(readFileSync(join(folder, 'model.safetensors')))).toBe(sha256(big))
    expect(servedOf('model.safetensors').map(({ headers }) => headers.range !== undefined)).toEqual([false, true, true])
    expect(hub.sent['model.safetensors']).toBeGreaterThanOrEqual(big.length)
    expect(hub.sent['model.safetensors']).toBeLessThan(1.05 * big.length)
  })

  test('a run that was stopped goes on where it was', async () => {
    const stop = new AbortController()
    const onDownload = (done: number) => done > 3e6 && stop.abort()
    const error = await errorOf(() => snapshotDownload(repo, { ...quick, signal: stop.signal, onDownload }))
    expect(error.code).toBe('ERR_ABORTED')
    expect(blobs()).toContain(`${sha256(big)}.incomplete`)
    const { folder } = await snapshotDownload(repo, quick)
    expect(sha256(readFileSync(join(folder, 'model.safetensors')))).toBe(sha256(big))
    expect(Number(/\d+/.exec(servedOf('model.safetensors').at(-1)?.headers.range ?? '')?.[0])).toBeGreaterThan(2.5e6)
  })

  test('one flipped byte: found, fetched again, and never kept when it stays', async () => {
    hub.faults['model.safetensors'] = { flips: 1 }
    const { folder } = await snapshotDownload(repo, quick)
    expect(sha256(readFileSync(join(folder, 'model.safetensors')))).toBe(sha256(big))
    expect(servedOf('model.safetensors').length).toBe(2)
    hub.faults['tokenizer.json'] = { flips: 9 }
    hub.files['tokenizer.json'] = Buffer.from('{"another": 1}')
    const error = await errorOf(() => snapshotDownload(repo, quick))
    expect(error.code).toBe('ERR_DOWNLOAD_HASH')
    expect(error.message).toContain('tokenizer.json')
    for (const name of blobs()) {
      const bytes = readFileSync(join(cache, 'models--org--model/blobs', name))
      expect(name).not.toContain('incomplete')
      expect(bytes.toString().includes('another')).toBe(false)
    }
  })

  test('a spoiled rest of an earlier run is thrown away', async () => {
    await snapshotDownload(repo, { ...quick, allow: ['config.json'] })
    const partial = join(cache, 'models--org--model/blobs', `${sha256(big)}.incomplete`)
    writeFileSync(partial, randomBytes(1 << 20, 99))
    const { folder } = await snapshotDownload(repo, quick)
    expect(sha256(readFileSync(join(folder, 'model.safetensors')))).toBe(sha256(big))
    expect(existsSync(partial)).toBe(false)
  })

  test('429 with Retry-After, 503 and a stall pass', async () => {
    hub.faults['info'] = { refusals: [{ status: 429, headers: { 'retry-after': '1' } }] }
    hub.faults['model.safetensors'] = { refusals: [{ status: 503 }, { status: 500 }], stalls: 1 }
    const started = performance.now()
    const { folder } = await snapshotDownload(repo, { backoffMs: 5, stallMs: 300 })
    expect(performance.now() - started).toBeGreaterThan(1000)
    expect(sha256(readFileSync(join(folder, 'model.safetensors')))).toBe(sha256(big))
    expect(hub.sent['model.safetensors']).toBeLessThan(1.05 * big.length)
  })

  test('a server without ranges is read from its start again', async () => {
    hub.faults['model.safetensors'] = { cutAt: [0.5], noRange: true }
    const { folder } = await snapshotDownload(repo, quick)
    expect(sha256(readFileSync(join(folder, 'model.safetensors')))).toBe(sha256(big))
  })
})

describe('servers that lie are refused in bounded time', () => {
  const short = { backoffMs: 5, stallMs: 200, attempts: 3 }
  const cases: [string, MockHub['faults'][string], string, RegExp][] = [
    ['no end', { refusals: Array.from({ length: 9 }, () => ({ status: 503 })) }, 'ERR_NETWORK', /503/],
    ['a day', { refusals: [{ status: 429, headers: { 'retry-after': '86400' } }] }, 'ERR_NETWORK', /86400 s/],
    ['stalls', { stalls: 99 }, 'ERR_NETWORK', /no answer/],
    ['bytes one by one', { trickleMs: 20 }, 'ERR_NETWORK', /no answer/],
    ['redirects', { loops: true }, 'ERR_HTTP', /redirects/],
    ['a longer body', { lie: (h) => ({ ...h, 'content-length': String(big.length + 9) }) }, 'ERR_HTTP', /Length/],
    ['a coding', { lie: (h) => ({ ...h, 'content-encoding': 'gzip' }) }, 'ERR_HTTP', /coding/],
    ['headers', { lie: (h) => ({ ...h, 'x-long': 'x'.repeat(40_000) }) }, 'ERR_HTTP', /headers/],
    [
      'another range',
      { cutAt: [0.5], lie: (h) => (h['content-range'] ? { ...h, 'content-range': 'bytes 0-1/2' } : h) },
      'ERR_HTTP',
      /Content-Range/,
    ],
  ]
  test.each(cases)('%s', async (_, fault, code, words) => {
    hub.faults['model.safetensors'] = fault
    const started = performance.now()
    const error = await errorOf(() => snapshotDownload(repo, short))
    expect(error.code).toBe(code)
    expect(error.message).toMatch(words)
    expect(performance.now() - started).toBeLessThan(5000)
    expect(blobs()).not.toContain(sha256(big))
  })

  test.each(['body', 'pages'] as const)(
    'a list of files whose %s has no end',
    async (endless) => {
      hub.endless = endless
      const before = process.memoryUsage().rss
      const error = await errorOf(() => snapshotDownload(repo, short))
      expect([error.code, error.message]).toEqual(['ERR_HTTP', expect.stringMatching(/at most/)])
      // 64 MiB of body and what the runtime holds of it twice.
      expect(process.memoryUsage().rss - before).toBeLessThan(256 << 20)
    },
    20_000,
  )

  test('a file that leads elsewhere, and a tree without hashes', async () => {
    hub.files['../evil'] = Buffer.from('x')
    expect((await errorOf(() => snapshotDownload(repo, short))).code).toBe('ERR_PATH_ESCAPE')
    hub.files = files()
    hub.commit = 'no-commit'
    expect((await errorOf(() => snapshotDownload(repo, short))).code).toBe('ERR_HTTP')
  })
})

describe('who may not', () => {
  test('is told the licence page of a gated model', async () => {
    hub.gated = 'yes'
    const anonymous = await errorOf(() => snapshotDownload(repo, quick))
    expect(anonymous).toMatchObject({ code: 'ERR_HUB_ACCESS', details: { licence: `${hub.endpoint}/org/model` } })
    expect(anonymous.message).toMatch(/401.*accept its licence at .*\/org\/model and set HF_TOKEN/)
    vi.stubEnv('HF_TOKEN', token)
    const known = await errorOf(() => snapshotDownload(repo, quick))
    expect(known.message).toMatch(/403.*accept its licence at .*\/org\/model with the account/)
    expect(inspect(known, { depth: 9 })).not.toContain(token)
  })

  test('is told that there is no such model or revision', async () => {
    const model = await errorOf(() => snapshotDownload('org/none', quick))
    expect([model.code, model.message]).toEqual(['ERR_HUB_NOT_FOUND', expect.stringContaining('org/none')])
    const revision = await errorOf(() => snapshotDownload(repo, { ...quick, revision: 'nope' }))
    expect([revision.code, revision.message]).toEqual(['ERR_HUB_NOT_FOUND', expect.stringContaining('"nope"')])
    for (const name of ['../x', 'a//b', 'a/../b', ''])
      expect((await errorOf(() => snapshotDownload(repo, { revision: name }))).code).toBe('ERR_USAGE')
  })

  test('is told when offline, and keeps what is there when the hub is away', async () => {
    vi.stubEnv('HF_HUB_OFFLINE', '1')
    const offline = await errorOf(() => snapshotDownload(repo))
    expect([offline.code, offline.message]).toEqual(['ERR_OFFLINE', expect.stringContaining('org/model')])
    vi.stubEnv('HF_HUB_OFFLINE', '')
    const got = await snapshotDownload(repo, quick)
    const warned = vi.spyOn(process, 'emitWarning').mockImplementation(() => {})
    hub.stop()
    expect(await snapshotDownload(repo, { backoffMs: 1, attempts: 2 })).toEqual(got)
    expect(String(warned.mock.calls[0]?.[0])).toContain('the cached org/model')
  })
})

describe('a token', () => {
  test('comes from HF_TOKEN, then the login file, and goes to the hub alone', async () => {
    const login = join(home, 'login-token')
    writeFileSync(login, `${token}\n`)
    vi.stubEnv('HF_TOKEN_PATH', login)
    await snapshotDownload(repo, quick)
    const from = (server: string) => hub.asked.filter((asked) => asked.server === server)
    expect(from('hub').length).toBeGreaterThan(3)
    for (const { headers } of from('hub')) expect(headers.authorization).toBe(`Bearer ${token}`)
    expect(from('store').length).toBeGreaterThan(0)
    for (const { headers } of from('store')) expect(headers.authorization).toBeUndefined()
    for (const { headers } of hub.asked) expect(headers.cookie).toBeUndefined()
  })
})

/** A script that fetches the model in a process of its own. */
function fetchScript(): string[] {
  const file = join(home, 'fetch.mts')
  writeFileSync(
    file,
    `import { snapshotDownload } from ${JSON.stringify(join(import.meta.dirname, '../../lib/io/hub/snapshot.ts'))}
const { folder } = await snapshotDownload('org/model', { backoffMs: 5 })
console.log(folder)`,
  )
  return ['--import', import.meta.resolve('tsx'), file]
}

test('two processes share a download', async () => {
  const run = () => promisify(execFile)(process.execPath, fetchScript())
  const [a, b] = await Promise.all([run(), run()])
  expect(a.stdout).toBe(b.stdout)
  expect(hub.sent['model.safetensors']).toBe(big.length)
  expect(sha256(readFileSync(join(a.stdout.trim(), 'model.safetensors')))).toBe(sha256(big))
})

test('what a killed process had is taken up, and its lock is free', async () => {
  hub.faults['model.safetensors'] = { stalls: 1 }
  const child = execFile(process.execPath, fetchScript(), () => {})
  const partial = join(cache, 'models--org--model/blobs', `${sha256(big)}.incomplete`)
  const size = () => (existsSync(partial) ? statSync(partial).size : 0)
  await vi.waitUntil(() => size() > big.length / 2 - (1 << 20) - 1, { timeout: 20_000 })
  child.kill('SIGKILL')
  await new Promise((done) => child.once('exit', done))
  const had = size()
  const { folder } = await snapshotDownload(repo, quick)
  expect(sha256(readFileSync(join(folder, 'model.safetensors')))).toBe(sha256(big))
  expect(servedOf('model.safetensors').at(-1)?.headers.range).toBe(`bytes=${had}-`)
})
