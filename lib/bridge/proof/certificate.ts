// The certificate of a verification: what was proved, of what, by which rule, with which versions. Plain data for JSON; every field is
// described in docs/conversion.md. Nothing is computed over tensors here.
import { packageVersion } from '../../base/packageRoot.js'
import { formatVersion as checkpointFormat } from '../../checkpoint/checkpointIndex.js'
import type { JsonValue } from '../../io/jsonDocument.js'
import type { Coverage, MappingRule } from '../../models/mapping.js'
import type { ParallelConfig } from '../../parallel/config.js'
import type { HfModel } from '../hfModel.js'
import { configDifferences, type FieldDifference, fieldsOf } from './configDifference.js'

/** Goes up when a field changes its meaning or goes away. */
export const certificateFormat = 1

/** How a tensor is carried: by a mapping rule, as a copy of a tied tensor, or as it is because it follows from the config. */
export interface CarryingRule {
  readonly kind: MappingRule['kind'] | 'tied' | 'derived'
  /** Megatron's name of the parameter that it becomes a part of; null: of none. */
  readonly ours: string | null
}

/** One row of the table. */
export interface VerifiedTensor {
  /** Hugging Face name; of a slice of a stack, with its index: `experts.down_proj[3]`. */
  readonly name: string
  readonly shape: readonly number[]
  readonly dtype: string
  readonly bytes: number
  readonly rule: CarryingRule
  /** Bytes that came back differently, and the offset of the first in the tensor (-1 where none did). */
  readonly differingBytes: number
  readonly firstDifference: number
  readonly sha256Before: string
  readonly sha256After: string
}

/** A parameter and the Hugging Face tensors that it is made of. */
export interface CoveredParameter {
  readonly name: string
  readonly shape: readonly number[]
  /** Empty: allowed to be missing. */
  readonly sources: readonly string[]
}

/** A file beside the tensors. `after`: as the checkpoint keeps it, null where none is given or it has no such file. */
export interface VerifiedFile {
  readonly name: string
  readonly sha256Before: string | null
  readonly sha256After: string | null
}

/** Fields of config.json, those below others counted by their path. */
export interface VerifiedConfig {
  readonly fields: number
  readonly kept: number
  /** `a`: the folder's; `b`: as it came back. */
  readonly changed: readonly FieldDifference[]
}

export interface Verification {
  readonly ok: boolean
  /** Something was ignored or allowed to be missing. */
  readonly partial: boolean
  readonly folder: string
  /** Model and commit of a folder of the hub's cache; else null. */
  readonly hub: HfModel['hub']
  /** Where the folder is on a web server; else null. */
  readonly address: string | null
  readonly architecture: string
  readonly checkpoint: string | null
  /** The simulated layout. */
  readonly parallel: ParallelConfig
  readonly versions: {
    readonly viaduct: string
    readonly node: string
    readonly certificate: number
    readonly checkpoint: number
  }
  /** When it began, ISO 8601, and how long it took. */
  readonly time: { readonly began: string; readonly seconds: number }
  readonly tensors: readonly VerifiedTensor[]
  readonly differingBytes: number
  /** Every tensor of the folder by what happens to it, and every parameter with its sources. */
  readonly coverage: Coverage & { readonly parameters: readonly CoveredParameter[] }
  readonly config: VerifiedConfig
  /** The config came back byte for byte after a translation there and back. */
  readonly configKept: boolean
  readonly files: readonly VerifiedFile[]
  /** Every difference in words, naming tensor, field or file. */
  readonly problems: readonly string[]
}

/** Versions of what proved it. */
export function versions(): Verification['versions'] {
  return {
    viaduct: packageVersion(),
    node: process.versions.node,
    certificate: certificateFormat,
    checkpoint: checkpointFormat,
  }
}

/** Both directions of the coverage. */
export function coverageOf({ mapping, coverage, weights }: HfModel): Verification['coverage'] {
  const ignored = new Set(coverage.ignored)
  const parameters = [...mapping.bindings.values()].map(({ ours, shape, parts }) => ({
    name: ours,
    shape,
    sources: parts.map((part) => part.name).filter((name) => weights.tensors.has(name) && !ignored.has(name)),
  }))
  return { ...coverage, parameters }
}

/** Fields of a config that came back as they were. */
export function verifiedConfig(before: JsonValue, after: JsonValue): VerifiedConfig {
  const changed = configDifferences(before, after)
  const lost = changed.filter(({ a }) => a !== undefined).length
  const fields = fieldsOf(before).size
  return { fields, kept: fields - lost, changed }
}
