// Files of torch.save that would run code, are cut, damaged or lie (F20): each is refused with a code, quickly, in little memory,
// and nothing runs. Gadgets are bytes put together here; whether Python would run them does not matter to what is refused.
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeEach, describe, expect, it } from 'vitest'
import { ViaductError } from '../../lib/base/errors.js'
import { pickleLimits } from '../../lib/io/torch/pickleMachine.js'
import { openTorchFile } from '../../lib/io/torch/torchFile.js'
import { openWeights } from '../../lib/io/weightFolder.js'
import { randomBytes } from './llamaFolder.js'
import { op, pickle, tensorOpcodes, torchZip, type ZipPart, zip } from './pickleBytes.js'
import { errorOf, temporaryFolder } from './temporary.js'

const home = temporaryFolder()
const path = join(home, 'pytorch_model.bin')
const marker = join(home, 'marker')
const open = () => openTorchFile(path, 'pytorch_model.bin')
const command = `touch ${marker}`

/** Milliseconds of processor time: other programs of the machine do not count. */
const spentTime = () => {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1000
}

/** Opens the file and gives the error; refuses to take long. */
async function refusal(bytes: Uint8Array): Promise<ViaductError> {
  writeFileSync(path, bytes)
  const began = spentTime()
  const error = await errorOf(open)
  expect(spentTime() - began).toBeLessThan(2000)
  return error
}

/** A call of a name with one text. */
const call = (module: string, name: string, text = command) =>
  pickle(op.global(module, name), op.text(text), op.tuple1, op.reduce)
const evil = `__import__('os').system('${command}')`

