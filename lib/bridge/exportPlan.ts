// Which Hugging Face tensor goes into which file at which byte, decided before anything is written. A source's files, order and
// header bytes are kept where they still fit; otherwise new headers, in the source's order; without a source, new shards.
import { type DType, dtypes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import type { HfParcel } from '../checkpoint/hfParcel.js'
import type { FileTensor } from '../io/blocks.js'
import {
  encodeHeader,
  encodeInOrder,
  type SafetensorsHeader,
  type TensorPlan,
  tensorBytes,
} from '../io/safetensorsHeader.js'
import { indexOf, newMetadata, shardName } from '../io/shardLayout.js'
import { type BoundPart, type Mapping, tensorShape } from '../models/mapping.js'

/** Where the bytes come from: a logical tensor, or a tensor carried from the source. */
export type Origin = BoundPart | { readonly carried: FileTensor }

/** A HF tensor to write, or a slice of one that stacks experts. */
export interface PlannedTensor {
  readonly name: string
  readonly file: string
  readonly dtype: DType
  readonly shape: readonly number[]
  /** Byte offset in the file. */
  readonly offset: number
  readonly bytes: number
  readonly origin: Origin
}

export interface ExportPlan {
  readonly files: readonly { readonly name: string; readonly header: SafetensorsHeader }[]
  readonly index: { readonly name: string; readonly text: string } | null
  readonly tensors: readonly PlannedTensor[]
  /** True when file names, headers and index are the source's own bytes. */
  readonly asSource: boolean
  /** Dtype of most bytes. */
  readonly mainDtype: DType
}

export interface PlanOptions {
  /** Floating tensors become this; default: as they are held. */
  readonly weightDtype?: DType
  /** Cuts new shards of at most this many bytes instead of keeping the source's files. */
  readonly maxShardBytes?: number
}

/** Largest file of a new model, as huggingface_hub cuts them. */
const defaultShardBytes = 5_000_000_000

/** Plans the files of an export. `held` gives a logical tensor's dtype, or null when there is none to export. */
export function planExport(
  mapping: Mapping,
  parcel: HfParcel,
  held: (ours: string) => DType | null,
  options: PlanOptions = {},
): ExportPlan {
  const originsOf = (name: string): readonly Origin[] => {
    const bound = mapping.byTheirs.get(name) ?? mapping.byTheirs.get(mapping.tied.get(name) ?? '')
    if (bound?.every(({ binding }) => held(binding.ours) !== null)) return bound
    const carried = mapping.derived.has(name) ? parcel.carried.get(name) : undefined
    return carried ? [{ carried }] : []
  }
  const planOf = (name: string, origin: Origin): TensorPlan => {
    if ('carried' in origin) return { name, dtype: origin.carried.dtype, shape: origin.carried.shape }
    const dtype = held(origin.binding.ours) as DType
    return {
      name,
      dtype: options.weightDtype && dtypes[dtype].isFloat ? options.weightDtype : dtype,
      shape: tensorShape(origin.part),
    }
  }
  const { layout } = parcel
  const names = new Set(parcel.tensorNames)
  for (const name of mapping.byTheirs.keys()) names.add(name)
  const origins = new Map<string, readonly Origin[]>()
  for (const name of names) {
    const found = originsOf(name)
    if (found.length > 0) origins.set(name, found)
  }
  if (origins.size === 0) throw new ViaductError('ERR_COVERAGE', 'export', 'expected tensors to export, got none')
  const plans = new Map([...origins].map(([name, [first]]) => [name, planOf(name, first as Origin)]))

  let files: { name: string; header: SafetensorsHeader }[]
  let asSource = false
  if (layout && options.maxShardBytes === undefined) {
    asSource = isUnchanged(layout.files, plans)
    files = asSource ? [...layout.files] : inSourceOrder(layout.files, plans)
  } else {
    files = cut(
      [...plans.values()],
      options.maxShardBytes ?? defaultShardBytes,
      layout?.files[0]?.header.metadata ?? newMetadata,
    )
  }
  const tensors = files.flatMap(({ name: file, header }) =>
    [...header.entries.values()].flatMap(({ name, dtype, shape: whole, begin, end }) => {
      const found = origins.get(name) as readonly Origin[]
      const bytes = (end - begin) / found.length
      return found.map((origin, i): PlannedTensor => {
        const shape = 'part' in origin ? origin.part.shape : whole
        return { name, file, dtype, shape, offset: header.bytes.length + begin + i * bytes, bytes, origin }
      })
    }),
  )
  const hasIndex = files.length > 1 || (layout?.index ?? null) !== null
  const index = asSource ? (layout?.index ?? null) : hasIndex ? indexOf(files) : null
  return { files, index, tensors, asSource, mainDtype: mainDtype([...plans.values()]) }
}

function isUnchanged(files: NonNullable<HfParcel['layout']>['files'], plans: ReadonlyMap<string, TensorPlan>): boolean {
  const entries = files.flatMap((file) => [...file.header.entries.values()])
  return (
    entries.length === plans.size &&
    entries.every((entry) => {
      const plan = plans.get(entry.name)
      return plan !== undefined && plan.dtype === entry.dtype && plan.shape.join() === entry.shape.join()
    })
  )
}

/** The source's files and order with new headers; tensors that the source lacked go to the end of the last file. */
function inSourceOrder(
  files: NonNullable<HfParcel['layout']>['files'],
  plans: ReadonlyMap<string, TensorPlan>,
): { name: string; header: SafetensorsHeader }[] {
  const rest = new Map(plans)
  const lists = files.map((file) => {
    const list: TensorPlan[] = []
    for (const name of file.header.entries.keys()) {
      const plan = rest.get(name)
      if (plan) list.push(plan)
      rest.delete(name)
    }
    return list
  })
  lists.at(-1)?.push(...rest.values())
  return files.flatMap((file, i) => {
    const list = lists[i] as TensorPlan[]
    return list.length === 0 ? [] : [{ name: file.name, header: encodeInOrder(list, file.header.metadata) }]
  })
}

/** New files in the given order, each at most `limit` bytes of tensors (one larger tensor stands alone). */
function cut(
  plans: readonly TensorPlan[],
  limit: number,
  metadata: ReadonlyMap<string, string>,
): { name: string; header: SafetensorsHeader }[] {
  const shards: TensorPlan[][] = [[]]
  let bytes = 0
  for (const plan of plans) {
    const size = tensorBytes(plan.dtype, plan.shape)
    if (bytes > 0 && bytes + size > limit) {
      shards.push([])
      bytes = 0
    }
    shards.at(-1)?.push(plan)
    bytes += size
  }
  return shards.map((shard, i) => ({ name: shardName(i, shards.length), header: encodeHeader(shard, metadata) }))
}

function mainDtype(plans: readonly TensorPlan[]): DType {
  const bytes = new Map<DType, number>()
  for (const { dtype, shape } of plans) bytes.set(dtype, (bytes.get(dtype) ?? 0) + tensorBytes(dtype, shape))
  return [...bytes].reduce((best, next) => (next[1] > best[1] ? next : best))[0]
}

/** Dtype of most bytes of the source's files, or null without a source. */
export function sourceDtype(parcel: HfParcel): DType | null {
  const entries = parcel.layout?.files.flatMap((file) => [...file.header.entries.values()]) ?? []
  return entries.length === 0 ? null : mainDtype(entries)
}
