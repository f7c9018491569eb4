// The addon in whole processes and threads: it ends when nothing is pending, waits while something is, survives worker_threads
// and an exit in the middle of work.
import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'
import { addonCandidates } from '../../../lib/addon/load.js'

const run = promisify(execFile)
const file = addonCandidates().find((candidate) => existsSync(candidate)) as string
const prelude = `const addon = require(${JSON.stringify(file)}); const device = addon.openDevice('cpu'); const stream = addon.createStream(device);`

const node = (script: string) => run(process.execPath, ['-e', prelude + script], { timeout: 20_000 })

test('a process with nothing pending ends by itself', async () => {
  const { stdout } = await node(
    `const x = addon.empty(stream, [1000], 0); addon.fill(stream, x, 1); console.log('end')`,
  )
  expect(stdout).toBe('end\n')
})

test('a pending promise keeps the process until it settles', async () => {
  const { stdout } = await node(
    `addon.debugDelay(stream, 100000); addon.syncStream(stream).then(() => console.log('settled'))`,
  )
  expect(stdout).toBe('settled\n')
})

test('an error without a factory is an Error with a code', async () => {
  const { stdout } = await node(`try { addon.free(77) } catch (e) { console.log(e instanceof Error, e.code) }`)
  expect(stdout).toBe('true ERR_HANDLE\n')
})

test('process.exit in the middle of work ends cleanly and soon', async () => {
  const start = performance.now()
  const { stdout } = await node(
    `const x = addon.empty(stream, [512, 512], 0), y = addon.empty(stream, [512, 512], 0);
     for (let i = 0; i < 3000; i++) addon.matmul(stream, y, x, x, 0, false, false, false);
     addon.syncStream(stream).catch(() => {}); console.log('leaving'); process.exit(0)`,
  )
  expect(stdout).toBe('leaving\n')
  expect(performance.now() - start).toBeLessThan(15_000)
})

test('worker threads have slots and streams of their own, and end with work pending', async () => {
  const { stdout } = await node(`
    const { Worker } = require('node:worker_threads');
    const code = ${JSON.stringify(prelude)} + \`
      const { parentPort } = require('node:worker_threads');
      const x = addon.empty(stream, [2], 0);
      addon.upload(stream, x, new Float32Array([1, 2]));
      addon.add(stream, x, x, x);
      addon.download(stream, x).then((b) => {
        parentPort.postMessage([...new Float32Array(b), addon.liveSlots()]);
        addon.debugDelay(stream, 50000);
        addon.syncStream(stream).catch(() => {});
        process.exit(0);
      });\`;
    const all = Array.from({ length: 3 }, () => new Promise((resolve, reject) => {
      const worker = new Worker(code, { eval: true });
      let got;
      worker.on('message', (m) => { got = m });
      worker.on('error', reject);
      worker.on('exit', () => resolve(got));
    }));
    Promise.all(all).then((r) => console.log(JSON.stringify(r), addon.liveSlots(), addon.memoryStats(device).liveBytes));
  `)
  expect(stdout).toBe('[[2,4,1],[2,4,1],[2,4,1]] 0 0\n')
})
