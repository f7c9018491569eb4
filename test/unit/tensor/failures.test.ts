// Failures on the device as tensors and streams show them, and the leak detector.
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterEach, expect, test } from 'vitest'
import { native } from '../../../lib/addon/load.js'
import { packageRoot } from '../../../lib/base/packageRoot.js'
import { Ctx, Tensor } from '../../../lib/tensor/index.js'

const ctx = Ctx.create({ device: 'cpu' })

afterEach(() => {
  ctx.stream.reset()
  ctx.device.setMemoryLimit(0)
})

test('every await on a poisoned stream rejects with the op and the place', async () => {
  const x = Tensor.zeros(ctx, [2], 'float32')
  ctx.stream.setPlace('decoder.layers.1, step 3, rank 0')
  native.debugFail(ctx.stream.id, 'a kernel failed')
  ctx.stream.setPlace('')
  const expected = {
    name: 'ViaductError',
    code: 'ERR_NATIVE',
    message: '[debugFail] a kernel failed (in decoder.layers.1, step 3, rank 0)',
  }
  await expect(x.toFloat32Array()).rejects.toMatchObject(expected)
  await expect(x.bytes()).rejects.toMatchObject(expected)
  await expect(ctx.stream.sync()).rejects.toMatchObject(expected)
  expect(() => ctx.stream.check()).toThrow(expected.message)
  ctx.stream.reset()
  expect(await x.toFloat32Array()).toEqual(new Float32Array(2))
  x.dispose()
})

test('out of memory is thrown at the call and leaves nothing behind', async () => {
  const slots = ctx.device.liveSlots()
  const { liveBytes } = ctx.device.memory()
  ctx.device.setMemoryLimit(liveBytes + 2 ** 20)
  expect(() => Tensor.zeros(ctx, [2 ** 20], 'float32')).toThrow(/expected room for 4194304 bytes, got none/)
  expect(ctx.device.liveSlots()).toBe(slots)
  expect(ctx.device.memory().liveBytes).toBe(liveBytes)
  await ctx.stream.sync()
})

test('another stream waits for an event and sees the result', async () => {
  const side = ctx.device.createStream('side')
  const x = Tensor.zeros(ctx, [4], 'float32')
  native.debugDelay(ctx.stream.id, 20_000)
  native.fill(ctx.stream.id, x.handle, 7)
  side.wait(ctx.stream)
  const copy = Tensor.empty(ctx.with({ stream: side }), [4], 'float32')
  native.copy(side.id, copy.handle, x.handle)
  expect([...(await copy.toFloat32Array())]).toEqual([7, 7, 7, 7])
  const event = side.record()
  await side.sync()
  expect(event.done).toBe(true)
  event.dispose()
  event.dispose()
  x.dispose()
  copy.dispose()
  side.dispose()
  side.dispose()
})

async function script(text: string): Promise<{ stdout: string; stderr: string }> {
  const root = packageRoot()
  const source = `import { Ctx, Tensor } from ${JSON.stringify(join(root, 'lib/tensor/index.ts'))}\n${text}`
  return promisify(execFile)(
    process.execPath,
    ['--expose-gc', '--import', 'tsx', '--input-type=module', '-e', source],
    { cwd: root, env: { ...process.env, VIADUCT_DEBUG_HANDLES: '1' }, timeout: 30_000 },
  )
}

test('with VIADUCT_DEBUG_HANDLES a stale tensor says where it was freed, and a lost one is reported', async () => {
  const { stdout, stderr } = await script(`
    const ctx = Ctx.create()
    const x = Tensor.zeros(ctx, [2], 'float32')
    function theGuilty() { x.dispose() }
    theGuilty()
    try { x.handle } catch (error) { console.log(error.code, error.message.includes('theGuilty')) }
    ;(function theLeak() { Tensor.zeros(ctx, [3], 'float32').keep() })()
    ctx.scope.close()
    for (let i = 0; i < 20; i++) { globalThis.gc(); await new Promise((resolve) => setTimeout(resolve, 5)) }
  `)
  expect(stdout).toBe('ERR_HANDLE true\n')
  expect(stderr).toContain('was never freed')
  expect(stderr).toContain('theLeak')
})