const gadgets: Record<string, [bytes: Buffer, global: string | null]> = {
  'os.system': [call('os', 'system'), 'os.system'],
  'posix.system': [call('posix', 'system'), 'posix.system'],
  'nt.system': [call('nt', 'system'), 'nt.system'],
  'os.system, protocol 0': [Buffer.from(`cos\nsystem\n(S'${command}'\ntR.`), 'os.system'],
  'subprocess.Popen': [call('subprocess', 'Popen'), 'subprocess.Popen'],
  'subprocess.check_output': [call('subprocess', 'check_output'), 'subprocess.check_output'],
  'builtins.eval': [call('builtins', 'eval', evil), 'builtins.eval'],
  'builtins.exec': [call('builtins', 'exec', evil), 'builtins.exec'],
  '__builtin__.eval': [call('__builtin__', 'eval', evil), '__builtin__.eval'],
  'builtins.getattr': [
    pickle(op.global('builtins', 'getattr'), op.global('os', 'path'), op.text('os'), op.tuple2, op.reduce),
    'builtins.getattr',
  ],
  'builtins.__import__': [call('builtins', '__import__', 'os'), 'builtins.__import__'],
  'runpy._run_code': [call('runpy', '_run_code', evil), 'runpy._run_code'],
  'torch.load of another file': [call('torch', 'load', '/dev/stdin'), 'torch.load'],
  'torch.hub.load': [call('torch.hub', 'load', 'evil/repository'), 'torch.hub.load'],
  'torch._utils with a callable': [
    pickle(op.global('torch._utils', '_rebuild_tensor_v2'), op.global('os', 'system'), op.tuple1, op.reduce),
    'os.system',
  ],
  'torch._utils, a name that is not listed': [
    call('torch._utils', '_rebuild_wrapper_subclass'),
    'torch._utils._rebuild_wrapper_subclass',
  ],
  'torch.storage._load_from_bytes': [call('torch.storage', '_load_from_bytes'), 'torch.storage._load_from_bytes'],
  'torch._tensor._rebuild_from_type_v2': [
    call('torch._tensor', '_rebuild_from_type_v2'),
    'torch._tensor._rebuild_from_type_v2',
  ],
  'functools.partial': [call('functools', 'partial'), 'functools.partial'],
  'operator.attrgetter': [call('operator', 'attrgetter', 'system.__call__'), 'operator.attrgetter'],
  'operator.methodcaller': [call('operator', 'methodcaller', 'system'), 'operator.methodcaller'],
  'numpy reconstruct': [call('numpy.core.multiarray', '_reconstruct'), 'numpy.core.multiarray._reconstruct'],
  'pickle.loads': [call('_pickle', 'loads'), '_pickle.loads'],
  'copyreg._reconstructor': [call('copyreg', '_reconstructor'), 'copyreg._reconstructor'],
  INST: [pickle(op.mark, op.text(command), op.inst('os', 'system')), 'os.system'],
  OBJ: [pickle(op.mark, op.global('collections', 'OrderedDict'), op.text(command), op.obj), null],
  'OBJ of a name that is not listed': [
    pickle(op.mark, op.global('os', 'system'), op.text(command), op.obj),
    'os.system',
  ],
  STACK_GLOBAL: [pickle(op.shortText('os'), op.shortText('system'), op.stackGlobal), 'os.system'],
  'STACK_GLOBAL of remembered pieces': [
    Buffer.concat([
      op.proto(4),
      op.emptyDict,
      op.memoize,
      op.shortText('posix'),
      op.memoize,
      op.shortText('system'),
      op.memoize,
      op.setItem,
      op.get(1),
      op.get(2),
      op.stackGlobal,
      op.shortText(command),
      op.tuple1,
      op.reduce,
      op.stop,
    ]),
    'posix.system',
  ],
  'STACK_GLOBAL with dots': [
    pickle(op.shortText('torch'), op.shortText('_utils._rebuild_tensor_v2.__globals__'), op.stackGlobal),
    'torch._utils._rebuild_tensor_v2.__globals__',
  ],
  'BUILD with __setstate__': [
    pickle(op.emptyDict, op.emptyDict, op.text('__setstate__'), op.text('os.system'), op.setItem, op.build),
    null,
  ],
  'BUILD with a function': [
    pickle(op.emptyDict, op.emptyDict, op.text('__setstate__'), op.global('os', 'system'), op.setItem, op.build),
    'os.system',
  ],
  NEWOBJ: [pickle(op.global('collections', 'OrderedDict'), op.emptyTuple, op.newObj), null],
  NEWOBJ_EX: [pickle(op.global('collections', 'OrderedDict'), op.emptyTuple, op.emptyDict, op.newObjEx), null],
  EXT1: [pickle(op.ext1(1)), null],
  'a call of what is no name': [pickle(op.text('os.system'), op.text(command), op.tuple1, op.reduce), null],
  'a call of a storage type': [pickle(op.global('torch', 'FloatStorage'), op.text('x'), op.tuple1, op.reduce), null],
  PERSID: [pickle(op.persistentLine('os.system')), null],
  'a persistent id with another word': [
    pickle(op.mark, op.text('module'), op.text('os'), op.text('system'), op.tuple, op.persistent),
    null,
  ],
  'a persistent id with a forged type': [
    pickle(
      op.mark,
      op.text('storage'),
      op.text('os.system'),
      op.text('0'),
      op.text('cpu'),
      op.byte(1),
      op.tuple,
      op.persistent,
    ),
    null,
  ],
  'a persistent id whose type is called': [
    pickle(
      op.mark,
      op.text('storage'),
      op.global('os', 'system'),
      op.text('0'),
      op.text('cpu'),
      op.byte(1),
      op.tuple,
      op.persistent,
    ),
    'os.system',
  ],
}

describe('F20: pickles that would run code', () => {
  it('are more than fifteen', () => expect(Object.keys(gadgets).length).toBeGreaterThan(15))

  it.each(Object.entries(gadgets))('%s', async (_, [bytes, global]) => {
    const handles = process.getActiveResourcesInfo().filter((name) => name.includes('Process'))
    for (const [file, where] of [
      [bytes, 'pytorch_model.bin'],
      [torchZip(bytes), 'data.pkl in pytorch_model.bin'],
    ] as const) {
      const error = await refusal(file)
      expect(error.code).toBe('ERR_PICKLE')
      expect(error.details).toMatchObject({ file: where, byteOffset: expect.any(Number) })
      expect(error.message).toContain(`of ${where}`)
      if (global) {
        expect(error.details['global']).toBe(global)
        expect(error.message).toContain(JSON.stringify(global))
      }
    }
    expect(existsSync(marker)).toBe(false)
    expect(process.getActiveResourcesInfo().filter((name) => name.includes('Process'))).toEqual(handles)
  })

  it('say at which opcode', async () => {
    const error = await refusal(pickle(op.emptyDict, op.text('a'), op.global('os', 'system')))
    expect(error.details['byteOffset']).toBe(9)
  })
})

