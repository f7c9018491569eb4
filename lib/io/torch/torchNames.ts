// The names that a torch file may use, and what each builds: a description, never a call. Everything that torch.save writes for
// dense tensors is here; any other name is refused where it stands. A storage key keeps one meaning in a file.
import { type DType, dtypes } from '../../base/dtype.js'
import { Dict, Name, type PickleValue, Storage, StoredTensor, Tuple } from './pickleValues.js'

/** Refuses at the opcode that is being read. */
export type Refuse = (message: string, details?: Record<string, unknown>) => never

const storageTypes = new Map<string, DType | null>([
  ['torch FloatStorage', 'float32'],
  ['torch DoubleStorage', 'float64'],
  ['torch HalfStorage', 'float16'],
  ['torch BFloat16Storage', 'bfloat16'],
  ['torch LongStorage', 'int64'],
  ['torch IntStorage', 'int32'],
  ['torch ShortStorage', 'int16'],
  ['torch CharStorage', 'int8'],
  ['torch ByteStorage', 'uint8'],
  ['torch BoolStorage', 'bool'],
  ['torch ComplexFloatStorage', 'complex64'],
  ['torch.storage UntypedStorage', null],
])

/** As in PyTorch. */
const mostDimensions = 64

const dtypeNames = new Map(
  Object.entries(dtypes)
    .filter(([, { bits }]) => bits % 8 === 0)
    .map(([name]) => [`torch ${name}`, name as DType]),
)

type Build = (args: readonly PickleValue[], refuse: Refuse) => PickleValue

const calls = new Map<string, Build>([
  [
    'collections OrderedDict',
    (args, refuse) => (args.length === 0 ? new Dict(true) : refuse('expected an empty dict')),
  ],
  [
    'torch Size',
    ([sizes, ...rest], refuse) =>
      sizes instanceof Tuple && rest.length === 0 ? sizes : refuse('expected one tuple for torch.Size'),
  ],
  ['torch._utils _rebuild_tensor', (args, refuse) => tensor(args.slice(0, 4), null, args.slice(4), refuse)],
  ['torch._utils _rebuild_tensor_v2', (args, refuse) => tensor(args.slice(0, 4), null, args.slice(6), refuse)],
  [
    'torch._utils _rebuild_tensor_v3',
    (args, refuse) => {
      const name = args[6]
      const dtype = name instanceof Name ? dtypeNames.get(name.name) : undefined
      return dtype ? tensor(args.slice(0, 4), dtype, args.slice(7), refuse) : refuse('expected a dtype for a tensor')
    },
  ],
  ['torch._utils _rebuild_parameter', parameter],
  ['torch._utils _rebuild_parameter_with_state', parameter],
])

function parameter([data]: readonly PickleValue[], refuse: Refuse): PickleValue {
  return data instanceof StoredTensor ? data : refuse('expected a tensor for a parameter')
}

/** `metadata`: views that conjugate or negate, which a copy of bytes would lose; empty in what torch.save writes. */
function tensor(
  [storage, offset, shape, strides]: readonly PickleValue[],
  dtype: DType | null,
  metadata: readonly PickleValue[],
  refuse: Refuse,
): StoredTensor {
  if (!(storage instanceof Storage)) return refuse('expected a storage for a tensor')
  if (!isCount(offset)) return refuse('expected a whole offset for a tensor')
  if (!isCounts(shape) || !isCounts(strides) || shape.items.length !== strides.items.length)
    return refuse('expected a shape and as many strides for a tensor')
  if (metadata.some((item) => item !== null && !(item instanceof Dict && item.keys.length === 0)))
    return refuse('expected a tensor without conj or neg views')
  const type = dtype ?? storage.dtype
  if (type === null) return refuse('expected a typed storage for a tensor without dtype')
  return new StoredTensor(storage, type, offset, shape.items, strides.items)
}

function isCount(value: PickleValue | undefined): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0
}

function isCounts(value: PickleValue | undefined): value is Tuple & { readonly items: readonly number[] } {
  return value instanceof Tuple && value.items.length <= mostDimensions && value.items.every(isCount)
}

/** What one torch file's pickles name: the storages by key, and how many tensors were described. */
export class TorchObjects {
  readonly storages = new Map<string, Storage>()
  tensors = 0

  /** True if `module name` may stand in a file. */
  knows(name: string): boolean {
    return calls.has(name) || storageTypes.has(name) || dtypeNames.has(name)
  }

  /** What a call of an allowed name describes. */
  build(name: string, args: readonly PickleValue[], refuse: Refuse): PickleValue {
    const build = calls.get(name)
    if (build === undefined) return refuse(`expected a name that builds something, got ${name.replace(' ', '.')}`)
    const value = build(args, refuse)
    if (value instanceof StoredTensor && !(args[0] instanceof StoredTensor)) this.tensors++
    return value
  }

  /** The storage of a persistent id: ('storage', type, key, location, count) and in files before torch 1.6 None after it. */
  storage(id: PickleValue, refuse: Refuse): Storage {
    const [word, type, key, location, count, view] = id instanceof Tuple ? id.items : []
    const dtype = type instanceof Name ? storageTypes.get(type.name) : undefined
    if (word !== 'storage' || dtype === undefined || typeof key !== 'string' || typeof location !== 'string')
      return refuse('expected the persistent id of a storage')
    if (view !== undefined && view !== null) return refuse('expected a storage of its own, got a view of another one')
    const bytes = isCount(count) ? count * (dtype ? dtypes[dtype].bits / 8 : 1) : Number.NaN
    if (!isCount(count) || !isCount(bytes)) return refuse('expected a whole count of elements for a storage')
    const known = this.storages.get(key)
    if (known === undefined) {
      const storage = new Storage(key, dtype, count, bytes)
      this.storages.set(key, storage)
      return storage
    }
    if (known.dtype !== dtype || known.count !== count)
      return refuse(`expected one type and size for storage ${JSON.stringify(key.slice(0, 100))}, got two`)
    return known
  }
}
