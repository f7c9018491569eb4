// Two models side by side, each a Hugging Face folder or a checkpoint: tensors by Hugging Face names, config fields, other files.
// One tensor at a time is read, in stretches. Activations are compared in lib/inference.
import { stat } from 'node:fs/promises'
import type { DType } from '../../base/dtype.js'
import type { HfParcel } from '../../checkpoint/hfParcel.js'
import { compareRanges } from '../../io/blocks.js'
import type { SourceOptions } from '../../io/hub/modelSource.js'
import { strayShards } from '../../io/otherFiles.js'
import { fileInside } from '../../io/paths.js'
import { tensorBytes } from '../../io/safetensorsHeader.js'
import type { OnProgress } from '../offline/conversion.js'
import { configDifferences, describeField, type FieldDifference } from './configDifference.js'
import { type ModelSide, openSide, type TensorView } from './modelSide.js'
import { type TensorDifference, tensorDifference } from './tensorDifference.js'

export interface CompareOptions extends SourceOptions {
  readonly onProgress?: OnProgress
}

/** One side's facts of a tensor. */
export interface SideFacts {
  readonly dtype: DType
  readonly shape: readonly number[]
}

/** A tensor that both sides have. Without a difference in numbers where the shapes differ. */
export interface ComparedTensor {
  readonly name: string
  readonly a: SideFacts
  readonly b: SideFacts
  /** Same shape, same dtype, same bits. */
  readonly equal: boolean
  readonly difference: TensorDifference | null
}

/** A file beside the tensors that differs. */
export interface FileDifference {
  readonly name: string
  readonly how: 'only in a' | 'only in b' | 'differs'
}

export interface ComparedSide {
  readonly kind: ModelSide['kind']
  readonly folder: string
  readonly architecture: string
  readonly runs: boolean
}

export interface Comparison {
  /** Tensors, config fields and other files are the same. How weights are cut into files does not matter. */
  readonly equal: boolean
  readonly a: ComparedSide
  readonly b: ComparedSide
  readonly tensors: readonly ComparedTensor[]
  readonly onlyInA: readonly string[]
  readonly onlyInB: readonly string[]
  readonly config: readonly FieldDifference[]
  readonly files: readonly FileDifference[]
  /** Every difference in words, naming tensor, field or file. */
  readonly differences: readonly string[]
}

/**
 * Compares two models.
 * @throws what openSide throws; a difference is a result.
 */
export async function compare(a: string, b: string, options: CompareOptions = {}): Promise<Comparison> {
  const [left, right] = [await openSide(a, options), await openSide(b, options)]
  const ofA = new Map([...left.tensors, ...(right.kind === 'checkpoint' ? left.extra : weightsAmong(left.extra))])
  const ofB = new Map([
    ...right.spelledAs(namesOf(left)),
    ...(left.kind === 'checkpoint' ? right.extra : weightsAmong(right.extra)),
  ])
  const tensors: ComparedTensor[] = []
  const total = [...ofA.values()].reduce((n, { dtype, shape }) => n + tensorBytes(dtype, shape), 0)
  let done = 0
  for (const [name, view] of ofA) {
    const other = ofB.get(name)
    if (other !== undefined) tensors.push(await compareTensors(name, view, other))
    done += tensorBytes(view.dtype, view.shape)
    options.onProgress?.(done, total)
  }
  const onlyInA = [...ofA.keys()].filter((name) => !ofB.has(name))
  const onlyInB = [...ofB.keys()].filter((name) => !ofA.has(name))
  const config = configDifferences(left.parcel.config.value, right.parcel.config.value)
  const files = await compareFiles(left.parcel, right.parcel)
  const differences = [
    ...tensors.filter((tensor) => !tensor.equal).map(describeTensor),
    ...onlyInA.map((name) => `${name} is only in ${left.folder}`),
    ...onlyInB.map((name) => `${name} is only in ${right.folder}`),
    ...config.map((field) => `config.json: ${describeField(field)}`),
    ...files.map(({ name, how }) => `${name} ${how === 'differs' ? how : `is ${how}`}`),
  ]
  const equal = differences.length === 0
  const sides = [left, right].map(
    ({ kind, folder, family }): ComparedSide => ({
      kind,
      folder,
      architecture: family.architectures[0] as string,
      runs: family.runs,
    }),
  ) as [ComparedSide, ComparedSide]
  return { equal, a: sides[0], b: sides[1], tensors, onlyInA, onlyInB, config, files, differences }
}

/** Names of a side's Hugging Face tensors, slices under the name of their stack. */
function namesOf(side: ModelSide): ReadonlySet<string> {
  return new Set([...side.tensors.keys()].map((name) => name.replace(/\[\d+\]$/, '')))
}

/** What a folder could have too: a folder has no optimizer. */
function weightsAmong(extra: ReadonlyMap<string, TensorView>): [string, TensorView][] {
  return [...extra].filter(([name]) => !name.startsWith('optimizer.'))
}

async function compareTensors(name: string, a: TensorView, b: TensorView): Promise<ComparedTensor> {
  const facts = { a: { dtype: a.dtype, shape: a.shape }, b: { dtype: b.dtype, shape: b.shape } }
  if (a.shape.join() !== b.shape.join()) return { name, ...facts, equal: false, difference: null }
  const difference = await tensorDifference(a, b)
  return { name, ...facts, equal: a.dtype === b.dtype && difference.differing === 0, difference }
}

function describeTensor({ name, a, b, difference }: ComparedTensor): string {
  const { dtype, shape } = a
  if (difference === null) return `${name} is [${shape}] in a, [${b.shape}] in b`
  const dtypes = dtype === b.dtype ? '' : ` is ${dtype} in a, ${b.dtype} in b;`
  const elements = shape.reduce((n, d) => n * d, 1)
  if (difference.differing === 0) return `${name}${dtypes} all values are equal`
  const size =
    difference.maxDifference === null ? '' : `, the largest difference is ${difference.maxDifference.toPrecision(3)}`
  return `${name}${dtypes}${dtypes ? '' : ':'} ${difference.differing} of ${elements} elements differ, the first at ${difference.first}${size}`
}

async function compareFiles(a: HfParcel, b: HfParcel): Promise<FileDifference[]> {
  const [ours, theirs] = [a, b].map((side) => new Set([...side.others, ...strayShards(side.leftOut)])) as [
    Set<string>,
    Set<string>,
  ]
  const found: FileDifference[] = []
  for (const name of ours) {
    if (!theirs.delete(name)) found.push({ name, how: 'only in a' })
    else if (!(await isSameFile(a.folder as string, b.folder as string, name))) found.push({ name, how: 'differs' })
  }
  return [...found, ...[...theirs].map((name): FileDifference => ({ name, how: 'only in b' }))]
}

/** True when a file is byte for byte the same in two folders. @throws ERR_PATH_ESCAPE */
export async function isSameFile(a: string, b: string, name: string): Promise<boolean> {
  const [left, right] = [await fileInside(a, name), await fileInside(b, name)]
  const { size } = await stat(left)
  if (size !== (await stat(right)).size) return false
  return (await compareRanges({ path: left, offset: 0 }, { path: right, offset: 0 }, size)).differing === 0
}