const values = Buffer.from(new Float32Array([1, 2, 3, 4, 5, 6]).buffer)
const one = (name: string, o: Partial<Parameters<typeof tensorOpcodes>[0]> = {}) =>
  pickle(op.emptyDict, op.text(name), tensorOpcodes({ key: '0', count: 6, shape: [2, 3], ...o }), op.setItem)

describe('the bytes that tests assemble', () => {
  it('open where they are sound', async () => {
    writeFileSync(path, torchZip(one('a'), { 0: values }))
    const entry = (await open()).get('a')
    expect(entry).toMatchObject({ dtype: 'float32', shape: [2, 3] })
    expect(readFileSync(path).subarray(entry?.begin, entry?.end)).toEqual(values)
  })
})

describe('state dicts that are none', () => {
  const pair = (key: Buffer, value: Buffer) => Buffer.concat([key, value, op.setItem])
  const tensor = tensorOpcodes({ key: '0', count: 6, shape: [2, 3] })
  const list: Record<string, Buffer> = {
    'a tensor alone': pickle(tensor),
    'a list': pickle(op.emptyList, tensor, op.append),
    'no tensors': pickle(op.emptyDict),
    'a number among tensors': pickle(op.emptyDict, pair(op.text('a'), tensor), pair(op.text('b'), op.byte(1))),
    'a dict among tensors': pickle(op.emptyDict, pair(op.text('a'), tensor), pair(op.text('b'), op.emptyDict)),
    'a number for a name': pickle(op.emptyDict, pair(op.byte(1), tensor)),
    'a name twice': pickle(op.emptyDict, pair(op.text('a'), tensor), pair(op.text('a'), tensor)),
    'a reserved name': one('__metadata__'),
    'two wrappers': pickle(
      op.emptyDict,
      pair(op.text('model'), Buffer.concat([op.emptyDict, pair(op.text('a'), tensor)])),
      pair(op.text('state_dict'), Buffer.concat([op.emptyDict, pair(op.text('a'), tensor)])),
    ),
    'tensors beside the wrapper': pickle(
      op.emptyDict,
      pair(op.text('model'), Buffer.concat([op.emptyDict, pair(op.text('a'), tensor)])),
      pair(op.text('optimizer'), Buffer.concat([op.emptyList, tensor, op.append])),
    ),
    'strides of a transposed tensor': one('a', { strides: [1, 2] }),
    'strides that repeat': one('a', { strides: [0, 1] }),
    'a tensor beyond its storage': one('a', { offset: 1 }),
    'a shape beyond its storage': one('a', { shape: [2, 4] }),
    'a shape beyond all numbers': one('a', { shape: Array(40).fill(0x7fffffff), strides: Array(40).fill(1) }),
    'more dimensions than PyTorch has': one('a', { shape: [2, 3, ...Array(100).fill(1)], strides: Array(102).fill(1) }),
    'another storage key': one('a', { key: '../../0' }),
    'another count': one('a', { count: 7 }),
    'another type': one('a', { type: 'DoubleStorage' }),
  }
  it.each(Object.entries(list))('%s', async (_, bytes) => {
    expect((await refusal(torchZip(bytes, { 0: values }))).code).toMatch(/^ERR_(TORCH_FILE|PICKLE)$/)
  })
  it('negative sizes and one key with two meanings are refused by the pickle', async () => {
    expect(await refusal(torchZip(one('a', { shape: [-2, -3] }), { 0: values }))).toMatchObject({ code: 'ERR_PICKLE' })
    const two = pickle(
      op.emptyDict,
      pair(op.text('a'), tensor),
      pair(op.text('b'), tensorOpcodes({ key: '0', count: 3, shape: [3] })),
    )
    expect(await refusal(torchZip(two, { 0: values }))).toMatchObject({ code: 'ERR_PICKLE' })
  })
  it('no key reaches a prototype', async () => {
    for (const name of ['__proto__', 'constructor', 'toString']) {
      writeFileSync(path, torchZip(one(name), { 0: values }))
      expect([...(await open()).keys()]).toEqual([name])
    }
    expect(({} as Record<string, unknown>)['dtype']).toBeUndefined()
  })
})

