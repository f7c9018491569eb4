// The hub's cache and Python's package: it finds what we have fetched, and we find what it has fetched.
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterEach, expect, test, vi } from 'vitest'
import { snapshotDownload } from '../../lib/io/hub/snapshot.js'
import { writeLlama } from '../hostile/llamaFolder.js'
import { filesOf, temporaryFolder } from '../hostile/temporary.js'
import { MockHub } from '../hub/mockHub.js'
import { python, runPython } from './python.js'

const home = temporaryFolder()
const repo = 'org/model'
afterEach(() => {
  vi.unstubAllEnvs()
})

test.skipIf(python === null)('Python finds what we have fetched, and we what Python has', async () => {
  const hub = await MockHub.start(repo, Object.fromEntries(filesOf(writeLlama(join(home, 'model'), { shards: 2 }))))
  hub.refs['v1'] = hub.commit
  const [ours, theirs] = [join(home, 'ours'), join(home, 'theirs')] as const
  for (const [name, value] of Object.entries({ ENDPOINT: hub.endpoint, HUB_CACHE: ours, HUB_OFFLINE: '', HOME: home }))
    vi.stubEnv(`HF_${name}`, value)
  const { folder } = await snapshotDownload(repo, { revision: 'v1' })
  const found = JSON.parse(runPython('hubCache.py', ours, repo, 'v1'))
  expect(found).toMatchObject({ folder, config: join(folder, 'config.json'), warnings: [], incomplete: 0 })
  expect(found.repos).toMatchObject([{ repo, revisions: [{ commit: hub.commit, refs: ['v1'] }] }])
  expect(found.names).toEqual(Object.keys(hub.files).sort())

  // Asynchronously: the hub answers from this process.
  await promisify(execFile)(python as string, [join(import.meta.dirname, 'hubFetch.py'), theirs, repo, 'main'])
  vi.stubEnv('HF_HUB_CACHE', theirs)
  const sent = { ...hub.sent }
  const again = await snapshotDownload(repo)
  expect(again.folder).toBe(join(theirs, 'models--org--model/snapshots', hub.commit))
  expect(hub.sent).toEqual(sent)
  hub.stop()
  vi.stubEnv('HF_HUB_OFFLINE', '1')
  expect(await snapshotDownload(repo)).toEqual(again)
})
