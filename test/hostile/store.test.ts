// The rendezvous store against peers that break its format: they are dropped, memory stays bounded, honest clients do not notice.
import { connect, type Socket } from 'node:net'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { native } from '../../lib/addon/load.js'

let server: { readonly id: number; readonly port: number }
let client: number

beforeAll(async () => {
  server = native.storeServer('127.0.0.1', 0, 'job-1')
  client = await native.storeClient('viaduct', '127.0.0.1', server.port, 'job-1', 5000)
})
afterAll(() => {
  native.storeClose(client)
  native.storeServerClose(server.id)
})

const u32 = (n: number) => {
  const out = Buffer.alloc(4)
  out.writeUInt32LE(n >>> 0)
  return out
}
const u64 = (n: bigint) => {
  const out = Buffer.alloc(8)
  out.writeBigUInt64LE(n)
  return out
}
const hello = Buffer.concat([Buffer.from('VIADUCT1'), u32(5), Buffer.from('job-1')])
const frame = (op: number, key: string, rest = Buffer.alloc(0), keyBytes = key.length) => {
  const body = Buffer.concat([Buffer.from([op]), u32(keyBytes), Buffer.from(key), rest])
  return Buffer.concat([u32(body.length), body])
}

/** Sends bytes and gives what came back until the server closed, or after `ms`. */
function talk(bytes: Buffer, ms = 3000): Promise<{ closed: boolean; answer: Buffer }> {
  return new Promise((resolve) => {
    const socket: Socket = connect(server.port, '127.0.0.1', () => socket.write(bytes))
    const parts: Buffer[] = []
    const end = (closed: boolean) => {
      clearTimeout(timer)
      socket.destroy()
      resolve({ closed, answer: Buffer.concat(parts) })
    }
    const timer = setTimeout(() => end(false), ms)
    socket.on('data', (chunk: Buffer) => parts.push(chunk))
    socket.on('close', () => end(true))
    socket.on('error', () => {})
  })
}

async function stillServes(): Promise<void> {
  const key = `alive-${Math.random()}`
  await native.storeSet(client, key, Buffer.from('yes'))
  expect(Buffer.from(await native.storeGet(client, key, 1000)).toString()).toBe('yes')
}

describe('a peer is dropped for', () => {
  it.each([
    ['another protocol', Buffer.from('GET / HTTP/1.1\r\n\r\n')],
    ['a job id without bound', Buffer.concat([Buffer.from('VIADUCT1'), u32(0xffffffff)])],
    ['a frame without bound', Buffer.concat([hello, u32(0xffffffff)])],
    ['a frame of 17 MiB', Buffer.concat([hello, u32(17 << 20)])],
    ['an empty frame', Buffer.concat([hello, u32(0)])],
    ['a frame without a key', Buffer.concat([hello, u32(1), Buffer.from([1])])],
    ['a key that leaves its frame', Buffer.concat([hello, frame(1, 'key', Buffer.alloc(0), 4000)])],
    ['a key without bound', Buffer.concat([hello, frame(1, 'k'.repeat(5000))])],
    ['an unknown operation', Buffer.concat([hello, frame(9, 'key')])],
    ['a get without a time', Buffer.concat([hello, frame(2, 'key', Buffer.alloc(3))])],
    ['a sum of half a number', Buffer.concat([hello, frame(3, 'key', Buffer.alloc(4))])],
    ['a beat without a time', Buffer.concat([hello, frame(5, 'member')])],
    ['a beat of nobody', Buffer.concat([hello, frame(5, '', Buffer.alloc(4))])],
    ['a beat with a name without bound', Buffer.concat([hello, frame(5, 'm'.repeat(300), Buffer.alloc(4))])],
    ['a farewell that says more', Buffer.concat([hello, frame(6, 'member', Buffer.alloc(4))])],
  ])('%s', async (_name, bytes) => {
    expect((await talk(bytes)).closed).toBe(true)
    await stillServes()
  })

  it('another job', async () => {
    const { closed, answer } = await talk(Buffer.concat([Buffer.from('VIADUCT1'), u32(5), Buffer.from('job-2')]))
    expect({ closed, answer: [...answer] }).toEqual({ closed: true, answer: [1] })
    await expect(native.storeClient('viaduct', '127.0.0.1', server.port, 'job-2', 2000)).rejects.toMatchObject({
      code: 'ERR_COMM',
      message: expect.stringContaining("another job's"),
    })
  })
})

