// Two config.json, field by field. Fields are told by their path, `rope_scaling.factor`; lists are compared as a whole.
import { type JsonValue, jsonEqual } from '../../io/jsonDocument.js'

/** A field that differs; a side that lacks it has none here. */
export interface FieldDifference {
  readonly field: string
  readonly a?: JsonValue
  readonly b?: JsonValue
}

/** All fields of a config by path; an object that is empty counts as a field. */
export function fieldsOf(value: JsonValue): Map<string, JsonValue> {
  const fields = new Map<string, JsonValue>()
  const walk = (path: string, at: JsonValue): void => {
    const inner = typeof at === 'object' && at !== null && !Array.isArray(at) ? Object.entries(at) : []
    if (inner.length === 0) fields.set(path, at)
    for (const [key, below] of inner) walk(path === '' ? key : `${path}.${key}`, below)
  }
  walk('', value)
  return fields
}

/** Fields that differ, in the order of `a`, then those that only `b` has. */
export function configDifferences(a: JsonValue, b: JsonValue): FieldDifference[] {
  const [left, right] = [fieldsOf(a), fieldsOf(b)]
  return [...new Set([...left.keys(), ...right.keys()])].flatMap((field): FieldDifference[] => {
    const [before, after] = [left.get(field), right.get(field)]
    if (jsonEqual(before, after)) return []
    return [{ field, ...(before === undefined ? {} : { a: before }), ...(after === undefined ? {} : { b: after }) }]
  })
}

/** `num_hidden_layers: 2, 3`, `head_dim: only on one side, 8`. */
export function describeField({ field, a, b }: FieldDifference): string {
  const text = (value: JsonValue) => JSON.stringify(value)
  if (a === undefined || b === undefined) return `${field}: only on one side, ${text((a ?? b) as JsonValue)}`
  return `${field}: ${text(a)}, ${text(b)}`
}