describe('sizes that are absurd', () => {
  const u32 = (n: number) => Buffer.from(new Uint32Array([n]).buffer)
  const repeated = (opcodes: string, times: number) => Buffer.from(opcodes.repeat(times), 'latin1')
  const list: Record<string, [bytes: Buffer, message: string]> = {
    'a string of 4 GB': [pickle(Buffer.from('X'), u32(0xffffffff)), 'got 4294967295'],
    'a string beyond the end': [pickle(Buffer.from('X'), u32(60_000)), 'expected the pickle to end'],
    'a frame of 2^63 bytes': [pickle(Buffer.from([0x95, 0, 0, 0, 0, 0, 0, 0, 0x80])), 'got 9223372036854775808 bytes'],
    'a whole number of 255 bytes': [pickle(Buffer.from([0x8a, 255]), Buffer.alloc(255, 1)), 'at most 10 bytes'],
    'protocol 9': [Buffer.concat([op.proto(9), op.none, op.stop]), 'protocol 2 to 5, got 9'],
    'marks in marks': [pickle(repeated('(', pickleLimits.marks + 1)), `at most ${pickleLimits.marks} marks`],
    'values at once': [pickle(repeated('N', pickleLimits.stack + 1)), `at most ${pickleLimits.stack} values`],
    containers: [
      pickle(op.emptyList, repeated('}a', pickleLimits.containers)),
      `at most ${pickleLimits.containers} containers`,
    ],
    opcodes: [pickle(op.emptyList, repeated('Na', pickleLimits.opcodes)), `at most ${pickleLimits.opcodes} opcodes`],
    'remembered values': [
      pickle(op.none, repeated('\x94', pickleLimits.remembered + 1)),
      `at most ${pickleLimits.remembered} remembered`,
    ],
    'a value that nobody remembered': [pickle(op.get(7)), 'expected a remembered value, got none at 7'],
    'an empty pickle': [pickle(), 'expected a value on the stack'],
    'a name without an end': [pickle(Buffer.from('c'), Buffer.alloc(100_000, 'a')), 'that ends within 256 bytes'],
  }
  it.each(Object.entries(list))('%s', async (_, [bytes, message]) => {
    const before = process.memoryUsage().rss
    for (const file of [torchZip(bytes), bytes]) {
      const error = await refusal(file)
      expect(error.code).toBe('ERR_PICKLE')
      expect(error.message).toContain(message)
    }
    expect(process.memoryUsage().rss - before).toBeLessThan(256 << 20)
  })
  it('a list in itself, and values remembered in values', async () => {
    const nested = pickle(op.emptyList, op.put(0), repeated('h\0a', 400_000))
    expect(await refusal(torchZip(nested))).toMatchObject({ code: 'ERR_TORCH_FILE' })
    const doubled = Array.from({ length: 60 }, (_, i) => [op.get(i), op.get(i), op.tuple2, op.put(i + 1)]).flat()
    const tuple = pickle(op.mark, op.none, op.put(0), ...doubled, op.tuple)
    expect(await refusal(torchZip(tuple))).toMatchObject({ code: 'ERR_TORCH_FILE' })
  })
})