describe('the store', () => {
  it('takes frames byte by byte and several at once', async () => {
    const set = Buffer.concat([hello, frame(1, 'slow', Buffer.from('v')), frame(4, 'slow'), frame(4, 'absent')])
    const socket = connect(server.port, '127.0.0.1')
    const got: Buffer[] = []
    socket.on('data', (chunk: Buffer) => got.push(chunk))
    for (const byte of set) {
      socket.write(Buffer.from([byte]))
      await new Promise((resolve) => setImmediate(resolve))
    }
    const expected = Buffer.concat([
      Buffer.from([0]),
      u32(1),
      Buffer.from([0]),
      u32(1),
      Buffer.from([0]),
      u32(1),
      Buffer.from([1]),
    ])
    for (let i = 0; i < 200 && Buffer.concat(got).length < expected.length; i++)
      await new Promise((r) => setTimeout(r, 10))
    socket.destroy()
    expect(Buffer.concat(got)).toEqual(expected)
  })

  it('survives random bytes of 300 peers', async () => {
    let state = 12345
    const random = () => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0
      return state >>> 16
    }
    const peers = Array.from({ length: 300 }, (_, i) => {
      const bytes = Buffer.from(Array.from({ length: 1 + (random() % 200) }, () => random() & 255))
      // Every other one knows the hello and begins a plausible frame.
      const begin =
        i % 2 === 0 ? Buffer.concat([hello, u32(bytes.length), Buffer.from([1 + (i % 6)])]) : Buffer.alloc(0)
      return talk(Buffer.concat([begin, bytes]), 300)
    })
    await Promise.all(peers)
    await stillServes()
  })

  it('drops a waiting get with its connection and keeps the others waiting', async () => {
    const waiting = native.storeGet(client, 'comes-later', 10_000)
    expect((await talk(Buffer.concat([hello, frame(2, 'comes-later', u64(60_000n))]), 200)).closed).toBe(false)
    await native.storeSet(client, 'comes-later', Buffer.from([7]))
    expect([...(await waiting)]).toEqual([7])
    await stillServes()
  })

  it('counts from several clients, refuses to count in a text, bounds values', async () => {
    const sums = await Promise.all(Array.from({ length: 20 }, () => native.storeAdd(client, 'counter', 2)))
    expect([...sums].sort((a, b) => a - b)).toEqual(Array.from({ length: 20 }, (_, i) => 2 * (i + 1)))
    expect(await native.storeAdd(client, 'counter', -40)).toBe(0)
    await native.storeSet(client, 'text', Buffer.from('abc'))
    await expect(native.storeAdd(client, 'text', 1)).rejects.toMatchObject({ code: 'ERR_COMM' })
    await expect(native.storeSet(client, 'big', new Uint8Array((16 << 20) + 1))).rejects.toMatchObject({
      code: 'ERR_COMM',
    })
    const most = new Uint8Array(16 << 20).fill(3)
    await native.storeSet(client, 'big', most)
    expect(Buffer.compare(await native.storeGet(client, 'big', 1000), most)).toBe(0)
    await native.storeSet(client, 'big', new Uint8Array(0))
    expect((await native.storeGet(client, 'big', 1000)).length).toBe(0)
  })

  it('names the key that is missing at the timeout', async () => {
    const begin = Date.now()
    await expect(native.storeGet(client, 'never/set', 150)).rejects.toMatchObject({
      code: 'ERR_TIMEOUT',
      message: expect.stringContaining('the key never/set within 150 ms'),
    })
    expect(Date.now() - begin).toBeLessThan(3000)
  })

  it('rejects what waits when the client closes or the server goes', async () => {
    const own = native.storeServer('127.0.0.1', 0, 'short')
    const [a, b] = await Promise.all(
      [1, 2].map(() => native.storeClient('viaduct', '127.0.0.1', own.port, 'short', 5000)),
    )
    const closed = native.storeGet(a as number, 'x', 20_000)
    const gone = native.storeGet(b as number, 'x', 20_000)
    native.storeClose(a as number)
    await expect(closed).rejects.toMatchObject({ code: expect.stringMatching(/ERR_COMM|ERR_ABORTED/) })
    native.storeServerClose(own.id)
    await expect(gone).rejects.toMatchObject({ code: 'ERR_COMM', message: expect.stringContaining('still runs') })
    native.storeClose(b as number)
    await expect(native.storeClient('viaduct', '127.0.0.1', own.port, 'short', 200)).rejects.toMatchObject({
      code: 'ERR_TIMEOUT',
    })
  })

  it('says which port is taken', () => {
    expect(() => native.storeServer('127.0.0.1', server.port, 'x')).toThrow(
      /port \d+ of 127\.0\.0\.1.*choose another port/,
    )
  })
})
