// Reads a pickle without unpickling: a stack machine over the opcodes that torch.save uses for a state dict, which builds only
// what pickleValues.ts has. No name is looked up anywhere but in a list, and every size is checked before something is made.
import { ViaductError } from '../../base/errors.js'
import { Dict, List, Name, type PickleValue, Tuple } from './pickleValues.js'
import type { TorchObjects } from './torchNames.js'

/** Limits of one pickle. A state dict has some 40 opcodes and 7 containers a tensor: 70,000 tensors fit in one file. */
export const pickleLimits = {
  bytes: 16 << 20,
  opcodes: 3_000_000,
  containers: 500_000,
  remembered: 1_000_000,
  stack: 100_000,
  marks: 64,
  stringBytes: 65_536,
  nameBytes: 256,
} as const

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** Opcodes by their letter or number, those that are refused as well, for messages. */
const names: Readonly<Record<number, string>> = {
  105: 'INST',
  111: 'OBJ',
  129: 'NEWOBJ',
  146: 'NEWOBJ_EX',
  130: 'EXT1',
  131: 'EXT2',
  132: 'EXT4',
  80: 'PERSID',
  73: 'INT',
  76: 'LONG',
  139: 'LONG4',
  70: 'FLOAT',
  83: 'STRING',
  84: 'BINSTRING',
  86: 'UNICODE',
  141: 'BINUNICODE8',
  66: 'BINBYTES',
  67: 'SHORT_BINBYTES',
  142: 'BINBYTES8',
  150: 'BYTEARRAY8',
  151: 'NEXT_BUFFER',
  152: 'READONLY_BUFFER',
  143: 'EMPTY_SET',
  144: 'ADDITEMS',
  145: 'FROZENSET',
  48: 'POP',
  49: 'POP_MARK',
  50: 'DUP',
  103: 'GET',
  112: 'PUT',
  100: 'DICT',
  108: 'LIST',
}

/** A pickle's value, and the offset after its STOP. */
export interface ReadPickle {
  readonly value: PickleValue
  readonly end: number
}

/**
 * Reads the pickle that begins at `start`.
 * @param file - for messages; offsets in them count from the first byte of `bytes`.
 * @throws ERR_PICKLE at the opcode that is not of a state dict, naming what it wanted.
 */
export function readPickle(bytes: Buffer, start: number, file: string, objects: TorchObjects): ReadPickle {
  return new Machine(bytes, start, file, objects).run()
}

class Machine {
  readonly #stack: PickleValue[] = []
  readonly #marks: number[] = []
  readonly #memo: PickleValue[] = []
  #at: number
  #opcodeAt: number
  #containers = 0

  constructor(
    readonly bytes: Buffer,
    start: number,
    readonly file: string,
    readonly objects: TorchObjects,
  ) {
    this.#at = start
    this.#opcodeAt = start
  }

