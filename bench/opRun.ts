// Our side's commands that time single ops on a device: by the clock, from a stream that is empty to one that is empty again. What an op
// is stands in opCases.ts.
import { native } from '../lib/addon/load.js'
import { envFlag } from '../lib/base/env.js'
import { Ctx } from '../lib/tensor/ctx.js'
import { Device } from '../lib/tensor/device.js'
import { cpuOpCases, type FloatName, Maker, type MatmulShape, matmulCase, type OpSizes, opCases } from './opCases.js'

/** Calls before the clock starts: plans and code are made at the first ones. */
const warmCalls = 2
const mostCalls = 1000

interface OpArgs {
  readonly device: 'cpu' | 'cuda'
  readonly leastSeconds: number
}

/** Seconds a call, over as many calls as take so long together, 1 at least. */
async function secondsOf({ stream }: Device, call: () => void, leastSeconds: number): Promise<number> {
  const timed = async (calls: number) => {
    const from = performance.now()
    for (let i = 0; i < calls; i++) call()
    await stream.sync()
    return (performance.now() - from) / 1000
  }
  await timed(warmCalls)
  const one = await timed(1)
  const calls = Math.min(mostCalls, Math.max(1, Math.ceil(leastSeconds / one)))
  return (await timed(calls)) / calls
}

async function measured(build: (make: Maker) => () => void, args: OpArgs): Promise<{ seconds: number }> {
  const device = Device.open(args.device)
  const make = new Maker(Ctx.create({ device }))
  try {
    return { seconds: await secondsOf(device, build(make), args.leastSeconds) }
  } finally {
    make.close()
    device.stream.reset() // an op that failed is one row's failure
    native.setAttentionEngine(device.index, 'auto')
    native.allowNondeterministic(device.index, envFlag('VIADUCT_ALLOW_NONDETERMINISTIC_ALGO')) // what comes behind
    native.setGroupedMatmulEngine(device.index, 'auto')
  }
}

function op({ name, sizes, ...args }: OpArgs & { name: string; sizes: OpSizes }) {
  const cases = args.device === 'cpu' ? cpuOpCases(sizes) : opCases(sizes)
  const found = cases[name]
  if (found === undefined) throw new Error(`expected one of ${Object.keys(cases).join(', ')}, got ${name}`)
  return measured((make) => found.build(make), args)
}

function matmul(args: OpArgs & { shape: MatmulShape; dtype: FloatName; form?: 'forward' | 'weights' }) {
  return measured(matmulCase(args.shape, args.dtype, args.form).build, args)
}

function copy({ bytes, ...args }: OpArgs & { bytes: number }) {
  return measured((make) => {
    const [x, y] = [make.normal([bytes / 4], 'float32'), make.empty([bytes / 4], 'float32')]
    return () => native.copy(make.stream, y, x)
  }, args)
}

/** Reads alone: the sum of squares of so many bytes. */
function read({ bytes, ...args }: OpArgs & { bytes: number }) {
  return measured((make) => {
    const [acc, x] = [make.full([1], 0, 'float64'), make.normal([bytes / 4], 'float32')]
    return () => native.sumSquares(make.stream, acc, x)
  }, args)
}

/** Commands by name. */
export const opCommands: Record<string, (args: never) => Promise<object>> = { op, matmul, copy, read }
