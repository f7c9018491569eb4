// A Hugging Face folder, opened and proved: config, family, mapping, weights, coverage. Everything that can be wrong is found
// here, before a byte moves. Headers and a few derived tensors are read, and copies of tied tensors are compared.
import { open } from 'node:fs/promises'
import { type DType, dtypes } from '../base/dtype.js'
import { ViaductError } from '../base/errors.js'
import { HfParcel, readConfig } from '../checkpoint/hfParcel.js'
import { compareRanges, type FileTensor } from '../io/blocks.js'
import { type HubOrigin, originOf } from '../io/hub/cacheLayout.js'
import { modelFolder, type SourceOptions } from '../io/hub/modelSource.js'
import { type ByteRange, leaseHere } from '../io/hub/remoteBytes.js'
import { isAddress, openRemoteFolder } from '../io/hub/remoteFolder.js'
import { openWeights, type TensorSource, type WeightFolder } from '../io/weightFolder.js'
import type { FamilySpec, HfConfig } from '../models/family.js'
import {
  bindRules,
  type Coverage,
  type CoveragePolicy,
  type Mapping,
  type Part,
  proveCoverage,
  type TensorNames,
} from '../models/mapping.js'
import { parameterTable } from '../models/parameterTable.js'
import { familyOf } from '../models/registry.js'
import type { TransformerConfig } from '../models/transformerConfig.js'

/** A model as Hugging Face describes it. */
export interface HfModel {
  readonly folder: string
  /** Model and commit of a folder of the hub's cache; null for any other folder. */
  readonly hub: HubOrigin | null
  /** Address of a folder on a web server, whose small files are in `folder`; else null. */
  readonly address: string | null
  readonly family: FamilySpec
  readonly config: TransformerConfig
  readonly mapping: Mapping
  readonly parcel: HfParcel
  readonly weights: WeightFolder
  readonly coverage: Coverage
}

/** Family and config of a HF config. @throws ERR_ARCHITECTURE, ERR_HF_CONFIG */
export function readHfConfig(hf: HfConfig): { family: FamilySpec; config: TransformerConfig } {
  const family = familyOf(hf)
  return { family, config: family.fromHf(hf) }
}

/** The mapping of a family for one config, in the spelling of the source's names; null: as for new files. */
export function mappingOf(family: FamilySpec, config: TransformerConfig, names: TensorNames | null): Mapping {
  return bindRules(family.rules(config), parameterTable(config), config, names)
}

/** Family, config and mapping of what a checkpoint keeps of its source. @throws ERR_ARCHITECTURE, ERR_HF_CONFIG */
export function readParcel(parcel: HfParcel): { family: FamilySpec; config: TransformerConfig; mapping: Mapping } {
  const { family, config } = readHfConfig(parcel.config.value as HfConfig)
  return { family, config, mapping: mappingOf(family, config, parcel.tensorNames) }
}

/**
 * Opens and proves a model.
 * @param path - a folder, a folder of the hub's cache, a hub id, which is fetched, or the address of a folder on a web server,
 *   of which headers are.
 * @throws what openUnproved throws; ERR_COVERAGE, ERR_TENSOR_SHAPE, ERR_TENSOR_DTYPE, ERR_TIED
 */
export async function openHfModel(path: string, options: CoveragePolicy & SourceOptions = {}): Promise<HfModel> {
  const model = await openUnproved(path, options)
  const { weights, mapping } = model
  const facts = new Map([...weights.tensors].map(([name, source]) => [name, source.entry]))
  const coverage = proveCoverage(mapping, facts, options)
  for (const copy of coverage.tied) await checkTied(weights, copy, mapping.tied.get(copy) as string)
  const carried = new Map<string, FileTensor>()
  for (const name of coverage.derived) {
    const source = weights.tensors.get(name) as TensorSource
    const kept = weights.remote ? await weights.remote.keep([bytesOf(source)]) : null
    const here = kept ? kept.local(source) : source
    await checkDerived(mapping, name, here)
    carried.set(name, placeOf(here))
  }
  return { ...model, parcel: model.parcel.with({ carried }), coverage }
}

/**
 * Opens a model whose files are sound; whether its tensors fit its config is not asked.
 * @throws ERR_ARCHITECTURE, ERR_HF_CONFIG, ERR_JSON, ERR_PICKLE, ERR_TORCH_FILE, ERR_FILE_MISSING, ERR_INDEX,
 *   ERR_SAFETENSORS_*, what modelFolder throws
 */
