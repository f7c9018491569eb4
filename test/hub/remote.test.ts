// A model's folder on a web server: converted by ranges, what is held on disk is bounded, servers that lie or change are refused.
import { mkdirSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { placeOf } from '../../lib/bridge/hfModel.js'
import { verify } from '../../lib/bridge/proof/verify.js'
import { copyRegion, createFile } from '../../lib/io/blocks.js'
import { cutRegions, rangeOf, readHere } from '../../lib/io/hub/remoteBytes.js'
import { openRemoteFolder } from '../../lib/io/hub/remoteFolder.js'
import { openWeights } from '../../lib/io/weightFolder.js'
import { identityRegion, volume } from '../../lib/tensor/region.js'
import { viaduct, viaductJson } from '../cli/commandLine.js'
import { randomBytes, writeLlama } from '../hostile/llamaFolder.js'
import { digestsOf, errorOf, filesOf, temporaryFolder } from '../hostile/temporary.js'
import { MockHub, token } from './mockHub.js'

const home = temporaryFolder()
// Two shards, a copy of a tied tensor.
const local = writeLlama(join(home, 'local'), {
  shards: 2,
  tied: true,
  hidden: 64,
  vocab: 1000,
  change: { 'lm_head.weight': { name: 'lm_head.weight', dtype: 'bfloat16', shape: [1000, 64] } },
  bytes: { 'model.embed_tokens.weight': randomBytes(128_000), 'lm_head.weight': randomBytes(128_000) },
})
const quick = { backoffMs: 5, stallMs: 300, attempts: 3 }
let server: MockHub
let address: string

beforeEach(async () => {
  server = await MockHub.start('org/model', Object.fromEntries(filesOf(local)))
  address = `${server.store}/`
  vi.stubEnv('HF_TOKEN', token)
})
afterEach(() => {
  server.stop()
  vi.unstubAllEnvs()
})

/** Bytes on disk below a folder. */
const held = (folder: string) =>
  readdirSync(folder).reduce((sum, name) => sum + statSync(join(folder, name)).blocks * 512, 0)

test('import and verify equal those of a copy here; each tensor byte is sent once; no token goes out', async () => {
  for (const [from, to] of [
    [address, 'remote'],
    [local, 'copy'],
  ] as const)
    await AutoBridge.importCkpt(from, join(home, to))
  const pieces = (name: string) =>
    digestsOf(join(home, name, 'iter_0000000')).filter((line) => /^(model-|index\.json|hf_)/.test(line))
  expect(pieces('remote')).toEqual(pieces('copy'))
  const record = JSON.parse(readFileSync(join(home, 'remote/iter_0000000/conversion.json'), 'utf8'))
  expect(record).toMatchObject({ hub: null, address })
  const size = Object.entries(server.files).reduce(
    (n, [name, b]) => n + (name.endsWith('.safetensors') ? b.length : 0),
    0,
  )
  const sent = Object.entries(server.sent).reduce((n, [name, b]) => n + (name.endsWith('.safetensors') ? b : 0), 0)
  // Twice the copy that is compared with its original, and the 64 KiB in which each header is looked for.
  expect(sent).toBeLessThan(1.02 * size + 2 * 128_000 + 2 * (64 << 10))
  expect(server.asked.every(({ headers }) => headers.authorization === undefined)).toBe(true)
  expect(await verify(address, { tensorModelParallelSize: 2 })).toMatchObject({ ok: true, differingBytes: 0, address })
})

test('the model loads from a server', async () => {
  const bridge = await AutoBridge.fromHfPretrained(address)
  const model = await bridge.toMegatronModel({ wrapWithDdp: false })
  await bridge.saveHfPretrained(model, join(home, 'saved'))
  await model.dispose()
  const names = readdirSync(join(home, 'saved')).filter((name) => name.endsWith('.safetensors'))
  expect(names.length).toBe(2)
  for (const name of names)
    expect(readFileSync(join(home, 'saved', name)).equals(readFileSync(join(local, name)))).toBe(true)
})

test('what is held on disk is bounded, also of a tensor that is larger, whole or by columns', async () => {
  const limit = 32 << 10
  const folder = await openRemoteFolder(address, { spoolBytes: limit })
  const spool = join(folder.folder, '../spool')
  const here = await openWeights(local)
  mkdirSync(join(home, 'target'))
  let most = 0
  for (const [name, source] of folder.tensors) {
    const place = placeOf(source)
    const columns = place.shape.length === 2 ? 8 : 0
    const shape = columns === 0 ? place.shape : [place.shape[0] as number, columns]
    const region = columns === 0 ? identityRegion(shape) : { from: [0, 4], to: [0, 0], size: shape }
    const outputs = [join(home, 'target', `a-${name}`), join(home, 'target', `b-${name}`)] as const
    for (const output of outputs) await createFile(output, volume(shape) * 2, new Uint8Array(0))
    const target = (path: string) => ({ path, offset: 0, dtype: place.dtype, shape })
    await readHere(folder.remote, place, [region], async (from, part) => {
      most = Math.max(most, held(spool))
      await copyRegion(from, target(outputs[0]), part)
    })
    await copyRegion(placeOf(here.tensors.get(name) as typeof source), target(outputs[1]), region)
    expect([name, readFileSync(outputs[0]).equals(readFileSync(outputs[1]))]).toEqual([name, true])
  }
  // A range may begin and end inside of a disk block; at most two leases are held.
  expect(most).toBeGreaterThan(limit / 4)
  expect(most).toBeLessThanOrEqual(limit + 4 * 4096)
  expect(held(spool)).toBe(0)
})

test('cut regions tile the region that they come from', () => {
  const place = { path: 'x', offset: 100, dtype: 'float32' as const, shape: [3, 50, 7] }
  const region = { from: [1, 5, 2], to: [0, 0, 1], size: [2, 40, 4] }
  const parts = cutRegions(place, [region], 256)
  expect(parts.reduce((sum, { size }) => sum + volume(size), 0)).toBe(volume(region.size))
  const elements = new Set<string>()
  for (const part of parts) {
    const { begin, end } = rangeOf(place, part)
    expect(end - begin).toBeLessThanOrEqual(256)
    for (let i = 0; i < volume(part.size); i++) {
      const [b, c] = [part.size[1] as number, part.size[2] as number]
      const at = [Math.floor(i / (b * c)), Math.floor(i / c) % b, i % c]
      elements.add(at.map((n, d) => n + (part.from[d] as number)).join())
      for (let d = 0; d < 3; d++)
        expect((part.to[d] as number) - (part.from[d] as number)).toBe(
          (region.to[d] as number) - (region.from[d] as number),
        )
    }
  }
  expect(elements.size).toBe(volume(region.size))
})

test('the command line converts an address on two ranks and leaves nothing behind', async () => {
  const temporary = join(home, 'tmp')
  mkdirSync(temporary)
  vi.stubEnv('TMPDIR', temporary)
  const made = await viaduct(home, 'import', address, 'cli', '--tp', '2')
  expect(made.code, made.stderr).toBe(0)
  await viaductJson(home, ['verify', address, '--ckpt', 'cli'])
  expect(readdirSync(temporary).filter((name) => name.includes('viaduct-http'))).toEqual([])
  expect((await viaduct(home, 'train', '--hf', address)).code).toBe(2)
}, 120_000)

describe('cut and stalled connections', () => {
  test('are taken up where they stopped', async () => {
    const file = Object.keys(server.files).find((name) => name.endsWith('2-of-00002.safetensors')) as string
    const folder = await openRemoteFolder(address, quick)
    const [, source] = [...folder.tensors].find(([, { file: home }]) => home === file) as [string, never]
    const place = placeOf(source)
    server.faults[file] = { cutAt: [(place.offset + 40) / (server.files[file] as Buffer).length], stalls: 1 }
    const range = rangeOf(place, identityRegion(place.shape))
    const lease = await folder.remote?.lease([range])
    const bytes = readFileSync(lease?.local(place).path as string).subarray(range.begin)
    expect(bytes.equals((server.files[file] as Buffer).subarray(range.begin, range.end))).toBe(true)
    await lease?.release()
  })
})

describe('refused in bounded time and memory', () => {
  const name = 'model-00001-of-00002.safetensors'
  const opens: [string, MockHub['faults'][string], string, RegExp][] = [
    ['no ranges', { noRange: true }, 'ERR_HTTP', /ranges/],
    ['a stall', { stalls: 99 }, 'ERR_NETWORK', /no answer/],
    ['bytes one by one', { trickleMs: 20 }, 'ERR_NETWORK', /no answer/],
    ['a size of nothing', { lie: (h) => ({ ...h, 'content-range': 'bytes 0-65535/*' }) }, 'ERR_HTTP', /Content-Range/],
    ['a smaller size', { lie: (h) => ({ ...h, 'content-range': 'bytes 0-99/100' }) }, 'ERR_HTTP', /at most 100|more/],
    ['headers', { lie: (h) => ({ ...h, 'x-long': 'x'.repeat(40_000) }) }, 'ERR_HTTP', /headers/],
    ['a refusal', { refusals: [{ status: 403 }] }, 'ERR_HTTP', /403/],
  ]
  test.each(opens)('%s when it is opened', async (_, fault, code, words) => {
    server.faults[name] = fault
    const started = performance.now()
    const error = await errorOf(() => openRemoteFolder(address, quick))
    expect([error.code, error.message]).toEqual([code, expect.stringMatching(words)])
    expect(performance.now() - started).toBeLessThan(5000)
  })

  test('a header of 2^40 bytes, a shard that is not there, a shard elsewhere', async () => {
    const bytes = Buffer.from(server.files[name] as Buffer)
    bytes.writeBigUInt64LE(2n ** 40n)
    server.files[name] = bytes
    expect((await errorOf(() => openRemoteFolder(address, quick))).code).toBe('ERR_SAFETENSORS_HEADER')
    delete server.files[name]
    expect((await errorOf(() => openRemoteFolder(address, quick))).code).toBe('ERR_FILE_MISSING')
    server.files['model.safetensors.index.json'] = Buffer.from('{"weight_map": {"a": "../evil.safetensors"}}')
    expect((await errorOf(() => openRemoteFolder(address, quick))).code).toBe('ERR_PATH_ESCAPE')
  })

  test('a file that changes after it was opened, in its ETag or its size, and a range that was not asked for', async () => {
    const folder = await openRemoteFolder(address, quick)
    const source = folder.tensors.get('model.embed_tokens.weight')
    if (!source) throw new Error('expected the embedding')
    const range = rangeOf(placeOf(source), identityRegion(source.entry.shape))
    const read = () => errorOf(() => folder.remote?.lease([range]))
    const whole = server.files[name] as Buffer
    const changed = Buffer.from(whole)
    changed[whole.length - 1] = (changed[whole.length - 1] as number) ^ 1
    server.files[name] = changed
    expect((await read()).message).toMatch(/another version/)
    server.files[name] = whole
    for (const [lie, words] of [
      [(h) => ({ ...h, 'content-range': `${h['content-range']}0` }), /another version/],
      [(h) => ({ ...h, 'content-range': `bytes 0-1/${whole.length}` }), /Content-Range/],
      [(h) => ({ ...h, 'content-length': '7', connection: 'close' }), /Content-Length/],
    ] as [NonNullable<MockHub['faults'][string]['lie']>, RegExp][]) {
      server.faults[name] = { lie }
      const error = await read()
      expect([error.code, error.message]).toEqual(['ERR_HTTP', expect.stringMatching(words)])
    }
    server.faults[name] = {}
    await (await folder.remote?.lease([range]))?.release()
  })

  test('addresses that are no folder', async () => {
    for (const wrong of ['http://user:secret@127.0.0.1/x', `${address}?a=b`, `${address}#c`])
      expect((await errorOf(() => openRemoteFolder(wrong, quick))).code).toBe('ERR_USAGE')
    const none = await errorOf(() => openRemoteFolder(`${server.store}/nowhere`, quick))
    expect([none.code, none.message]).toEqual(['ERR_FILE_MISSING', expect.stringContaining('config.json')])
  })
})
