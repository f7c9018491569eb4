// Rotary settings in Hugging Face configs: `rope_theta` with `rope_scaling` ({type or rope_type, ...}), or `rope_parameters` of
// Transformers 5. Reading takes both, writing keeps the one that is there. Meanings of the fields: modeling_rope_utils.py.
import type { ConfigReader } from './configReader.js'
import type { HfConfig, HfValue } from './family.js'
import type { RopeScaling } from './transformerConfig.js'

const types = ['default', 'linear', 'dynamic', 'llama3', 'yarn'] as const

/** Our field, HF's field, and the types that have it. */
const numbers: readonly (readonly [keyof RopeScaling, string])[] = [
  ['factor', 'factor'],
  ['lowFreqFactor', 'low_freq_factor'],
  ['highFreqFactor', 'high_freq_factor'],
  ['originalMaxPositionEmbeddings', 'original_max_position_embeddings'],
  ['attentionFactor', 'attention_factor'],
  ['betaFast', 'beta_fast'],
  ['betaSlow', 'beta_slow'],
  ['mscale', 'mscale'],
  ['mscaleAllDim', 'mscale_all_dim'],
]

const needed: Readonly<Record<RopeScaling['type'], readonly string[]>> = {
  default: [],
  linear: ['factor'],
  dynamic: ['factor'],
  llama3: ['factor', 'low_freq_factor', 'high_freq_factor'],
  yarn: ['factor'],
}

/** Base and scaling of a config; problems go to the reader's list. Old and new spelling; the new one counts where both are. */
export function readRope(
  read: ConfigReader,
  maxPositions: number,
  defaultBase: number,
): { base: number; scaling: RopeScaling } {
  const rope = read.nested('rope_parameters') ?? read.nested('rope_scaling')
  const outer = read.real('rope_theta', { min: 1, fallback: defaultBase })
  if (rope === null) return { base: outer, scaling: { type: 'default' } }
  const base = rope.has('rope_theta') ? rope.real('rope_theta', { min: 1 }) : outer
  const name = rope.text(rope.has('rope_type') ? 'rope_type' : 'type', 'default')
  const type = types.find((t) => t === name)
  if (type === undefined) {
    read.problem(`${rope.prefix}rope_type must be one of ${types.join(', ')}, got ${JSON.stringify(name)}`)
    return { base, scaling: { type: 'default' } }
  }
  const percent = rope.optionalReal('partial_rotary_factor') ?? read.optionalReal('partial_rotary_factor')
  if (percent !== undefined && percent !== 1)
    read.problem(`partial_rotary_factor must be 1 for this family, got ${percent}`)
  if (type === 'default') return { base, scaling: { type } }
  const scaling: Record<string, number | string | boolean> = { type }
  for (const [ours, theirs] of numbers) {
    const value = rope.optionalReal(theirs, { min: 0 })
    if (value !== undefined) scaling[ours] = value
    else if (needed[type].includes(theirs)) read.problem(`${rope.prefix}${theirs} is missing for rope_type ${type}`)
  }
  if ((type === 'linear' || type === 'dynamic') && typeof scaling['factor'] === 'number' && scaling['factor'] < 1) {
    read.problem(`${rope.prefix}factor must be at least 1, got ${scaling['factor']}`)
  }
  if (rope.has('truncate')) scaling['truncate'] = rope.flag('truncate', true)
  if (type === 'llama3' || type === 'yarn') {
    scaling['originalMaxPositionEmbeddings'] ??= read.has('original_max_position_embeddings')
      ? read.count('original_max_position_embeddings', { max: 2 ** 31 - 1 })
      : maxPositions
  }
  return { base, scaling: scaling as unknown as RopeScaling }
}

/** Equal scalings, field by field. */
export function sameRope(a: RopeScaling, b: RopeScaling): boolean {
  const keys = new Set([...Object.keys(a), ...Object.keys(b)]) as Set<keyof RopeScaling>
  return [...keys].every((key) => a[key] === b[key])
}

/** Writes base and scaling in the spelling that `hf` has; a new config gets rope_theta and rope_scaling, which all versions read. */
export function writeRope(hf: Record<string, HfValue>, base: number, scaling: RopeScaling): void {
  const modern = isRecord(hf['rope_parameters'])
  const old = (modern ? hf['rope_parameters'] : hf['rope_scaling']) as HfConfig | null | undefined
  const record: Record<string, HfValue> = Object.assign(Object.create(null), isRecord(old) ? old : {})
  for (const [ours, theirs] of numbers) {
    const value = scaling[ours]
    if (value === undefined) delete record[theirs]
    else record[theirs] = value as number
  }
  if (scaling.truncate === undefined) delete record['truncate']
  else record['truncate'] = scaling.truncate
  if ('type' in record) record['type'] = scaling.type
  if ('rope_type' in record || !('type' in record)) record['rope_type'] = scaling.type
  if (modern) {
    record['rope_theta'] = base
    hf['rope_parameters'] = record
    return
  }
  if ('rope_theta' in record) record['rope_theta'] = base
  else hf['rope_theta'] = base
  hf['rope_scaling'] = scaling.type === 'default' ? null : record
}

function isRecord(value: HfValue | undefined): value is { readonly [key: string]: HfValue } {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
