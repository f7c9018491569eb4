// Members of a store that show that they live: a busy one is no silent one, a stopped or killed one is, whoever keeps the store.
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, describe, expect, it } from 'vitest'
import type { PresenceState } from '../../lib/addon/functions.js'
import { native } from '../../lib/addon/load.js'
import { type Launched, startCommand } from './launched.js'

const member = join(import.meta.dirname, 'presenceMember.ts')
const children: Launched[] = []
const run = (...args: string[]) => {
  children.push(startCommand(process.execPath, ['--import', 'tsx', member, ...args], process.env))
  return children.at(-1) as Launched
}
afterAll(() => {
  for (const { child } of children) child.kill('SIGKILL')
})

/** Looks until what is known satisfies; gives it, and how long that took. */
async function until(
  id: number,
  good: (state: PresenceState) => boolean,
): Promise<{ state: PresenceState; ms: number }> {
  const begin = performance.now()
  for (;;) {
    const state = native.presence(id)
    const ms = performance.now() - begin
    if (good(state)) return { state, ms }
    if (ms > 10_000) throw new Error(`never came: ${JSON.stringify(state)}`)
    await sleep(20)
  }
}

describe.concurrent('a member of a store', () => {
  it('lives while its JavaScript is busy, is silent while it is stopped, gone when it is killed', async () => {
    const server = native.storeServer('127.0.0.1', 0, 'job')
    const watcher = native.startPresence('127.0.0.1', server.port, 'job', 'watcher', 250, 1000)
    const busy = run('busy', String(server.port))
    await busy.until(/ready/)
    for (const end = Date.now() + 3000; Date.now() < end; await sleep(50)) {
      const { unansweredMs, silent } = native.presence(watcher)
      expect(silent).toEqual([])
      expect(unansweredMs).toBeLessThan(1000)
    }
    busy.child.kill('SIGSTOP')
    const stopped = await until(watcher, ({ silent }) => silent.length > 0)
    expect(stopped.state.silent).toMatchObject([{ member: 'busy', gone: false }])
    expect(stopped.state.silent[0]?.ms).toBeGreaterThanOrEqual(1000)
    expect(stopped.ms).toBeGreaterThan(500)
    expect(stopped.ms).toBeLessThan(2500)
    busy.child.kill('SIGCONT')
    expect((await until(watcher, ({ silent }) => silent.length === 0)).ms).toBeLessThan(2000)
    busy.child.kill('SIGKILL')
    const killed = await until(watcher, ({ silent }) => silent.length > 0)
    expect(killed.state.silent).toMatchObject([{ member: 'busy', gone: true }])
    expect(killed.ms).toBeLessThan(1000)
    await native.stopPresence(watcher, true)
    native.storeServerClose(server.id)
  }, 30_000)

  it('that takes its leave is missed by nobody', async () => {
    const server = native.storeServer('127.0.0.1', 0, 'job')
    const [stays, leaves, breaksOff] = ['a', 'b', 'c'].map((name) =>
      native.startPresence('127.0.0.1', server.port, 'job', name, 100, 60_000),
    ) as [number, number, number]
    await sleep(500)
    await native.stopPresence(leaves, true)
    await native.stopPresence(breaksOff, false)
    const { state } = await until(stays, ({ silent }) => silent.length > 0)
    expect(state.silent).toMatchObject([{ member: 'c', gone: true }])
    expect(() => native.presence(leaves)).toThrow(expect.objectContaining({ code: 'ERR_HANDLE' }))
    await native.stopPresence(stays, true)
    native.storeServerClose(server.id)
  }, 30_000)

  it('notices that the store is stopped; when it goes on nobody has been silent meanwhile', async () => {
    const keeper = run('server')
    const port = Number((await keeper.until(/port=(\d+) /))[1])
    const ids = ['a', 'b'].map((name) => native.startPresence('127.0.0.1', port, 'job', name, 250, 1000))
    await sleep(1000)
    keeper.child.kill('SIGSTOP')
    for (const id of ids) await until(id, ({ unansweredMs }) => unansweredMs >= 3000)
    keeper.child.kill('SIGCONT')
    for (const id of ids) {
      const { state, ms } = await until(id, ({ unansweredMs }) => unansweredMs === 0)
      expect(ms).toBeLessThan(2000)
      expect(state.silent).toEqual([])
    }
    // A connection that was given up meanwhile is not its member's end.
    await sleep(1500)
    expect(native.presence(ids[0] as number)).toEqual({ unansweredMs: 0, silent: [] })
    keeper.child.kill('SIGKILL')
    await until(ids[1] as number, ({ unansweredMs }) => unansweredMs >= 1000)
    for (const id of ids) await native.stopPresence(id, true)
  }, 30_000)
})