export async function openUnproved(path: string, options: SourceOptions = {}): Promise<Omit<HfModel, 'coverage'>> {
  const remote = isAddress(path) ? await openRemoteFolder(path, options.signal ? { signal: options.signal } : {}) : null
  const folder = remote?.folder ?? (await modelFolder(path, options))
  const { family, config } = readHfConfig((await readConfig(folder)).value as HfConfig)
  const weights = remote ?? (await openWeights(folder))
  const mapping = mappingOf(family, config, weights.tensors)
  const parcel = await HfParcel.fromFolder(folder, weights)
  return { folder, hub: originOf(folder), address: remote ? path : null, family, config, mapping, parcel, weights }
}

/** A tensor of a weight folder, or the slice of it that a part is, for block reads. */
export function placeOf({ path, offset, entry }: TensorSource, part: Part | null = null): FileTensor {
  const slice = part?.slice ?? { index: 0, count: 1 }
  const bytes = (entry.end - entry.begin) / slice.count
  return { path, offset: offset + slice.index * bytes, dtype: entry.dtype, shape: part?.shape ?? entry.shape }
}

type Place = Pick<FileTensor, 'path' | 'offset'>

/** All bytes of a tensor. */
export function bytesOf({ path, offset, entry }: TensorSource): ByteRange {
  return { path, begin: offset, end: offset + entry.end - entry.begin }
}

async function checkTied(weights: WeightFolder, copy: string, original: string): Promise<void> {
  const a = weights.tensors.get(copy) as TensorSource
  const b = weights.tensors.get(original)
  if (b === undefined) return // permitted to be missing; then the copy has nothing to repeat
  const fail = (how: string): never => {
    throw new ViaductError(
      'ERR_TIED',
      'coverage',
      `expected ${copy} to equal ${original} because tie_word_embeddings is true, got ${how}: set tie_word_embeddings to false to keep both, or pass --ignore ${copy} to drop the copy`,
      { tensor: copy, original },
    )
  }
  if (a.entry.dtype !== b.entry.dtype) fail(`${a.entry.dtype} and ${b.entry.dtype}`)
  const bytes = a.entry.end - a.entry.begin
  const step = weights.remote ? weights.remote.limit >> 2 : Math.max(bytes, 1)
  for (let at = 0; at < bytes; at += step) {
    const count = Math.min(step, bytes - at)
    const [left, right] = [a, b].map(({ path, offset }) => ({ path, offset: offset + at })) as [Place, Place]
    const lease = await leaseHere(
      weights.remote,
      [left, right].map(({ path, offset }) => ({ path, begin: offset, end: offset + count })),
    )
    const { differing, first } = await compareRanges(lease.local(left), lease.local(right), count).finally(
      lease.release,
    )
    if (differing > 0) fail(`${differing} differing bytes, the first at ${at + first}`)
  }
}

/** Half a unit in the last place, relative, and the least absolute step: what rounding the formula to the dtype may change. */
const rounding: Partial<Record<DType, { readonly relative: number; readonly absolute: number }>> = {
  // A float32 power is off by a few units in the last place: 8 of them.
  float32: { relative: 8 * 2 ** -24, absolute: 2 ** -149 },
  bfloat16: { relative: 2 ** -8, absolute: 2 ** -133 },
  float16: { relative: 2 ** -10, absolute: 2 ** -24 },
}

async function checkDerived(mapping: Mapping, name: string, source: TensorSource): Promise<void> {
  const expected = mapping.derived.get(name)?.values(mapping.config) as Float64Array
  const { dtype, begin, end } = source.entry
  const allowed = rounding[dtype]
  const bytes = Buffer.alloc(end - begin)
  const file = await open(source.path, 'r')
  await file.read(bytes, 0, bytes.length, source.offset).finally(() => file.close())
  const width = dtypes[dtype].bits / 8
  expected.forEach((value, i) => {
    const actual = allowed === undefined ? Number.NaN : decode(bytes, i * width, dtype)
    if (allowed !== undefined && Math.abs(actual - value) <= allowed.relative * Math.abs(value) + allowed.absolute)
      return
    throw new ViaductError(
      'ERR_COVERAGE',
      'coverage',
      `expected ${name}[${i}] to be ${value}, which follows from the config, got ${allowed === undefined ? dtype : actual}: the folder's config and weights disagree, or pass --ignore ${name} to drop it`,
      { tensor: name, index: i, expected: value },
    )
  })
}

function decode(bytes: Buffer, at: number, dtype: DType): number {
  if (dtype === 'float32') return bytes.readFloatLE(at)
  const bits = bytes.readUInt16LE(at)
  if (dtype === 'bfloat16') {
    const word = Buffer.alloc(4)
    word.writeUInt16LE(bits, 2)
    return word.readFloatLE(0)
  }
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >> 10) & 31
  const fraction = bits & 1023
  if (exponent === 0) return sign * fraction * 2 ** -24
  return exponent === 31 ? Number.NaN : sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
}