describe('archives that lie', () => {
  const good: ZipPart[] = [
    { name: 'archive/data.pkl', data: one('a') },
    { name: 'archive/data/0', data: values },
  ]
  const changed = (i: number, change: Partial<ZipPart>) =>
    good.map((part, j) => (i === j ? { ...part, ...change } : part))
  const list: Record<string, Buffer> = {
    'a compressed entry': zip(changed(1, { method: 8 })),
    'a bomb: small in the file, large outside of it': zip(changed(1, { bytes: 0x7fffffff, packed: 24 })),
    'an encrypted entry': zip(changed(0, { flags: 1 })),
    'an entry larger than the file': zip(changed(1, { bytes: 0x7fffffff })),
    'entries over each other': zip(changed(1, { local: 0 })),
    'two names in one place': zip([...good, { name: 'archive/data/1', data: values, local: 60 }]),
    'a name twice': zip([...good, good[1] as ZipPart]),
    'a name that climbs': zip([...good, { name: 'archive/../../x', data: values }]),
    'an absolute name': zip([...good, { name: '/etc/passwd', data: values }]),
    'a name with a backslash': zip([...good, { name: 'archive\\..\\x', data: values }]),
    'another folder': zip([...good, { name: 'other/data.pkl', data: one('b') }]),
    'another name in the header': zip(changed(0, { localName: 'archive/data.pk1' })),
    'more entries than there are': zip(good, { count: 60_000 }),
    'fewer entries than there are': zip(good, { count: 1 }),
    'a directory elsewhere': zip(good, { start: 3 }),
    'no data.pkl': zip(good.slice(1)),
    'no entries': zip([]), // begins as no archive does: read as a pickle
    'bytes before the archive': Buffer.concat([Buffer.from('PK\x03\x04'), zip(good)]),
    'bytes after the archive': Buffer.concat([zip(good), Buffer.from('x')]),
    'big-endian tensors': zip([...good, { name: 'archive/byteorder', data: Buffer.from('big') }]),
    'a version of the future': zip([...good, { name: 'archive/version', data: Buffer.from('99') }]),
    'a sound archive': zip(good),
  }
  it.each(Object.entries(list))('%s', async (name, bytes) => {
    if (name === 'a sound archive') {
      writeFileSync(path, bytes)
      expect((await open()).size).toBe(1)
    } else expect((await refusal(bytes)).code).toMatch(/^ERR_(TORCH_FILE|PATH_ESCAPE|PICKLE)$/)
  })
  it('a pickle that its checksum does not match', async () => {
    const bytes = zip(good)
    const at = bytes.indexOf('collections')
    bytes[at] = (bytes[at] as number) ^ 1
    expect(await refusal(bytes)).toMatchObject({ code: 'ERR_TORCH_FILE', message: expect.stringContaining('CRC-32') })
  })
})

describe.each(['wrapped.pt', 'small_legacy.bin'])('%s, damaged', (fixture) => {
  const sound = readFileSync(join('test/fixtures/torch', fixture))
  let most = 0
  beforeEach(() => {
    most = process.memoryUsage().rss
  })

  /** An error with a code, or tensors inside of the file; both quickly. */
  async function holds(bytes: Uint8Array): Promise<string> {
    writeFileSync(path, bytes)
    const began = spentTime()
    let outcome = 'open'
    try {
      for (const { begin, end, shape } of (await open()).values())
        if (!(0 <= begin && begin <= end && end <= bytes.length && shape.every((size) => size >= 0)))
          outcome = 'outside'
    } catch (error) {
      if (!(error instanceof ViaductError)) throw error
      outcome = error.code
    }
    expect(spentTime() - began).toBeLessThan(2000)
    return outcome
  }
  const spent = () => process.memoryUsage().rss - most

  it('cut at every byte', { timeout: 60_000 }, async () => {
    const outcomes = new Set<string>()
    for (let length = 0; length < sound.length; length++) outcomes.add(await holds(sound.subarray(0, length)))
    expect([...outcomes].sort().filter((code) => !/^ERR_(PICKLE|TORCH_FILE)$/.test(code))).toEqual([])
    expect(spent()).toBeLessThan(64 << 20)
  })
  it('500 random bytes changed', { timeout: 60_000 }, async () => {
    const draws = randomBytes(500 * 5, fixture.length)
    const outcomes = new Map<string, number>()
    for (let i = 0; i < 500; i++) {
      const bytes = Buffer.from(sound)
      const at = draws.readUInt32LE(i * 5) % bytes.length
      bytes[at] = (bytes[at] as number) ^ ((draws[i * 5 + 4] as number) || 1)
      const outcome = await holds(bytes)
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
    }
    expect(
      [...outcomes.keys()].filter((code) => !/^(open|ERR_PICKLE|ERR_TORCH_FILE|ERR_PATH_ESCAPE)$/.test(code)),
    ).toEqual([])
    expect(spent()).toBeLessThan(64 << 20)
  })
})

describe('a folder', () => {
  it('with safetensors never opens its pickle', async () => {
    const folder = 'test/fixtures/llama/plain'
    const weights = await openWeights(folder)
    expect(weights.files.every(({ header }) => header !== null)).toBe(true)
  })
})