  run(): ReadPickle {
    for (let count = 0; count < pickleLimits.opcodes; count++) {
      this.#opcodeAt = this.#at
      const opcode = this.bytes[this.#take(1)] as number
      if (opcode === 0x2e) {
        const value = this.#pop()
        if (this.#stack.length + this.#marks.length > 0) this.#refuse('expected one value, got more')
        return { value, end: this.#at }
      }
      this.#step(opcode)
      if (this.#stack.length > pickleLimits.stack) this.#refuse(`expected at most ${pickleLimits.stack} values at once`)
    }
    return this.#refuse(`expected at most ${pickleLimits.opcodes} opcodes`)
  }

  #step(opcode: number): void {
    const stack = this.#stack
    switch (opcode) {
      case 0x80: {
        // PROTO
        const protocol = this.bytes[this.#take(1)] as number
        if (protocol < 2 || protocol > 5) this.#refuse(`expected protocol 2 to 5, got ${protocol}`)
        return
      }
      case 0x95: {
        // FRAME: opcodes follow as they do without one
        const length = this.bytes.readBigUInt64LE(this.#take(8))
        if (length > BigInt(this.bytes.length - this.#at))
          this.#refuse(`expected a frame in the file, got ${length} bytes`)
        return
      }
      case 0x4e:
        return void stack.push(null) // NONE
      case 0x88:
        return void stack.push(true) // NEWTRUE
      case 0x89:
        return void stack.push(false) // NEWFALSE
      case 0x4b:
        return void stack.push(this.bytes[this.#take(1)] as number) // BININT1
      case 0x4d:
        return void stack.push(this.bytes.readUInt16LE(this.#take(2))) // BININT2
      case 0x4a:
        return void stack.push(this.bytes.readInt32LE(this.#take(4))) // BININT
      case 0x47:
        return void stack.push(this.bytes.readDoubleBE(this.#take(8))) // BINFLOAT
      case 0x8a:
        return void stack.push(this.#long()) // LONG1
      case 0x8c: // SHORT_BINUNICODE
      case 0x55:
        return void stack.push(this.#string(this.bytes[this.#take(1)] as number)) // SHORT_BINSTRING
      case 0x58:
        return void stack.push(this.#string(this.bytes.readUInt32LE(this.#take(4)))) // BINUNICODE
      case 0x63:
        return void stack.push(this.#name(this.#line(), this.#line())) // GLOBAL
      case 0x93: {
        // STACK_GLOBAL
        const [module, name] = this.#popMany(2)
        if (typeof module !== 'string' || typeof name !== 'string')
          return this.#refuse('expected a name of two strings')
        return void stack.push(this.#name(module, name))
      }
      case 0x28: // MARK
        if (this.#marks.push(stack.length) > pickleLimits.marks)
          this.#refuse(`expected at most ${pickleLimits.marks} marks`)
        return
      case 0x5d:
        return void stack.push(this.#made(new List())) // EMPTY_LIST
      case 0x7d:
        return void stack.push(this.#made(new Dict(false))) // EMPTY_DICT
      case 0x29:
        return void stack.push(this.#made(new Tuple([]))) // EMPTY_TUPLE
      case 0x85: // TUPLE1
      case 0x86: // TUPLE2
      case 0x87:
        return void stack.push(this.#made(new Tuple(this.#popMany(opcode - 0x84)))) // TUPLE3
      case 0x74:
        return void stack.push(this.#made(new Tuple(this.#popToMark()))) // TUPLE
      case 0x61:
        return this.#append([this.#pop()]) // APPEND
      case 0x65:
        return this.#append(this.#popToMark()) // APPENDS
      case 0x73:
        return this.#setItems(this.#popMany(2)) // SETITEM
      case 0x75:
        return this.#setItems(this.#popToMark()) // SETITEMS
      case 0x71:
        return this.#memoize(this.bytes[this.#take(1)] as number) // BINPUT
      case 0x72:
        return this.#memoize(this.bytes.readUInt32LE(this.#take(4))) // LONG_BINPUT
      case 0x94:
        return this.#memoize(this.#memo.length) // MEMOIZE
      case 0x68:
        return this.#recall(this.bytes[this.#take(1)] as number) // BINGET
      case 0x6a:
        return this.#recall(this.bytes.readUInt32LE(this.#take(4))) // LONG_BINGET
      case 0x51: // BINPERSID
        return void stack.push(this.objects.storage(this.#pop(), this.#refuse))
      case 0x52: {
        // REDUCE
        const [callee, args] = this.#popMany(2)
        if (!(callee instanceof Name) || !(args instanceof Tuple))
          return this.#refuse('expected a name and its arguments')
        return void stack.push(this.#made(this.objects.build(callee.name, args.items, this.#refuse)))
      }
      case 0x62:
        return this.#build() // BUILD
      default:
        return this.#refuseOpcode(opcode)
    }
  }

  /** Attributes of an OrderedDict (`_metadata` of a state dict) are dropped; nothing else has a state. */
  #build(): void {
    const state = this.#pop()
    const target = this.#stack.at(-1)
    if (!(target instanceof Dict && target.ordered && state instanceof Dict))
      this.#refuse('expected a state of nothing but an OrderedDict (BUILD)')
  }

  #name(module: string, name: string): Name {
    const key = `${module} ${name}`
    if (!this.objects.knows(key)) this.#refuseName(module, name)
    return new Name(key)
  }

  #append(items: readonly PickleValue[]): void {
    const target = this.#stack.at(-1)
    if (!(target instanceof List)) return this.#refuse('expected a list to append to')
    for (const item of items) target.items.push(item)
  }

  #setItems(items: readonly PickleValue[]): void {
    const target = this.#stack.at(-1)
    if (!(target instanceof Dict) || items.length % 2 !== 0) return this.#refuse('expected a dict and pairs to set')
    for (let i = 0; i < items.length; i += 2) {
      target.keys.push(items[i] as PickleValue)
      target.values.push(items[i + 1] as PickleValue)
    }
  }

  #memoize(index: number): void {
    if (this.#stack.length === (this.#marks.at(-1) ?? 0)) this.#refuse('expected a value to remember')
    // Every pickler counts them up from 0.
    if (index !== this.#memo.length) this.#refuse(`expected value ${this.#memo.length} to be remembered, got ${index}`)
    if (index >= pickleLimits.remembered) this.#refuse(`expected at most ${pickleLimits.remembered} remembered values`)
    this.#memo.push(this.#stack.at(-1) as PickleValue)
  }

  #recall(index: number): void {
    const value = this.#memo[index]
    if (value === undefined) return this.#refuse(`expected a remembered value, got none at ${index}`)
    this.#stack.push(value)
  }

  #made<T>(value: T): T {
    if (++this.#containers > pickleLimits.containers)
      this.#refuse(`expected at most ${pickleLimits.containers} containers`)
    return value
  }

  #pop(): PickleValue {
    if (this.#stack.length <= (this.#marks.at(-1) ?? 0)) this.#refuse('expected a value on the stack, got none')
    return this.#stack.pop() as PickleValue
  }

  #popMany(count: number): PickleValue[] {
    if (this.#stack.length - (this.#marks.at(-1) ?? 0) < count) this.#refuse(`expected ${count} values on the stack`)
    return this.#stack.splice(-count)
  }

  #popToMark(): PickleValue[] {
    const mark = this.#marks.pop()
    return mark === undefined ? this.#refuse('expected a mark') : this.#stack.splice(mark)
  }

  /** Where the next `count` bytes begin; they are read. */
  #take(count: number): number {
    const at = this.#at
    if (count > this.bytes.length - at) this.#refuse('expected the pickle to end with STOP, got the end of its bytes')
    this.#at = at + count
    return at
  }

  #string(length: number): string {
    if (length > pickleLimits.stringBytes)
      this.#refuse(`expected strings below ${pickleLimits.stringBytes} bytes, got ${length}`)
    const at = this.#take(length)
    try {
      return utf8.decode(this.bytes.subarray(at, at + length))
    } catch {
      return this.#refuse('expected UTF-8 in a string')
    }
  }

  #line(): string {
    const end = this.bytes.subarray(this.#at, this.#at + pickleLimits.nameBytes).indexOf(0x0a)
    if (end < 0) return this.#refuse(`expected a name that ends within ${pickleLimits.nameBytes} bytes`)
    const line = this.#string(end)
    this.#take(1)
    return line
  }

  /** Up to 10 bytes, little endian, two's complement: sizes, and the magic number of the format before torch 1.6. */
  #long(): number | bigint {
    const length = this.bytes[this.#take(1)] as number
    if (length > 10) return this.#refuse(`expected whole numbers of at most 10 bytes, got ${length}`)
    const at = this.#take(length)
    let value = 0n
    for (let i = length - 1; i >= 0; i--) value = (value << 8n) | BigInt(this.bytes[at + i] as number)
    const signed = BigInt.asIntN(length * 8, value)
    return Number.isSafeInteger(Number(signed)) ? Number(signed) : signed
  }

  #refuseOpcode(opcode: number): never {
    if (opcode === 0x69) this.#refuseName(this.#line(), this.#line()) // INST module name
    const name = names[opcode] ?? `0x${opcode.toString(16).padStart(2, '0')}`
    return this.#refuse(`expected opcodes of a state dict, got ${name}`, { opcode: name })
  }

  #refuseName(module: string, name: string): never {
    const wanted = `${module}.${name}`.slice(0, 200)
    return this.#refuse(`expected tensors and plain containers, got the name ${JSON.stringify(wanted)}`, {
      global: wanted,
    })
  }

  readonly #refuse = (message: string, details: Record<string, unknown> = {}): never => {
    throw new ViaductError(
      'ERR_PICKLE',
      'torch',
      `${message} at byte ${this.#opcodeAt} of ${this.file}: pickles are never run, only state dicts of dense tensors are read; take a revision with safetensors, or save the model again with save_pretrained(safe_serialization=True)`,
      { file: this.file, byteOffset: this.#opcodeAt, ...details },
    )
  }
}
