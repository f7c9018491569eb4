// A hub id where a folder may stand: the bridge, import, verify, generate and train take it, pinned to a commit that is recorded.
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { AutoBridge } from '../../lib/bridge/autoBridge.js'
import { verify } from '../../lib/bridge/proof/verify.js'
import { viaduct, viaductJson } from '../cli/commandLine.js'
import { writeLlama } from '../hostile/llamaFolder.js'
import { digestsOf, errorOf, filesOf, temporaryFolder } from '../hostile/temporary.js'
import { trainingFixture } from '../train/fixtureRun.js'
import { MockHub, token } from './mockHub.js'

const repo = 'org/model'
const home = temporaryFolder()
const local = writeLlama(join(home, 'local'), { shards: 2 })
let hub: MockHub
let cache: string
let count = 0

async function serve(folder: string): Promise<void> {
  hub = await MockHub.start(repo, Object.fromEntries(filesOf(folder)))
  hub.refs['v1'] = hub.commit
  cache = join(home, `cache-${count++}`)
  for (const [name, value] of Object.entries({
    ENDPOINT: hub.endpoint,
    HUB_CACHE: cache,
    HUB_OFFLINE: '',
    TOKEN: token,
  }))
    vi.stubEnv(`HF_${name}`, value)
}
beforeEach(() => serve(local))
afterEach(() => {
  hub.stop()
  vi.unstubAllEnvs()
})

test('the bridge opens a hub id, and a folder of the cache by its path', async () => {
  const told: number[] = []
  const bridge = await AutoBridge.fromHfPretrained(repo, { revision: 'v1', onProgress: (done) => void told.push(done) })
  expect(bridge.hf?.hub).toEqual({ repo, commit: hub.commit })
  expect(told.length).toBeGreaterThan(2)
  hub.stop()
  const folder = join(cache, 'models--org--model')
  for (const path of [folder, join(folder, 'snapshots', hub.commit)])
    expect((await AutoBridge.fromHfPretrained(path)).hf?.hub).toEqual({ repo, commit: hub.commit })
  expect((await errorOf(() => AutoBridge.fromHfPretrained(folder, { revision: 'v9' }))).code).toBe('ERR_HUB_NOT_FOUND')
  vi.stubEnv('HF_HUB_OFFLINE', '1')
  expect((await AutoBridge.open(repo, { revision: 'v1' })).hf?.hub?.commit).toBe(hub.commit)
  const stopped = await errorOf(() => AutoBridge.fromHfPretrained('org/other', { signal: AbortSignal.abort() }))
  expect(stopped.code).toBe('ERR_OFFLINE')
})

test('import, export and verify of a hub id equal those of a folder; the commit is recorded, the token is nowhere', async () => {
  const checkpoint = join(home, 'ckpt')
  await AutoBridge.importCkpt(repo, checkpoint)
  const record = JSON.parse(readFileSync(join(checkpoint, 'iter_0000000/conversion.json'), 'utf8'))
  expect(record.hub).toEqual({ repo, commit: hub.commit })
  await AutoBridge.exportCkpt(checkpoint, join(home, 'out'))
  expect(digestsOf(join(home, 'out'))).toEqual(digestsOf(local))
  expect(await verify(repo)).toMatchObject({ ok: true, hub: { repo, commit: hub.commit } })
  expect(hub.asked.some(({ headers }) => headers.authorization === `Bearer ${token}`)).toBe(true)
  for (const folder of [checkpoint, cache])
    for (const [name, bytes] of filesOfLinks(folder)) expect([name, bytes.includes(token)]).toEqual([name, false])
})

test('the command line imports on two ranks at one commit, and tells refusals without the token', async () => {
  const made = await viaduct(home, 'import', repo, 'cli-ckpt', '--revision', 'v1', '--tp', '2', '--json')
  expect(made.code, made.stderr).toBe(0)
  const record = JSON.parse(readFileSync(join(home, 'cli-ckpt/iter_0000000/conversion.json'), 'utf8'))
  expect(record.hub).toEqual({ repo, commit: hub.commit })
  const proof = await viaductJson<{ ok: boolean; hub: unknown }>(home, [
    'verify',
    repo,
    '--ckpt',
    'cli-ckpt',
    '--no-logits',
  ])
  expect(proof).toMatchObject({ ok: true, hub: { commit: hub.commit } })
  const wrong = await viaduct(home, 'import', repo, 'cli-none', '--revision', 'v9')
  expect([wrong.code, wrong.stderr]).toEqual([3, expect.stringMatching(/ERR_HUB_NOT_FOUND.*"v9"/)])
  hub.gated = 'yes'
  vi.stubEnv('HF_HUB_CACHE', join(home, 'empty-cache'))
  const gated = await viaduct(home, 'generate', repo, '--prompt', 'x')
  expect(gated.code).toBe(3)
  expect(gated.stderr).toContain(`accept its licence at ${hub.endpoint}/${repo}`)
  for (const { stdout, stderr } of [made, wrong, gated]) expect(stdout + stderr).not.toContain(token)
  expect(existsSync(join(home, 'cli-none'))).toBe(false)
}, 120_000)

test('train takes model and tokenizer from a hub id', async () => {
  hub.stop()
  await serve(trainingFixture)
  const told = await viaduct(home, 'train', '--hf', repo, '--revision', 'v1', '--dry-run', 'train.train_iters=1')
  expect(told.code, told.stderr).toBe(0)
  expect(told.stdout).toContain(join('models--org--model', 'snapshots', hub.commit))
})

/** As filesOf, through the cache's links. */
function filesOfLinks(folder: string): [string, Buffer][] {
  return readdirSync(folder, { withFileTypes: true, recursive: true })
    .map((entry) => join(entry.parentPath, entry.name))
    .flatMap((path) => {
      try {
        return [[path, readFileSync(path)] as [string, Buffer]]
      } catch {
        return []
      }
    })
}
